"""What happened while a model was compiled: which pass fired how often, and what fell back to eager."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from passes import Blocks

GraphKind = Literal["joint", "forward", "backward", "inference"]


@dataclass
class PassRun:
    """One run of one pass over one graph.

    Attributes:
        name: the pass's name.
        fired: how many places it rewrote; 0 as well if it failed.
        changes_numerics: whether its rewrites may change results beyond reordering of exact operations.
        error: why it failed; the graph was then left as it was before. None if it did not.
        before: a copy of the graph before the pass, after: behind it; None unless graphs are kept.
    """

    name: str
    fired: int
    changes_numerics: bool
    error: str | None = None
    before: fx.Graph | None = None
    after: fx.Graph | None = None


@dataclass
class GraphRun:
    """The passes that one graph went through.

    Attributes:
        region: which captured part of the model the graph belongs to, counted from 0.
        kind: the joint graph of forward and backward, one of the two, or an inference graph.
        runs: the passes in order.
        initial, final: the graph before the first pass and as it went to the code generator; None unless
            graphs are kept.
        written_out: how many fused operators of the final graph the code generator gets in parts
            (:mod:`passes.lowering`).
        output_code: what Inductor generated; None unless graphs are kept and code is generated.
    """

    region: int
    kind: GraphKind
    runs: list[PassRun] = field(default_factory=list)
    initial: fx.Graph | None = None
    final: fx.Graph | None = None
    written_out: int = 0
    blocks: list[Blocks] = field(default_factory=list)
    output_code: str | None = None


@dataclass(frozen=True)
class Fallback:
    """A part that runs eagerly or without a rewrite.

    Attributes:
        part: what it is, in words.
        reason: the error that forbade better.
        remedy: what the user can do about it.
    """

    part: str
    reason: str
    remedy: str


@dataclass
class Record:
    """Everything known about the compilations of one model.

    Attributes:
        keep_graphs: whether copies of the graphs are kept for reading (:func:`optcpu.inspect` does).
        captured: the graphs as Dynamo captured them, one for each region; empty unless graphs are kept.
        graphs: one entry for each graph that passes ran over. A graph served from the compilation cache
            passed through them when it was stored and has no entry here, unless graphs are kept: then
            everything is compiled afresh.
        fallbacks: the parts that run eagerly, each told once.
    """

    keep_graphs: bool = False
    captured: list[fx.Graph] = field(default_factory=list)
    graphs: list[GraphRun] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    regions: int = 0

    def copy_of(self, graph: fx.Graph) -> fx.Graph | None:
        """A copy of ``graph`` with its metadata if graphs are kept, else None."""
        return copy_graph(graph) if self.keep_graphs else None

    def has_failed_pass(self, region: int) -> bool:
        """Whether a pass failed on one of the graphs of a region."""
        graphs = (graph for graph in self.graphs if graph.region == region)
        return any(run.error is not None for graph in graphs for run in graph.runs)

    def counts(self) -> dict[str, int]:
        """How often each pass fired, over all graphs, in the order of the passes."""
        totals: dict[str, int] = {}
        for graph in self.graphs:
            for run in graph.runs:
                totals[run.name] = totals.get(run.name, 0) + run.fired
        return totals


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph`` whose nodes share the (immutable) metadata values of the original."""
    duplicate = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        nodes[node] = duplicate.node_copy(node, lambda n: nodes[n])
        nodes[node].meta = copy.copy(node.meta)
    return duplicate
