"""Layout: channels-last where convolutions compute in it and generated code would leave it."""

from __future__ import annotations

import torch
from torch import fx
from torch._prims_common import make_channels_last_strides_for

from passes import ops
from passes.graph import aten, calls, emit, value

_force_stride_order = torch.ops.prims.inductor_force_stride_order.default


def has_convolution(graph: fx.Graph) -> bool:
    """Whether there is a convolution of images: Inductor has its operands channels-last."""
    convolutions = calls(graph, aten.convolution.default, aten.convolution_backward.default)
    return any(value(node.args[0]).dim() == 4 for node in convolutions)


def written_channels_last(origin: fx.Node, image: fx.Node) -> fx.Node:
    """``image``, of four dimensions and known sizes, written channels-last by what computes it."""
    strides = make_channels_last_strides_for(value(image).shape)
    return emit(origin, _force_stride_order, image, list(strides))


def call_native_convolution_backward(graph: fx.Graph) -> int:
    """Call PyTorch's backward of convolutions as optcpu's operator; return how many there were.

    Inductor would lay out the operands of the original one by the strides of the weight gradient (PyTorch
    2.13), which say nothing where there is one channel.
    """
    fired = 0
    for node in calls(graph, aten.convolution_backward.default):
        node.target = ops.convolution_backward
        fired += 1
    return fired
