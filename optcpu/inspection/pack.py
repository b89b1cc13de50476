"""What the web page carries: every distinct node once, stages as lists of them, and the views."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from optcpu.inspection.difference import Row, align
from optcpu.inspection.model import CAST, GraphReport, Node, PassReport, Region, Stage
from optcpu.inspection.report import headline
from optcpu.inspection.summary import GRAPHS, PassTotal

if TYPE_CHECKING:
    from optcpu.inspection.result import Inspection

_MOST_CHANGES = 6
_TITLES = {
    "joint": "Joint graph",
    "forward": "Forward graph",
    "backward": "Backward graph",
    "inference": "Inference graph",
}

Entry = TypeVar("Entry", bound=Hashable)


class _Table(Generic[Entry]):
    """Distinct values, each with a position."""

    def __init__(self) -> None:
        self.positions: dict[Entry, int] = {}

    def __call__(self, value: Entry) -> int:
        return self.positions.setdefault(value, len(self.positions))


def to_dict(inspection: Inspection) -> dict[str, Any]:
    """The data that the page's scripts read; they are the only readers."""
    packer = _Packer()
    several = len(inspection.regions) > 1
    views = [
        {"region": f"Region {region.index}" if several else None, **view}
        for region in inspection.regions
        for view in _region_views(region, packer, several)
    ]
    return {
        "title": inspection.model,
        "headline": _lead(inspection),
        "classes": dict(inspection.modules),
        "summary": _summary(inspection, [view["id"] for view in views]),
        "views": views,
        **packer.tables(),
    }


class _Packer:
    def __init__(self) -> None:
        self._nodes: _Table[Node] = _Table()
        self._stages: _Table[tuple[int, ...]] = _Table()

    def stage(self, stage: Stage) -> int:
        """The position of a stage."""
        return self._stages(tuple(self._nodes(node) for node in stage.nodes))

    def tables(self) -> dict[str, Any]:
        """The nodes and stages that the views refer to."""
        operators: _Table[str] = _Table()
        types: _Table[tuple[str, str]] = _Table()
        sources: _Table[Any] = _Table()
        modules: _Table[str] = _Table()
        nodes = [
            [
                node.name,
                operators(node.operator),
                node.arguments,
                types((node.type, ", ".join(sorted({v.device for v in node.values if v.device})))),
                -1 if node.source is None else sources(node.source),
                modules(node.module),
                node.label,
                node.inputs,
            ]
            for node in self._nodes.positions
        ]
        return {
            "nodes": nodes,
            "stages": list(self._stages.positions),
            "operators": list(operators.positions),
            "types": list(types.positions),
            "sources": [asdict(source) for source in sources.positions],
            "modules": list(modules.positions),
        }


def _region_views(region: Region, packer: _Packer, several: bool) -> Iterator[dict[str, Any]]:
    base = f"r{region.index}"
    yield {
        "id": f"{base}/captured",
        "kind": "one",
        "section": "Captured by Dynamo",
        "entry": "captured",
        "title": f"Captured graph{_of(region, several)}",
        "remarks": [_nodes(region.captured)],
        "after": packer.stage(region.captured),
    }
    for graph in region.graphs:
        yield from _graph_views(graph, base, _of(region, several), packer)
    yield from _final_views(region, base, _of(region, several), packer)


def _of(region: Region, several: bool) -> str:
    return f" of region {region.index}" if several else ""


def _graph_views(
    graph: GraphReport, base: str, suffix: str, packer: _Packer
) -> Iterator[dict[str, Any]]:
    number = graph.name.removeprefix(graph.kind).replace("-", " ")
    title = f"{_TITLES[graph.kind]}{number}{suffix}"
    common = {"kind": "diff", "section": f"{_TITLES[graph.kind]}{number}"}
    total = sum(run.fired for run in graph.passes)
    yield {
        **common,
        **_compared(graph.initial, graph.final, packer),
        "id": f"{base}/{graph.name}",
        "entry": "all passes",
        "title": f"{title}: all passes",
        "fired": total,
        "idle": total == 0,
        "remarks": [f"{_nodes(graph.initial)} before", f"{_nodes(graph.final)} after"],
    }
    for run in graph.passes:
        yield {
            **common,
            **_compared(run.before, run.after, packer),
            "id": f"{base}/{run.after.name}",
            "entry": run.name,
            "title": f"{title}: {run.name}",
            "fired": run.fired,
            "idle": run.fired == 0 and run.error is None,
            "error": run.error,
            "remarks": _remarks(run),
        }
    last = graph.passes[-1].after if graph.passes else graph.initial
    if last.nodes != graph.final.nodes:
        yield {
            **common,
            **_compared(last, graph.final, packer),
            "id": f"{base}/{graph.final.name}",
            "entry": "written out",
            "title": f"{title}: written out for the code generator",
            "remarks": [_nodes(graph.final)],
        }
    if graph.output_code:
        yield {
            **common,
            "kind": "code",
            "id": f"{base}/{graph.name}/code",
            "entry": "generated code",
            "title": f"{title}: generated code",
            "remarks": [f"{graph.output_code.count(chr(10)) + 1:,} lines"],
            "code": graph.output_code,
        }


