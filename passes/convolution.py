"""Convolutions: by the kernels that are right, and fast."""

from __future__ import annotations

import functools
import operator
import sys
from dataclasses import dataclass
from typing import Any

from torch import fx

from passes import ops
from passes.base import Pass
from passes.graph import aten, calls, emit, value
from passes.im2col import is_worth_a_product
from passes.layout import is_image

# oneDNN's vector holds eight FP32 numbers; with fewer channels its kernel reads past them.
_FEWEST_CHANNELS = 8


@dataclass(frozen=True, repr=False)
class SubsampleForWeightGradient(Pass):
    """Take the weight gradient of a strided 1x1 convolution with few channels from a subsampled input.

    Before::

        dx, dw, db = convolution_backward(g, x, w, stride=[2, 2], mask=[True, True, True])

    After::

        dx, _, _ = convolution_backward(g, x, w, stride=[2, 2], mask=[True, False, False])
        _, dw, db = convolution_backward(g, x[:, :, ::2, ::2], w, stride=[1, 1], mask=[False, True, True])

    The same numbers by definition. oneDNN's AVX2 kernel for the former reads past the channels where
    the input is laid out channels-last, as generated code lays it out, and has fewer than eight of
    them: its gradient is off by a factor (seen with oneDNN 3.12 on AMD Zen 3). Fires once for each
    convolution.
    """

    def __call__(self, graph: fx.Graph) -> int:
        fired = 0
        for node in calls(graph, aten.convolution_backward.default):
            if _is_affected(node):
                _split(node)
                fired += 1
        graph.eliminate_dead_code()
        return fired


def _is_affected(node: fx.Node) -> bool:
    _, x, weight, _, stride, padding, _, transposed, _, groups, mask = node.args
    channels = value(x).shape[1]
    return bool(
        mask[1]  # type: ignore[index]
        and not transposed
        and groups == 1
        and all(size == 1 for size in value(weight).shape[2:])
        and any(step != 1 for step in stride)  # type: ignore[union-attr]
        and all(pad == 0 for pad in padding)  # type: ignore[union-attr]
        and isinstance(channels, int)
        and channels < _FEWEST_CHANNELS
    )


def _split(node: fx.Node) -> None:
    gradient, x, weight, bias_sizes, stride, *rest, mask = node.args
    wants_input, _, wants_bias = mask  # type: ignore[misc, union-attr, str-unpack]
    assert isinstance(x, fx.Node)
    assert isinstance(stride, (list, tuple))

    def backward(source: fx.Node, steps: Any, wanted: list[Any]) -> fx.Node:
        operands = (gradient, source, weight, bias_sizes, steps, *rest, wanted)
        return emit(node, aten.convolution_backward.default, *operands)

    with node.graph.inserting_before(node):
        small = x
        for axis, step in enumerate(stride, start=2):
            # To the end, as the size itself, where it is symbolic, would be no node of the graph.
            small = emit(node, aten.slice.Tensor, small, axis, 0, sys.maxsize, step)
        weight_gradient = backward(small, [1] * len(stride), [False, True, wants_bias])
        input_gradient = backward(x, stride, [wants_input, False, False]) if wants_input else None
    for item in list(node.users):
        assert item.target is operator.getitem
        source = input_gradient if item.args[1] == 0 else weight_gradient
        if source is not None:
            item.update_arg(0, source)


def call_native_backward(graph: fx.Graph) -> int:
    """Call PyTorch's backward of convolutions as optcpu's operator; return how many there were.

    Inductor would lay out the operands of the original one by the strides of the weight gradient (PyTorch
    2.13), which say nothing where there is one channel.
    """
    fired = 0
    for node in calls(graph, aten.convolution_backward.default):
        node.target = ops.convolution_backward
        fired += 1
    return fired


def choose_for_small_images(graph: fx.Graph) -> int:
    """Have convolutions of small images done by the way that is measured to be faster; return how many.

    Before::

        y = convolution(x, w, None, stride, padding, ...)

    After::

        y = optcpu.convolution(x, w, stride, padding)
    """
    fired = 0
    for node in calls(graph, aten.convolution.default):
        if not _may_be_a_product(node):
            continue
        _lay_out_operands()
        x, weight, _, stride, padding, *_ = node.args
        with graph.inserting_before(node):
            chosen = emit(node, ops.convolution, x, weight, stride, padding)
        node.replace_all_uses_with(chosen)
        graph.erase_node(node)
        fired += 1
    return fired


@functools.cache
def _lay_out_operands() -> None:
    """Have Inductor lay out the operands of our convolution channels-last, as it does with PyTorch's.

    Were it written in the graph, what the caller gets would be laid out so as well.
    """
    from torch._inductor import ir, lowering  # takes a second

    def channels_last(node: fx.Node, x: Any, weight: Any, *geometry: Any) -> Any:
        lay_out = ir.ExternKernel.require_channels_last
        return (lay_out(x), lay_out(weight), *geometry), {}

    lowering.make_fallback(ops.convolution, channels_last)


def _may_be_a_product(node: fx.Node) -> bool:
    x, weight, bias, _, _, dilation, transposed, _, groups = node.args
    if bias is not None or transposed or groups != 1 or any(step != 1 for step in dilation):  # type: ignore[union-attr]
        return False
    operands = value(x), value(weight), value(node)
    if value(x).device.type != "cpu" or not all(is_image(operand) for operand in operands):
        return False
    images, _, height, width = value(node).shape
    return is_worth_a_product(images * height * width, value(weight))
