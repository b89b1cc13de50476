"""An inspection as text: what was captured, what each pass did, and what stayed outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from optcpu import tables
from optcpu.inspection.model import CAST, GraphBreak
from optcpu.inspection.summary import GRAPHS, PassTotal
from optcpu.record import Fallback

if TYPE_CHECKING:
    from optcpu.inspection.result import Inspection

_MOST_OPERATORS = 8
_MOST_CHANGES = 3
_SHORT = {"joint": "joint", "forward": "fwd", "backward": "bwd", "inference": "infer"}


def to_text(inspection: Inspection, width: int | None = None) -> str:
    """The report as plain text, ``width`` columns wide (default: the terminal's)."""
    return tables.to_text(render(inspection), width)


def render(inspection: Inspection) -> RenderableType:
    """The report for a rich console."""
    parts: list[RenderableType] = [_title(inspection)]
    if inspection.regions:
        parts += [_pass_table(inspection), _facts(inspection)]
    parts += [_break(b) for b in inspection.breaks]
    parts += [_fallback(f, "") for f in inspection.fallbacks]
    parts += [_fallback(f, " (before this inspection)") for f in inspection.earlier_fallbacks]
    parts += [_sentence(note, "dim") for note in inspection.notes]
    return Group(*parts)


def headline(inspection: Inspection) -> str:
    """What was captured, in one line."""
    kinds: Counter[str] = Counter(graph.kind for graph in inspection.graphs)
    graphs = [f"{kinds[kind]} {kind}" for kind in GRAPHS if kinds[kind]]
    captured = f"{_count(len(inspection.regions), 'region')} captured"
    broken = f"{_count(len(inspection.breaks), 'graph break')}" if inspection.breaks else ""
    return ", ".join(filter(None, [captured, *graphs, broken]))


def _title(inspection: Inspection) -> Text:
    mode = "training mode" if inspection.training else "evaluation mode"
    return Text.assemble(
        (inspection.model, "bold"),
        f"  {inspection.precision}, {mode}, torch {inspection.torch_version}\n",
        (headline(inspection), "dim"),
    )


def _pass_table(inspection: Inspection) -> RenderableType:
    totals = inspection.totals()
    kinds = [kind for kind in GRAPHS if any(kind in total.fired for total in totals)]
    table = tables.plain_table()
    table.add_column("pass", no_wrap=True)
    for kind in kinds:
        table.add_column(_SHORT[kind], justify="right", no_wrap=True)
    table.add_column("numerics", no_wrap=True)
    table.add_column("casts", justify="right", no_wrap=True)
    table.add_column("other nodes", overflow="fold")
    for total in totals:
        table.add_row(
            total.name,
            *(_fired(total, kind) for kind in kinds),
            "rounds" if total.changes_numerics else Text("exact", "dim"),
            _casts(total),
            Text("; ".join(total.errors), "red") if total.errors else _changes(total),
            style="red" if total.errors else "" if total.total else "dim",
        )
    return Padding(tables.FirstThatFits(table), (1, 0))


def _fired(total: PassTotal, kind: str) -> str:
    return str(total.fired[kind]) if kind in total.fired else ""


def _casts(total: PassTotal) -> str:
    net = total.come[CAST] - total.gone[CAST]
    return f"{net:+d}" if net else ""


def _changes(total: PassTotal) -> str:
    """The largest changes in the number of nodes, as in ``"-4 mm, +4 optcpu.linear"``."""
    signed = [(f"-{n} {_short(operator)}", n) for operator, n in total.gone.items()]
    signed += [(f"+{n} {_short(operator)}", n) for operator, n in total.come.items()]
    others = [(text, n) for text, n in signed if not text.endswith(_short(CAST))]
    largest = sorted(others, key=lambda entry: -entry[1])
    shown = [text for text, _ in largest[:_MOST_CHANGES]]
    more = len(largest) - len(shown)
    return ", ".join(shown + ([f"{more} more"] if more else []))


def _short(operator: str) -> str:
    return operator.removeprefix("aten.").removeprefix("prims.")


def _facts(inspection: Inspection) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for kind, stages in _sizes(inspection).items():
        table.add_row(f"{kind} nodes", stages)
    products = _products(inspection)
    if products:
        table.add_row("products", products)
    for kind, casts in inspection.casts_left().items():
        table.add_row(f"{kind} casts", _listed(casts) or "none")
    fused: dict[str, list[str]] = {}
    for entry in inspection.fused():
        name = f"{entry.operator} ({entry.detail})" if entry.detail else entry.operator
        fused.setdefault(entry.graph, []).append(f"{entry.times} {name}")
    for kind, names in fused.items():
        table.add_row(f"{kind} fused", ", ".join(names))
    for stays in inspection.stays_wide():
        table.add_row("stays FP32", f"{stays.reason}: {_listed(stays.operators)}")
    for (layout, reason), names in inspection.laid_out().items():
        table.add_row("weight layout", f"{layout} {_count(len(names), 'weight')}: {reason}")
    if not inspection.breaks:
        table.add_row("graph breaks", "none")
    if not inspection.fallbacks and not inspection.earlier_fallbacks:
        table.add_row("fallbacks", "none")
    return table


def _sizes(inspection: Inspection) -> dict[str, str]:
    """Nodes before and after all passes, for each kind of graph."""
    sizes: dict[str, tuple[int, int]] = {}
    for graph in inspection.graphs:
        before, after = sizes.get(graph.kind, (0, 0))
        sizes[graph.kind] = (before + len(graph.initial), after + len(graph.final))
    return {kind: f"{before} before, {after} after" for kind, (before, after) in sizes.items()}


def _products(inspection: Inspection) -> str:
    """As in ``"1.2 GFLOP forward, 2.4 GFLOP backward"``; empty where there are none."""
    flops: Counter[str] = Counter()
    for graph in inspection.graphs:
        if graph.kind != "joint":  # which is both of the others
            flops[graph.kind] += graph.flops
    if not any(flops.values()):
        return ""
    return ", ".join(f"{count / 1e9:.3g} GFLOP {kind}" for kind, count in flops.items())


def _listed(counts: Mapping[str, int]) -> str:
    common = Counter(counts).most_common()
    shown = [f"{n} {_short(name)}" for name, n in common[:_MOST_OPERATORS]]
    rest = sum(n for _, n in common[_MOST_OPERATORS:])
    return ", ".join(shown + ([f"{rest} others"] if rest else []))


def _break(found: GraphBreak) -> RenderableType:
    place = found.source
    where = f" at {place.file}:{place.line}" if place is not None else ""
    code = [f"> {place.code}"] if place is not None and place.code else []
    return _lines(
        f"graph break{where}: {found.reason}", [*code, found.explanation, *found.remedies], "yellow"
    )


def _fallback(found: Fallback, when: str) -> RenderableType:
    return _lines(f"fallback{when}: {found.part}: {found.reason}", [found.remedy], "red")


def _lines(head: str, details: Iterable[str], style: str) -> RenderableType:
    indented = [Padding(Text(detail, "dim"), (0, 0, 0, 2)) for detail in details if detail]
    return Padding(Group(Text(head, style), *indented), (1, 0, 0, 0))


def _sentence(text: str, style: str) -> Padding:
    return Padding(Text(text, style), (1, 0, 0, 0))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
