"""Fewer casts: move them to where they meet, cancel the pairs, share the rest.

All rewrites here keep every number: a BF16 value is exact in FP32, so an operator that only selects,
moves or compares values gives the same result in BF16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from passes.base import Pass
from passes.graph import (
    VIEWS,
    aten,
    calls,
    cast,
    convert,
    dtype,
    emit,
    escapes,
    is_call,
    is_cast,
    replace_inner_uses,
    value,
)

# Operators whose result is one of their input's values, untouched, in another place or shape.
_RESHAPES = (
    *VIEWS,
    aten.permute.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
_SELECTIONS = (
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.clone.default,
    aten.relu.default,
    aten.neg.default,
)
_EXACT_IN_BF16 = (*_RESHAPES, *_SELECTIONS)
_COMPARISONS_WITH_SCALAR = (
    aten.le.Scalar,
    aten.lt.Scalar,
    aten.ge.Scalar,
    aten.gt.Scalar,
    aten.eq.Scalar,
    aten.ne.Scalar,
)
# Scalars that BF16 holds exactly, so that comparing with them needs no FP32.
_EXACT_SCALARS = (-1, 0, 1)


@dataclass(frozen=True, repr=False)
class SinkUpcasts(Pass):
    """Move casts from BF16 to FP32 behind operators that are exact in BF16.

    Before::

        z = relu(f32(y)); keep = le(f32(y), 0); g = threshold_backward(f32(d), f32(y), 0)

    After::

        z = f32(relu(y)); keep = le(y, 0); g = f32(threshold_backward(d, y, 0))

    The intermediate results then take half the memory, and a cast back to BF16 behind them cancels.
    Fires once for each operator moved.
    """

    def __call__(self, graph: fx.Graph) -> int:
        fired = 0
        for node in list(graph.nodes):
            moved = _in_bf16(node)
            if moved is None:
                continue
            with graph.inserting_before(node):
                args = [_source(arg) if i in moved else arg for i, arg in enumerate(node.args)]
                lowered = emit(node, node.target, *args, **node.kwargs)
                result = lowered
                if dtype(lowered) != dtype(node):
                    result = cast(node, lowered, torch.float32)
            node.replace_all_uses_with(result)
            fired += 1
        graph.eliminate_dead_code()
        return fired


def _in_bf16(node: fx.Node) -> tuple[int, ...] | None:
    """The positions of the upcast arguments if ``node`` can take them in BF16, else None."""
    if is_call(node, *_EXACT_IN_BF16):
        return (0,) if _is_upcast(node.args[0]) else None
    if is_call(node, *_COMPARISONS_WITH_SCALAR):
        exact: Any = _is_upcast(node.args[0]) and node.args[1] in _EXACT_SCALARS
        return (0,) if exact else None
    if is_call(node, aten.threshold_backward.default):
        exact = _is_upcast(node.args[0]) and _is_upcast(node.args[1]) and node.args[2] == 0
        return (0, 1) if exact else None
    return None


def _is_upcast(node: Any) -> bool:
    return is_cast(node) and dtype(node) == torch.float32 and dtype(node.args[0]) == torch.bfloat16


def _source(node: Any) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


@dataclass(frozen=True, repr=False)
class HoistDowncasts(Pass):
    """Move casts from FP32 to BF16 in front of reshapes, towards the tensor they convert.

    Before::

        a = bf16(permute(w, [1, 0])); b = bf16(w)

    After::

        w_bf16 = bf16(w); a = permute(w_bf16, [1, 0]); b = bf16(w)

    so that :class:`CancelCasts` finds that forward and backward convert the same weight.
    """

    def __call__(self, graph: fx.Graph) -> int:
        fired = 0
        for node in reversed(list(calls(graph, convert))):
            while _is_downcast(node) and is_call(node.args[0], *_RESHAPES):
                reshape = _source(node)
                with graph.inserting_before(node):
                    lowered = cast(node, _source(reshape), torch.bfloat16)
                    moved = emit(reshape, reshape.target, lowered, *reshape.args[1:])  # type: ignore[arg-type]
                node.replace_all_uses_with(moved)
                graph.erase_node(node)
                node = lowered
                fired += 1
        graph.eliminate_dead_code()
        return fired


def _is_downcast(node: fx.Node) -> bool:
    return is_cast(node) and dtype(node) == torch.bfloat16 and dtype(node.args[0]) == torch.float32


@dataclass(frozen=True, repr=False)
class CancelCasts(Pass):
    """Drop a cast that undoes another one, and compute equal casts once.

    Before::

        b = bf16(f32(a_bf16)); c = bf16(w); d = bf16(w)

    After::

        b = a_bf16; c = bf16(w); d = c
    """

    def __call__(self, graph: fx.Graph) -> int:
        fired = 0
        first: dict[tuple[fx.Node, Any], fx.Node] = {}
        for node in calls(graph, convert):
            source = _source(node)
            if _is_upcast(source) and dtype(node) == torch.bfloat16 and not escapes(node):
                fired += replace_inner_uses(node, _source(source))
                continue
            same = first.setdefault((source, node.args[1]), node)
            if same is not node and not (escapes(node) and escapes(same)):
                fired += replace_inner_uses(node, same)
        graph.eliminate_dead_code()
        return fired


@dataclass(frozen=True, repr=False)
class ShareWeightCasts(Pass):
    """Keep the BF16 copy of a graph input from the forward for the backward.

    Left alone, the partitioner converts the weights again in the backward, which costs 6 bytes of
    traffic a parameter to save 2 bytes of memory. Fires once for each copy that is kept.
    """

    def __call__(self, graph: fx.Graph) -> int:
        inputs = graph.find_nodes(op="placeholder")
        kept = [node for node in inputs if not str(node.target).startswith("tangents")]
        if len(kept) == len(inputs):
            return 0  # an inference graph: there is no backward to share with
        fired = 0
        for node in calls(graph, convert):
            if _is_downcast(node) and _source(node) in kept and len(node.users) > 1:
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
                fired += 1
        return fired


def cast_counts(graph: fx.Graph) -> dict[str, int]:
    """How many casts the graph holds: ``{"to bf16": …, "to fp32": …}``."""
    counts = {"to bf16": 0, "to fp32": 0}
    for node in calls(graph, convert):
        if isinstance(value(node), torch.Tensor) and value(node).dtype == torch.bfloat16:
            counts["to bf16"] += 1
        elif dtype(node) == torch.float32:
            counts["to fp32"] += 1
    return counts
