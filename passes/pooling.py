"""Max-pooling: on as few elements as possible, and backward by a kernel that knows the windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from passes import ops
from passes.base import Pass, Stage
from passes.graph import (
    aten,
    calls,
    cast,
    dtype,
    emit,
    fill_value,
    is_call,
    is_rounding,
    sizes,
    value,
)
from passes.layout import (
    has_convolution,
    is_image,
    is_seen_by_caller,
    written_channels_last,
)

MAX_POOLS = (
    aten.max_pool2d_with_indices.default,
    torch.ops.prims._low_memory_max_pool_with_offsets.default,
)
_iota = torch.ops.prims.iota.default
_indices_of_offsets = torch.ops.prims._low_memory_max_pool_offsets_to_indices.default
MAX_POOL_BACKWARD = aten.max_pool2d_with_indices_backward.default


@dataclass(frozen=True, repr=False)
class PoolBeforeRelu(Pass):
    """Take the ReLU of a max-pool's result rather than of its input, which is several times larger.

    Before::

        y = relu(x); p, where = max_pool(y); ...; dy = max_pool_backward(dp, y, where)
        dx = threshold_backward(dy, y, 0)

    After::

        m, where = max_pool(x); p = relu(m); ...; dm = threshold_backward(dp, p, 0)
        dx = max_pool_backward(dm, x, where)

    The same numbers, as ReLU keeps the order, NaN included. Where no element of a window is positive,
    another one may count as the largest, but none of them gets a gradient. The backward no longer needs
    ``y``. Fires once for each pool whose input nothing else reads.
    """

    def __call__(self, graph: fx.Graph) -> int:
        return sum(_swap(pool) for pool in calls(graph, *MAX_POOLS))


def _swap(pool: fx.Node) -> bool:
    """Rewrite one pool; whether that was possible."""
    relu = pool.args[0]
    if not is_call(relu, aten.relu.default):
        return False
    assert isinstance(relu, fx.Node)
    backward = [user for user in relu.users if is_call(user, MAX_POOL_BACKWARD)]
    thresholds = [user for user in relu.users if is_call(user, aten.threshold_backward.default)]
    results = [item for item in pool.users if item.args[1] == 0]
    if len(results) != 1 or len(relu.users) != 1 + len(backward) + len(thresholds):
        return False
    if not _is_backward_of_both(backward, thresholds) or _places_are_read(pool):
        return False
    (result,), source, graph = results, relu.args[0], pool.graph
    pool.update_arg(0, source)
    with graph.inserting_after(result):
        after = emit(relu, aten.relu.default, result)
    result.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
    for node, threshold in zip(backward, thresholds, strict=True):
        with graph.inserting_before(node):
            kept = emit(threshold, aten.threshold_backward.default, node.args[0], after, 0)
        node.update_arg(0, kept)
        node.update_arg(1, source)
        threshold.replace_all_uses_with(node)
        graph.erase_node(threshold)
    graph.erase_node(relu)
    return True


def _places_are_read(pool: fx.Node) -> bool:
    """Whether anything but the pool's backward wants to know where the largest elements are."""
    places = [item for item in pool.users if item.args[1] == 1]
    readers = [reader for place in places for reader in place.users]
    readers += [last for r in readers if is_call(r, _indices_of_offsets) for last in r.users]
    known = (MAX_POOL_BACKWARD, _indices_of_offsets)
    return not all(is_call(reader, *known) for reader in readers)


def _is_backward_of_both(backward: list[fx.Node], thresholds: list[fx.Node]) -> bool:
    """Whether these are no nodes at all, or a pool's backward and the ReLU's of its result alone."""
    if len(backward) != len(thresholds) or len(backward) > 1:
        return False
    return all(
        pooled.users.keys() == {threshold}
        and threshold.args[0] is pooled
        and threshold.args[2] == 0
        for pooled, threshold in zip(backward, thresholds, strict=True)
    )


@dataclass(frozen=True, repr=False)
class MaxPoolInBf16(Pass):
    """Round to BF16 in front of a max-pool rather than behind it, if its result is rounded anyway.

    Before::

        m, where = max_pool(x); h = convolution(bf16(relu(m)), w)

    After::

        m, where = max_pool(bf16(x)); h = convolution(relu(m), w)

    so that what the pool reads takes half the memory. The result stays the same, as rounding keeps the
    order; but elements that are equal once rounded are told apart by their place, as under autocast.
    There need not be a ReLU. Fires once for each pool.
    """

    changes_numerics: ClassVar[bool] = True

    def __call__(self, graph: fx.Graph) -> int:
        return sum(_round_first(pool) for pool in calls(graph, *MAX_POOLS))


