"""Cross entropy over large vocabularies, in pieces: the logits of all rows are never in memory at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.base import Pass
from passes.graph import aten, calls, cast, dtype, emit, is_call, only_user, value

_ROWS, _CLASSES = 0, 1


@dataclass(frozen=True, repr=False)
class ChunkCrossEntropy(Pass):
    """Compute a linear layer and the cross entropy behind it for some rows after the others.

    Before (N rows of width K, V classes)::

        l = mm(x, permute(w)); y = log_softmax(l); loss = mean(-gather(y, t))
        dl = dloss / N * (exp(y) - one_hot(t)); dx = mm(dl, w); dw = mm(permute(dl), x)

    After, for each piece of rows::

        l = mm(x[rows], permute(w)); y[rows] = gather(log_softmax(l), t[rows])
        d = softmax(l) - one_hot(t[rows]); dx[rows] = mm(d, w); dw += mm(permute(d), x[rows])

    and behind them ``loss = mean(-y)``, ``dx *= dloss / N``, ``dw *= dloss / N``. The gradients need
    nothing from above but a factor, so that they can be computed while a piece is there; no product is
    computed twice. What is kept between forward and backward is dx and dw in place of N x V logits.

    Left alone are logits that something else uses (the model's output, say), class weights, label
    smoothing, symbolic sizes, and what takes less memory than ``largest_logits``. Fires once for each
    cross entropy.

    Source: Hsu et al., "Liger Kernel" (arXiv 2410.10989), FusedLinearCrossEntropy.

    Args:
        largest_logits: of one piece in FP32, in bytes.
    """

    largest_logits: int = 256 * 2**20

    def __call__(self, graph: fx.Graph) -> int:
        fired = 0
        for node in calls(graph, aten.gather.default):
            found = _match(node)
            if found is None:
                continue
            rows, classes = value(found.logits).shape
            pieces = _pieces(rows, math.ceil(4 * rows * classes / self.largest_logits))
            if len(pieces) > 1:
                _rewrite(found, pieces)
                graph.eliminate_dead_code()
                fired += 1
        return fired


@dataclass(frozen=True)
class _Gradient:
    """The backward of a cross entropy: ``factor * where(counts, softmax - one_hot(target), 0)``.

    Attributes:
        logits: the gradient of the logits.
        target: int64, shape (N, 1).
        counts: bool, shape (N, 1): which rows the loss counts.
        factor: a tensor without dimensions.
        users: what is computed of it, each in a way that can be done in pieces.
    """

    logits: fx.Node
    target: fx.Node
    counts: fx.Node
    factor: fx.Node
    users: list[fx.Node]


@dataclass(frozen=True)
class _CrossEntropy:
    """A linear layer with a cross entropy behind it.

    Attributes:
        logits: ``mm`` or ``addmm``, shape (N, V).
        picked: the logarithms of the probabilities of the targets, shape (N, 1).
        gradient: None where there is no backward.
    """

    logits: fx.Node
    picked: fx.Node
    gradient: _Gradient | None


def _match(picked: fx.Node) -> _CrossEntropy | None:
    """The cross entropy whose ``gather`` this is; None if it is another."""
    log_softmax = picked.args[0]
    if not is_call(log_softmax, aten.sub.Tensor) or picked.args[1] not in (1, -1):
        return None
    assert isinstance(log_softmax, fx.Node)
    centered, log_sum = log_softmax.args
    exp = _argument(_argument(log_sum, aten.log.default), aten.sum.dim_IntList)
    if not is_call(centered, aten.sub.Tensor) or _argument(exp, aten.exp.default) is not centered:
        return None
    assert isinstance(centered, fx.Node)
    logits, largest = centered.args
    if not is_call(logits, aten.mm.default, aten.addmm.default) or logits is not _argument(
        largest, aten.amax.default
    ):
        return None
    assert isinstance(logits, fx.Node)
    assert isinstance(exp, fx.Node)
    plain = not logits.kwargs and all(isinstance(s, int) for s in value(logits).shape)
    plain = plain and (is_call(logits, aten.mm.default) or value(logits.args[0]).dim() == 1)
    inner = {logits: {largest, centered}, centered: {exp, log_softmax}, exp: {only_user(exp)}}
    backward = [user for user in log_softmax.users if user is not picked]
    if (
        not plain
        or dtype(logits) != torch.float32
        or list(value(picked).shape) != [value(logits).shape[_ROWS], 1]
        or any(set(node.users) != users for node, users in inner.items())
        or len(backward) > 1
    ):
        return None
    if not backward:
        return _CrossEntropy(logits, picked, None)
    gradient = _match_gradient(backward[0])
    return None if gradient is None else _CrossEntropy(logits, picked, gradient)


def _match_gradient(softmax: fx.Node) -> _Gradient | None:
    """What autograd makes of ``nll_loss(log_softmax(...))``, if ``softmax`` is in it.

    ``g - softmax * sum(g)``, where ``g = scatter(0, target, -1) * where(counts, factor, 0)``.
    """
    product = only_user(softmax)
    if not is_call(softmax, aten.exp.default) or not is_call(product, aten.mul.Tensor):
        return None
    total = product.args[1]
    at_target = _argument(total, aten.sum.dim_IntList)
    result = only_user(product)
    if (
        product.args[0] is not softmax
        or not is_call(at_target, aten.mul.Tensor)
        or not is_call(result, aten.sub.Tensor)
        or result.args != (at_target, product)
        or set(at_target.users) != {total, result}
    ):
        return None
    scatter, scale = at_target.args
    if not is_call(scatter, aten.scatter.value) or not is_call(scale, aten.where.self):
        return None
    zeros, axis, target, minus_one = scatter.args
    counts, factor, zero = scale.args
    users = _users_by_rows(result)
    if (
        _number(zeros) != 0
        or _number(zero) != 0
        or (axis, minus_one) != (_CLASSES, -1.0)
        or value(factor).dim() != 0
        or list(value(counts).shape) != list(value(target).shape)
        or users is None
    ):
        return None
    return _Gradient(result, target, counts, factor, users)


def _users_by_rows(gradient: fx.Node) -> list[fx.Node] | None:
    """What uses the gradient of the logits; None if one of them needs all rows at once."""
    users: list[fx.Node] = []
    for user in gradient.users:
        if is_call(user, aten.permute.default) and user.args[1] == [1, 0]:
            products = list(user.users)
            if not all(is_call(p, aten.mm.default) and p.args[0] is user for p in products):
                return None
            users += products
        elif is_call(user, aten.mm.default) or _sums_rows(user):
            users.append(user)
        else:
            return None
    return users if len(set(users)) == len(users) else None


def _sums_rows(node: fx.Node) -> bool:
    return is_call(node, aten.sum.dim_IntList) and node.args[1] == [_ROWS]


def _pieces(rows: int, least: int) -> list[tuple[int, int]]:
    """``least`` pieces of the rows or a few more, so that all are equal if possible."""
    count = next((n for n in range(least, 2 * least) if rows % n == 0), least)
    size = math.ceil(rows / count)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _rewrite(found: _CrossEntropy, pieces: list[tuple[int, int]]) -> None:
    graph, gradient = found.picked.graph, found.gradient
    if gradient is not None:
        _move_before(found.picked, gradient.target, gradient.counts)
    picked: list[fx.Node] = []
    results: dict[fx.Node, list[fx.Node]] = {}
    with graph.inserting_before(found.picked):
        for start, end in pieces:
            forward = _Piece(found, start, end)
            picked.append(forward.picked())
            if gradient is not None:
                of_logits = forward.gradient(gradient)
                for user in gradient.users:
                    results.setdefault(user, []).append(forward.user(user, of_logits, gradient))
        found.picked.replace_all_uses_with(emit(found.picked, aten.cat.default, picked))
    for user, parts in results.items():
        assert gradient is not None
        with graph.inserting_before(user):
            whole = _whole(user, parts, gradient)
            user.replace_all_uses_with(emit(user, aten.mul.Tensor, whole, gradient.factor))


def _move_before(place: fx.Node, *nodes: fx.Node) -> None:
    """Compute ``nodes`` and what they need ahead of ``place``, so that a piece is done with in one go."""
    needed, to_visit = set(), list(nodes)
    while to_visit:
        node = to_visit.pop()
        if place < node and node not in needed:
            needed.add(node)
            to_visit.extend(node.all_input_nodes)
    for node in [node for node in place.graph.nodes if node in needed]:
        place.prepend(node)


class _Piece:
    """The nodes of some rows, emitted at the graph's insertion point."""

    def __init__(self, found: _CrossEntropy, start: int, end: int) -> None:
        self._origin, self._start, self._end = found.picked, start, end
        *bias, x, weight = found.logits.args
        assert isinstance(x, fx.Node)
        logits = self._emit(found.logits.target, *bias, self._rows(x), weight)  # type: ignore[arg-type]
        largest = self._emit(aten.amax.default, logits, [_CLASSES], True)
        self._centered = self._emit(aten.sub.Tensor, logits, largest)
        self._exp = self._emit(aten.exp.default, self._centered)
        self._sum = self._emit(aten.sum.dim_IntList, self._exp, [_CLASSES], True)

    def picked(self) -> fx.Node:
        """The logarithms of the probabilities of the targets."""
        index = self._rows(self._origin.args[2])
        centered = self._emit(aten.gather.default, self._centered, _CLASSES, index)
        return self._emit(aten.sub.Tensor, centered, self._emit(aten.log.default, self._sum))

    def gradient(self, of: _Gradient) -> fx.Node:
        """Of the logits, without the factor."""
        probabilities = self._emit(aten.div.Tensor, self._exp, self._sum)
        classes = self._emit(
            torch.ops.prims.iota.default,
            value(probabilities).shape[_CLASSES],
            start=0,
            step=1,
            dtype=torch.int64,
            device=torch.device("cpu"),
            requires_grad=False,
        )
        hit = self._emit(aten.eq.Tensor, self._rows(of.target), classes)
        one_hot = cast(self._origin, hit, torch.float32)
        difference = self._emit(aten.sub.Tensor, probabilities, one_hot)
        zero = self._emit(
            aten.full.default, [], 0.0, dtype=torch.float32, device=torch.device("cpu")
        )
        return self._emit(aten.where.self, self._rows(of.counts), difference, zero)

    def user(self, user: fx.Node, of_logits: fx.Node, gradient: _Gradient) -> fx.Node:
        """What ``user`` computes of the gradient, of these rows."""
        if is_call(user, aten.sum.dim_IntList):
            return self._emit(user.target, of_logits, *user.args[1:], **user.kwargs)  # type: ignore[arg-type]
        first, second = user.args
        assert isinstance(first, fx.Node)
        assert isinstance(second, fx.Node)
        if first is gradient.logits:
            return self._emit(aten.mm.default, of_logits, second)
        if second is gradient.logits:
            return self._emit(aten.mm.default, self._rows(first, axis=1), of_logits)
        turned = self._emit(aten.permute.default, of_logits, [1, 0])
        return self._emit(aten.mm.default, turned, self._rows(second))

    def _rows(self, tensor: Any, axis: int = 0) -> fx.Node:
        return self._emit(aten.slice.Tensor, tensor, axis, self._start, self._end)

    def _emit(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return emit(self._origin, target, *args, **kwargs)


def _whole(user: fx.Node, parts: list[fx.Node], gradient: _Gradient) -> fx.Node:
    """The result of ``user`` from those of the pieces."""
    if user.args[0] is gradient.logits and is_call(user, aten.mm.default):
        return emit(user, aten.cat.default, parts)
    total = parts[0]
    for part in parts[1:]:
        total = emit(user, aten.add.Tensor, total, part)
    return total


def _argument(node: Any, target: Any) -> Any:
    """What ``node`` applies ``target`` to, over the classes if it is a reduction; else None."""
    if not is_call(node, target):
        return None
    if target in (aten.amax.default, aten.sum.dim_IntList):
        over = [axis % value(node.args[0]).dim() for axis in node.args[1]]
        if over != [_CLASSES] or node.args[2:] != (True,):
            return None
    return node.args[0]


def _number(node: Any) -> Any:
    """What all elements of a constant are; None if ``node`` is no constant."""
    if is_call(node, aten.full.default):
        return node.args[1]
    return node.args[0] if is_call(node, aten.scalar_tensor.default) else None


__all__ = ["ChunkCrossEntropy"]
