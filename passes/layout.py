"""Layout: channels-last where convolutions compute in it and generated code would leave it."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch._prims_common import make_channels_last_strides_for
from torch.utils._pytree import tree_leaves

from passes.graph import aten, calls, emit, is_call, value

_force_stride_order = torch.ops.prims.inductor_force_stride_order.default


def has_convolution(graph: fx.Graph) -> bool:
    """Whether there is a convolution of images: Inductor has its operands channels-last."""
    convolutions = calls(graph, aten.convolution.default, aten.convolution_backward.default)
    return any(value(node.args[0]).dim() == 4 for node in convolutions)


def is_image(tensor: Tensor) -> bool:
    """Whether it has four dimensions of known sizes."""
    return tensor.dim() == 4 and all(isinstance(size, int) for size in tensor.shape)


def is_seen_by_caller(node: fx.Node) -> bool:
    """Whether the strides of something that the caller gets may follow from those of ``node``.

    They do through operators that keep three dimensions or more, but not through the backward of a
    convolution, which goes by the convolution's input.
    """
    (output,) = node.graph.find_nodes(op="output")
    returned = tree_leaves(output.args)
    indices = output.meta.get("user_visible_output_idxs", range(len(returned)))
    visible = {returned[index] for index in indices}
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        if current in visible:
            return True
        for user in current.users:
            if user not in seen and _passes_strides_on(user):
                seen.add(user)
                waiting.append(user)
    return False


def _passes_strides_on(node: fx.Node) -> bool:
    result = value(node)
    if isinstance(result, Tensor):
        return result.dim() > 2
    return node.op != "output" and not is_call(node, aten.convolution_backward.default)


def written_channels_last(origin: fx.Node, image: fx.Node) -> fx.Node:
    """``image``, of four dimensions and known sizes, written channels-last by what computes it."""
    strides = make_channels_last_strides_for(value(image).shape)
    return emit(origin, _force_stride_order, image, list(strides))