def _round_first(pool: fx.Node) -> bool:
    source, result, graph = pool.args[0], _result_of(pool), pool.graph
    if dtype(source) != torch.float32 or result is None:
        return False
    assert isinstance(source, fx.Node)
    backward = [user for user in result.users if _is_backward_of_relu(user, result)]
    readers = [user for user in result.users if user not in backward]
    if not readers or not all(map(is_rounding, readers)) or _places_are_read(pool):
        return False
    with graph.inserting_before(pool):
        narrow = cast(pool, source, torch.bfloat16)
    pool.update_arg(0, narrow)
    for changed in dict.fromkeys((pool, *pool.users, result)):
        fill_value(changed)
    for node in calls(graph, MAX_POOL_BACKWARD):
        if node.args[1] is source:  # of which it wants the shape
            with graph.inserting_before(node):
                node.update_arg(1, cast(node, narrow, torch.float32))
    for node in backward:
        with graph.inserting_before(node):
            node.update_arg(1, cast(node, result, torch.float32))
    for rounded in readers:
        rounded.replace_all_uses_with(result)
        graph.erase_node(rounded)
    return True


def _result_of(pool: fx.Node) -> fx.Node | None:
    """What a pool computes, or the ReLU of it where nothing else reads it; None if nobody does."""
    results = [item for item in pool.users if item.args[1] == 0]
    if len(results) != 1:
        return None
    (result,) = results
    reader = next(iter(result.users), None)
    alone = len(result.users) == 1 and is_call(reader, aten.relu.default)
    return reader if alone else result


def _is_backward_of_relu(node: fx.Node, output: fx.Node) -> bool:
    is_backward = is_call(node, aten.threshold_backward.default)
    return is_backward and node.args[1] is output and node.args[0] is not output


@dataclass(frozen=True, repr=False)
class PoolChannelsLast(Pass):
    """Write the results of max-pools channels-last, as the convolutions in front of them are laid out.

    Inductor lays out what convolutions read and write channels-last, but what comes behind the last one
    in a graph is contiguous: a pool there would read one number per cache line.

    Before::

        m, where = max_pool(convolution(x, w)); ... m, where

    After::

        m, where = max_pool(convolution(x, w)); ... channels_last(m), channels_last(where)

    Fires once for each result whose strides no output for the caller depends on. No code is generated for
    it: the order of writing changes.
    """

    stage: ClassVar[Stage] = "split"

    def __call__(self, graph: fx.Graph) -> int:
        if not has_convolution(graph):
            return 0
        return sum(_lay_out(item) for pool in calls(graph, *MAX_POOLS) for item in list(pool.users))


def _lay_out(node: fx.Node) -> bool:
    """Let what reads one result of a max-pool read it channels-last; whether that can be."""
    if not is_image(value(node)) or is_seen_by_caller(node):
        return False
    with node.graph.inserting_after(node):
        laid_out = written_channels_last(node, node)
    node.replace_all_uses_with(laid_out, delete_user_cb=lambda user: user is not laid_out)
    return True


@dataclass(frozen=True, repr=False)
class PoolBackwardBySize(Pass):
    """Give the backward of a max-pool the size of its input, so that the input need not be kept for it.

    Before::

        dx = max_pool_backward(dp, x, ..., where)

    After::

        dx = optcpu.max_pool_backward(dp, [size of x], ..., where)

    Fires once for each pool.
    """

    def __call__(self, graph: fx.Graph) -> int:
        fired = 0
        for node in calls(graph, MAX_POOL_BACKWARD):
            gradient, source, *rest = node.args
            assert isinstance(source, fx.Node)
            with graph.inserting_before(node):
                by_size = emit(node, ops.max_pool_backward, gradient, sizes(source), *rest)
            node.replace_all_uses_with(by_size)
            graph.erase_node(node)
            fired += 1
        return fired


def expand_backward(graph: fx.Graph) -> int:
    """Write the backward of max-pools in the form that runs fastest; return how many there were.

    Where windows do not overlap, each element gets its window's gradient or none::

        dx = reshape(where(offsets == place in the window, dp, 0))

    which generated code fuses with its neighbours. Elsewhere PyTorch's own kernel is called: generated code
    adds each gradient to a place that it reads from memory (PyTorch 2.13), or looks at every window that
    may hold an element (2.8), which took 2 and 7 times as long.
    """
    PoolBackwardBySize()(graph)
    channels_last = has_convolution(graph)
    fired = 0
    for node in calls(graph, ops.max_pool_backward):
        fired += 1
        if not is_call(node.args[-1], _indices_of_offsets):
            continue
        with graph.inserting_before(node):
            if not _has_known_sizes(node):
                inside = emit(
                    node, aten.maximum.default, node.args[-1], _scalar(node, 0, torch.int64)
                )
                node.update_arg(len(node.args) - 1, inside)
            elif _is_tiling(node):
                image = channels_last and is_image(value(node)) and not is_seen_by_caller(node)
                node.replace_all_uses_with(_select(node, image))
                graph.erase_node(node)
            else:
                node.update_arg(len(node.args) - 1, _indices_inside(node))
    graph.eliminate_dead_code()
    return fired


def _has_known_sizes(node: fx.Node) -> bool:
    """Whether the images are of known size, and no larger than what FP32 can count."""
    height, width = value(node).shape[-2:]
    return isinstance(height, int) and isinstance(width, int) and height * width < 2**24


