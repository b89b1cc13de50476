"""Bring the captured graph into one form, without changing a single number.

Before::

    a = view(x, [8, 16]); b = view(a, [2, 4, 16]); c = permute(w, [1, 0]); d = permute(c, [1, 0])
    e = alias(y); f = view(z, z.shape)

After::

    b = view(x, [2, 4, 16]); d = w; e = y; f = z
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from passes.base import Pass
from passes.graph import (
    VIEWS,
    aten,
    calls,
    convert,
    dtype,
    emit,
    escapes,
    is_call,
    is_view,
    replace_inner_uses,
    same_shape,
    value,
)

_NAMES_OF_SAME_TENSOR = (aten.alias.default, aten.detach.default)


@dataclass(frozen=True, repr=False)
class Canonicalize(Pass):
    """Drop operators that do nothing, and merge chains of views, permutations and equal casts."""

    def __call__(self, graph: fx.Graph) -> int:
        rewrites: tuple[tuple[tuple[object, ...], Callable[[fx.Node], fx.Node | None]], ...] = (
            (_NAMES_OF_SAME_TENSOR, _source_of_alias),
            ((aten.permute.default,), _merged_permute),
            (VIEWS, _merged_view),
            ((aten.expand.default,), _source_if_same_shape),
            ((convert,), _source_if_same_dtype),
        )
        fired = 0
        for targets, simplify in rewrites:
            for node in calls(graph, *targets):
                simpler = simplify(node)
                if simpler is not None and replace_inner_uses(node, simpler):
                    fired += 1
        graph.eliminate_dead_code()
        return fired


def _source_of_alias(node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    return source if isinstance(source, fx.Node) and dtype(source) == dtype(node) else None


def _merged_permute(node: fx.Node) -> fx.Node | None:
    source, outer = node.args[:2]
    assert isinstance(source, fx.Node)
    rank = len(outer)  # type: ignore[arg-type]
    order = [axis % rank for axis in outer]  # type: ignore[operator, union-attr]
    if order == list(range(rank)):
        return source
    if not is_call(source, aten.permute.default):
        return None
    inner = [axis % rank for axis in source.args[1]]  # type: ignore[operator, union-attr]
    merged = [inner[axis] for axis in order]  # type: ignore[index]
    origin = source.args[0]
    assert isinstance(origin, fx.Node)
    if merged == list(range(rank)):
        return origin
    with node.graph.inserting_before(node):
        return emit(node, aten.permute.default, origin, merged)


def _merged_view(node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if same_shape(source, node):
        return source
    if not is_view(source):
        return None
    origin = source.args[0]
    assert isinstance(origin, fx.Node)
    if same_shape(origin, node):
        return origin
    if not value(origin).is_contiguous():
        return None  # a view of a view that was possible may be impossible in one step
    with node.graph.inserting_before(node):
        return emit(node, node.target, origin, node.args[1])  # type: ignore[arg-type]


def _source_if_same_shape(node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    return source if isinstance(source, fx.Node) and same_shape(source, node) else None


def _source_if_same_dtype(node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    if escapes(node):
        return None  # the caller was promised a copy
    return source if isinstance(source, fx.Node) and dtype(source) == dtype(node) else None
