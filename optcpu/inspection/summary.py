"""What the inspected graphs add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import passes as p
from optcpu.inspection.model import GraphReport, Node, PassReport, Stage
from optcpu.inspection.read import operator_name
from passes import ops
from passes.indices import checked_index

GRAPHS = ("joint", "forward", "backward", "inference")

IN_POLICY = frozenset(operator_name(rule.target) for rule in p.POLICY)
# Where data is only moved, the precision is that of what is moved.
_MOVES = frozenset(
    f"aten.{name}"
    for name in [
        "view",
        "reshape",
        "_unsafe_view",
        "permute",
        "transpose.int",
        "t",
        "expand",
        "unsqueeze",
        "squeeze",
        "squeeze.dim",
        "squeeze.dims",
        "slice.Tensor",
        "select.int",
        "clone",
        "copy",
        "copy_",
        "alias",
        "detach",
        "cat",
        "split.Tensor",
        "split_with_sizes",
        "as_strided",
        "empty.memory_format",
        "full",
        "full_like",
        "constant_pad_nd",
        "slice_scatter",
        "select_scatter",
        "lift_fresh_copy",
    ]
)
_FUSED = ("optcpu.", "mkldnn.")
_NOT_FUSED = operator_name(checked_index)


@dataclass(frozen=True)
class PassTotal:
    """One pass over all graphs.

    Attributes:
        name: the pass's name.
        changes_numerics: whether it may change results beyond reordering of exact operations.
        fired: how often, by the kind of the graph; only the kinds that it ran over.
        gone, come: nodes by operator, added up over the graphs.
        casts_inserted, casts_cancelled: casts by direction, added up over the graphs.
        errors: why it failed, each reason once.
    """

    name: str
    changes_numerics: bool
    fired: dict[str, int]
    gone: Counter[str]
    come: Counter[str]
    casts_inserted: Counter[str]
    casts_cancelled: Counter[str]
    errors: tuple[str, ...]

    @property
    def total(self) -> int:
        """How often it fired in all."""
        return sum(self.fired.values())


@dataclass(frozen=True)
class Fused:
    """Fused operators of one kind, in one kind of graph."""

    operator: str
    detail: str  # the activation, where there is one
    graph: str
    times: int


@dataclass(frozen=True)
class StaysWide:
    """Operators that compute in FP32.

    Attributes:
        reason: why.
        operators: how often each is there.
    """

    reason: str
    operators: Counter[str]


def totals(graphs: Sequence[GraphReport]) -> list[PassTotal]:
    """Every pass, in the order of the first graph of its stage."""
    runs: dict[str, list[tuple[str, PassReport]]] = {}
    for graph in sorted(graphs, key=lambda graph: GRAPHS.index(graph.kind)):
        for run in graph.passes:
            runs.setdefault(run.name, []).append((graph.kind, run))
    return [_total(name, ran) for name, ran in runs.items()]


def _total(name: str, ran: list[tuple[str, PassReport]]) -> PassTotal:
    fired: dict[str, int] = {}
    for kind, run in ran:
        fired[kind] = fired.get(kind, 0) + run.fired
    return PassTotal(
        name,
        ran[0][1].changes_numerics,
        fired,
        gone=_sum(run.gone for _, run in ran),
        come=_sum(run.come for _, run in ran),
        casts_inserted=_sum(run.casts_inserted for _, run in ran),
        casts_cancelled=_sum(run.casts_cancelled for _, run in ran),
        errors=tuple(dict.fromkeys(run.error for _, run in ran if run.error is not None)),
    )


def _sum(counters: Iterable[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for counter in counters:
        total += counter
    return total


def finals(graphs: Sequence[GraphReport]) -> list[tuple[str, Stage]]:
    """The graphs that code is generated from, each with its kind."""
    return [(graph.kind, graph.final) for graph in graphs if graph.kind != "joint"]


def casts_left(graphs: Sequence[GraphReport]) -> dict[str, Counter[str]]:
    """Casts in the final graphs, by direction, for each kind of graph."""
    left: dict[str, Counter[str]] = {}
    for kind, stage in finals(graphs):
        left[kind] = left.get(kind, Counter()) + stage.casts
    return left


def fused(graphs: Sequence[GraphReport]) -> list[Fused]:
    """Fused operators in the final graphs."""
    found: Counter[tuple[str, str, str]] = Counter()
    for kind, stage in finals(graphs):
        for node in stage.nodes:
            if node.operator.startswith(_FUSED) and node.operator != _NOT_FUSED:
                found[node.operator, _activation(node), kind] += 1
    return [Fused(operator, detail, kind, n) for (operator, detail, kind), n in found.items()]


def _activation(node: Node) -> str:
    named = [name for name in ops.ACTIVATIONS if f"'{name}'" in node.arguments.split(", ")]
    return named[0] if named else ""


def stays_wide(
    graphs: Sequence[GraphReport], precision: str, pass_names: Sequence[str]
) -> list[StaysWide]:
    """What computes in FP32 in the final graphs, and why it is not moved to BF16."""
    reasons: dict[str, Counter[str]] = {}
    for _, stage in finals(graphs):
        for node in stage.nodes:
            if _is_wide(node):
                reason = _reason(node, graphs, precision, pass_names)
                reasons.setdefault(reason, Counter())[node.operator] += 1
    return [StaysWide(reason, operators) for reason, operators in reasons.items()]


def _is_wide(node: Node) -> bool:
    if node.operator in ("input", "return", "attribute", "getitem") or node.is_cast:
        return False
    if node.operator in _MOVES or not node.values:
        return False
    return node.values[0].dtype == "f32" and node.values[0].shape is not None


def _reason(
    node: Node, graphs: Sequence[GraphReport], precision: str, pass_names: Sequence[str]
) -> str:
    if precision == "fp32":
        return "precision is fp32"
    is_product = node.operator in IN_POLICY or node.operator.startswith(_FUSED)
    if not is_product:
        return "not in the policy"
    if "insert-casts" not in pass_names:
        return "the pass insert-casts is not in the list"
    errors = [r.error for g in graphs for r in g.passes if r.name == "insert-casts" and r.error]
    return f"insert-casts failed: {errors[0]}" if errors else "declined by insert-casts"