def _is_tiling(node: fx.Node) -> bool:
    """Whether each element of the pool's input is in one window at most."""
    _, _, kernel, stride, padding, dilation, *_ = node.args
    return (
        _pair(stride or kernel) == _pair(kernel)
        and _pair(padding) == (0, 0)
        and _pair(dilation) == (1, 1)
    )


def _pair(sides: Any) -> tuple[int, int]:
    """Height and width, which may be written as one number."""
    height, width = [*sides, *sides][:2]
    return height, width


def _select(node: fx.Node, channels_last: bool) -> fx.Node:
    gradient, _, kernel, *_, indices = node.args
    assert isinstance(gradient, fx.Node)
    assert isinstance(indices, fx.Node)
    height, width = _pair(kernel)
    (offsets, *_) = indices.args
    assert isinstance(offsets, fx.Node)
    numbers = {"start": 0, "step": 1, "dtype": torch.int32, "device": value(node).device}
    place = emit(node, _iota, height * width, **numbers, requires_grad=False)
    place = emit(node, aten.view.default, cast(node, place, torch.float32), [height, 1, width])
    # Compared as FP32, since converting a mask of bytes took twice as long as all the rest.
    chosen = emit(node, aten.eq.Tensor, cast(node, _spread(node, offsets), torch.float32), place)
    zero = _scalar(node, 0, value(gradient).dtype)
    if channels_last:
        gradient = written_channels_last(node, gradient)
    whole = emit(node, aten.where.self, chosen, _spread(node, gradient), zero)
    *batch, rows, columns = sizes(gradient)
    image = emit(node, aten.reshape.default, whole, [*batch, rows * height, columns * width])
    image = _fit(node, image, value(node).shape[-2:])
    return written_channels_last(node, image) if channels_last else image


def _scalar(node: fx.Node, number: int, of: torch.dtype) -> fx.Node:
    return emit(node, aten.full.default, [], number, dtype=of, device=value(node).device)


def _indices_inside(node: fx.Node) -> fx.Node:
    """What the pool's offsets within windows are as indices into its input; none of them is outside.

    Offsets may point into the padding where all of a window is -inf, and PyTorch's kernel would write
    there. Computed in FP32, which is exact up to 2**24 and several times as fast as integers.
    """
    gradient, _, kernel, stride, padding, dilation, _, indices = node.args
    assert isinstance(indices, fx.Node)
    (offsets, *_) = indices.args
    assert isinstance(offsets, fx.Node)
    device = value(node).device

    def positions(axis: int, offset: fx.Node) -> fx.Node:
        count, last = value(gradient).shape[axis], value(node).shape[axis] - 1
        numbers = {"start": -_pair(padding)[axis], "step": _pair(stride or kernel)[axis]}
        starts = emit(
            node, _iota, count, **numbers, dtype=torch.int32, device=device, requires_grad=False
        )
        starts = cast(node, starts, torch.float32)
        if axis == -2:
            starts = emit(node, aten.unsqueeze.default, starts, -1)
        moved = emit(node, aten.mul.Tensor, offset, float(_pair(dilation)[axis]))
        place = emit(node, aten.add.Tensor, moved, starts)
        place = emit(node, aten.maximum.default, place, _scalar(node, 0, torch.float32))
        return emit(node, aten.minimum.default, place, _scalar(node, last, torch.float32))

    width = float(_pair(kernel)[-1])
    number = cast(node, offsets, torch.float32)
    middle = emit(node, aten.add.Tensor, number, 0.5)
    row = emit(node, aten.floor.default, emit(node, aten.mul.Tensor, middle, 1 / width))
    column = emit(node, aten.sub.Tensor, number, emit(node, aten.mul.Tensor, row, width))
    above = emit(node, aten.mul.Tensor, positions(-2, row), float(value(node).shape[-1]))
    return cast(node, emit(node, aten.add.Tensor, above, positions(-1, column)), torch.int64)


def _spread(node: fx.Node, tensor: fx.Node) -> fx.Node:
    """``[..., rows, columns]`` as ``[..., rows, 1, columns, 1]``."""
    return emit(node, aten.unsqueeze.default, emit(node, aten.unsqueeze.default, tensor, -1), -3)


def _fit(node: fx.Node, image: fx.Node, wanted: Sequence[int]) -> fx.Node:
    """``image`` with zeros where no window was, and without what windows had beyond the edge."""
    missing = [int(want - have) for want, have in zip(wanted, value(image).shape[-2:], strict=True)]
    for axis, count in zip((-2, -1), missing, strict=True):
        if count < 0:
            image = emit(node, aten.slice.Tensor, image, axis, 0, value(image).shape[axis] + count)
    rows, columns = (max(0, count) for count in missing)
    if rows or columns:
        image = emit(node, aten.constant_pad_nd.default, image, [0, columns, 0, rows], 0.0)
    return image