def _final_views(
    region: Region, base: str, suffix: str, packer: _Packer
) -> Iterator[dict[str, Any]]:
    finals = {g.kind: _single(g, packer) for g in region.graphs if g.kind != "joint"}
    if "forward" in finals and "backward" in finals:
        yield {
            "id": f"{base}/final",
            "kind": "pair",
            "section": "Final graphs",
            "entry": "forward and backward",
            "title": f"Final forward and backward{suffix}",
            "remarks": [],
            "left": finals["forward"],
            "right": finals["backward"],
        }
        return
    for kind, single in finals.items():
        yield {
            **single,
            "id": f"{base}/final/{kind}",
            "section": "Final graphs",
            "entry": kind,
            "title": f"Final {_TITLES[kind].lower()}{suffix}",
            "remarks": [],
        }


def _single(graph: GraphReport, packer: _Packer) -> dict[str, Any]:
    return {
        "kind": "one",
        "title": f"{_TITLES[graph.kind]}, {_nodes(graph.final)}",
        "after": packer.stage(graph.final),
    }


def _compared(before: Stage, after: Stage, packer: _Packer) -> dict[str, Any]:
    return {
        "before": packer.stage(before),
        "after": packer.stage(after),
        "stages": [before.name, after.name],
        "runs": _runs(align(before, after)),
    }


def _runs(rows: list[Row]) -> list[int]:
    """Triples: how many nodes face themselves, then how many are only before, and only after."""
    runs: list[int] = []
    both = gone = come = 0
    for row in rows:
        if row.before is not None and row.after is not None:
            if gone or come:
                runs += [both, gone, come]
                both = gone = come = 0
            both += 1
        elif row.before is not None:
            gone += 1
        else:
            come += 1
    return [*runs, both, gone, come]


def _remarks(run: PassReport) -> list[str]:
    remarks = [f"fired {run.fired:,} times" if run.fired != 1 else "fired once"]
    remarks.append("may round" if run.changes_numerics else "exact")
    net = run.come[CAST] - run.gone[CAST]
    if net:
        remarks.append(f"{net:+,} casts".replace("-", "\N{MINUS SIGN}"))
    return [*remarks, f"{_nodes(run.before)} before", f"{_nodes(run.after)} after"]


def _nodes(stage: Stage) -> str:
    return f"{len(stage):,} nodes" if len(stage) != 1 else "1 node"


def _lead(inspection: Inspection) -> str:
    mode = "training mode" if inspection.training else "evaluation mode"
    return (
        f"{headline(inspection)}. {inspection.precision.upper()}, {mode}, "
        f"torch {inspection.torch_version}."
    )


def _summary(inspection: Inspection, known: list[str]) -> dict[str, Any]:
    totals = inspection.totals()
    fallbacks = [(f, "") for f in inspection.fallbacks]
    fallbacks += [(f, " (before this inspection)") for f in inspection.earlier_fallbacks]
    return {
        "notes": list(inspection.notes),
        "figures": _figures(inspection),
        "kinds": [kind for kind in GRAPHS if any(kind in total.fired for total in totals)],
        "passes": [_pass(total, inspection) for total in totals],
        "casts": [
            [kind, direction, number]
            for kind, casts in inspection.casts_left().items()
            for direction, number in casts.items()
        ],
        "fused": [
            [f.graph, f"{f.operator} ({f.detail})" if f.detail else f.operator, f.times]
            for f in inspection.fused()
        ],
        "wide": [[s.reason, s.operators.most_common()] for s in inspection.stays_wide()],
        "layouts": [
            [f"{layout}: {reason}", names]
            for (layout, reason), names in inspection.laid_out().items()
        ],
        "breaks": [
            {
                "reason": found.reason,
                "explanation": found.explanation,
                "remedies": list(found.remedies),
                "source": None if found.source is None else asdict(found.source),
            }
            for found in inspection.breaks
        ],
        "fallbacks": [{**asdict(fallback), "when": when} for fallback, when in fallbacks],
        "final": next((name for name in known if name.split("/")[1] == "final"), None),
    }


def _figures(inspection: Inspection) -> list[list[str]]:
    finals = [graph.final for graph in inspection.graphs if graph.kind != "joint"]
    fired = sum(inspection.counts().values())
    fallbacks = len(inspection.fallbacks) + len(inspection.earlier_fallbacks)
    return [
        [f"{fired:,}", "rewrites by the passes", ""],
        [f"{sum(map(len, finals)):,}", "nodes in the final graphs", ""],
        [f"{sum(entry.times for entry in inspection.fused()):,}", "fused operators", ""],
        [f"{sum(stage.casts.total() for stage in finals):,}", "casts left", ""],
        [str(len(inspection.breaks)), "graph breaks", "bad" if inspection.breaks else "good"],
        [str(fallbacks), "fallbacks", "bad" if fallbacks else "good"],
    ]


def _pass(total: PassTotal, inspection: Inspection) -> dict[str, Any]:
    changes = [(name, -number) for name, number in total.gone.items()]
    changes += list(total.come.items())
    others = sorted((c for c in changes if c[0] != CAST), key=lambda change: -abs(change[1]))
    return {
        "name": total.name,
        "numerics": total.changes_numerics,
        "fired": {
            kind: [number, _view_of(total.name, kind, inspection)]
            for kind, number in total.fired.items()
        },
        "total": total.total,
        "casts": total.come[CAST] - total.gone[CAST],
        "changes": others[:_MOST_CHANGES],
        "errors": list(total.errors),
    }


def _view_of(name: str, kind: str, inspection: Inspection) -> str | None:
    """Where to look at a pass: the first graph of a kind in which it did something."""
    for region in inspection.regions:
        for graph in region.graphs:
            for run in graph.passes:
                if graph.kind == kind and run.name == name and (run.fired or run.error):
                    return f"r{region.index}/{run.after.name}"
    return None
