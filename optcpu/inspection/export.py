"""An inspection as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from os import PathLike
from typing import TYPE_CHECKING, Any

from optcpu import files
from optcpu.inspection.model import GraphReport, Node, PassReport, Stage

if TYPE_CHECKING:
    from optcpu.inspection.result import Inspection


def to_json(inspection: Inspection, path: str | PathLike[str] | None) -> str:
    """The inspection as JSON, stages in full; see :meth:`Inspection.to_json`."""
    target = None if path is None else files.path_for(path, "to_json", "JSON", ".json")
    text = json.dumps(to_dict(inspection), separators=(",", ":")) + "\n"
    if target is not None:
        files.write(target, text.encode(), "to_json")
    return text


def to_dict(inspection: Inspection) -> dict[str, Any]:
    """The inspection as dictionaries, lists, strings and numbers.

    Most nodes are the same in many stages, so they are listed once, under ``"nodes"``; a stage
    holds their positions there.
    """
    nodes = NodeTable()
    regions = [
        {
            "captured": _stage(region.captured, nodes),
            "graphs": [_graph(graph, nodes) for graph in region.graphs],
        }
        for region in inspection.regions
    ]
    return {
        "model": inspection.model,
        "precision": inspection.precision,
        "training": inspection.training,
        "torch_version": inspection.torch_version,
        "modules": dict(inspection.modules),
        "passes": list(inspection.passes),
        "summary": {
            "fired": inspection.counts(),
            "casts_left": inspection.casts_left(),
            "fused": [asdict(entry) for entry in inspection.fused()],
            "stays_fp32": [
                {"reason": entry.reason, "operators": dict(entry.operators)}
                for entry in inspection.stays_wide()
            ],
        },
        "breaks": [asdict(entry) for entry in inspection.breaks],
        "fallbacks": [asdict(entry) for entry in inspection.fallbacks],
        "earlier_fallbacks": [asdict(entry) for entry in inspection.earlier_fallbacks],
        "notes": list(inspection.notes),
        "layouts": [asdict(entry) for entry in inspection.layouts],
        "regions": regions,
        "nodes": [_node(node) for node in nodes.listed],
    }


class NodeTable:
    """The distinct nodes of many stages, each with a position."""

    def __init__(self) -> None:
        self._positions: dict[Node, int] = {}

    def positions(self, stage: Stage) -> list[int]:
        """The positions of a stage's nodes; new ones are appended."""
        return [self._positions.setdefault(n, len(self._positions)) for n in stage.nodes]

    @property
    def listed(self) -> list[Node]:
        """All nodes so far, by their position."""
        return list(self._positions)


def _graph(graph: GraphReport, nodes: NodeTable) -> dict[str, Any]:
    return {
        "name": graph.name,
        "kind": graph.kind,
        "initial": _stage(graph.initial, nodes),
        "passes": [_pass(run, nodes) for run in graph.passes],
        "final": _stage(graph.final, nodes),
        "flops": graph.flops,
        "output_code": graph.output_code,
    }


def _pass(run: PassReport, nodes: NodeTable) -> dict[str, Any]:
    return {
        "name": run.name,
        "fired": run.fired,
        "changes_numerics": run.changes_numerics,
        "error": run.error,
        "gone": dict(run.gone),
        "come": dict(run.come),
        "casts_inserted": dict(run.casts_inserted),
        "casts_cancelled": dict(run.casts_cancelled),
        # The stage before it is the one that ended the pass before.
        "after": _stage(run.after, nodes),
    }


def _stage(stage: Stage, nodes: NodeTable) -> dict[str, Any]:
    return {"name": stage.name, "nodes": nodes.positions(stage)}


def _node(node: Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "operator": node.operator,
        "arguments": node.arguments,
        "inputs": list(node.inputs),
        "values": [
            {"dtype": v.dtype, "shape": v.shape, "device": v.device, "number": v.number}
            for v in node.values
        ],
        "module": node.module,
        "label": node.label,
        "source": None if node.source is None else asdict(node.source),
    }
