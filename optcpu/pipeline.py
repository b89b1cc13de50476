"""The one ordered list of passes, and how a graph goes through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

import passes as p
from optcpu.cpu import capabilities
from optcpu.record import GraphRun, PassRun, copy_graph
from passes.base import Rewrite
from passes.graph import fill_value, output_values, value

Precision = Literal["bf16", "fp32"]


def default_passes(precision: Precision = "bf16") -> list[p.Pass]:
    """The passes that :func:`optcpu.optimize` runs, in their order, as a list to change freely.

    Args:
        precision: ``"fp32"`` leaves out the passes that move operators to BF16.
    """
    in_bf16: list[p.Pass] = [
        p.GradientsInBf16(),
        p.InsertCasts(),
        p.HoistDowncasts(),
        p.MaxPoolInBf16(),
        p.SaveOutputsInBf16(),
        p.SinkUpcasts(),
        p.CancelCasts(),
        p.ShareWeightCasts(),
    ]
    return [
        # On forward and backward as one graph:
        p.Canonicalize(),
        p.CheckIndices(),
        p.ChunkCrossEntropy(),
        p.SubsampleForWeightGradient(),
        p.PoolBeforeRelu(),
        *(in_bf16 if precision == "bf16" else []),
        p.PoolBackwardBySize(),
        p.ReadUpperHalves(),
        p.AddEmbeddingGradient(),
        # On each of the two by itself:
        p.RouteAttention(),
        p.UnfoldAttentionBackward(),
        p.FuseLinearBackward(rounded_bias=precision == "bf16"),
        p.FuseLinear(),
        p.RouteProducts(),
        p.PoolChannelsLast(),
    ]


def resolve_precision(precision: str) -> Precision:
    """What to compute in: ``"auto"`` is BF16 where the processor multiplies BF16 in hardware.

    Raises:
        ValueError: ``precision`` is none of ``"auto"``, ``"bf16"`` and ``"fp32"``.
    """
    if precision == "auto":
        return "bf16" if capabilities().bf16 else "fp32"
    if precision == "bf16":
        return "bf16"
    if precision == "fp32":
        return "fp32"
    raise ValueError(f"precision must be 'auto', 'bf16' or 'fp32', not {precision!r}")


@dataclass(frozen=True, eq=False)
class Pipeline:
    """An ordered list of passes. Two are equal if they rewrite graphs in the same way.

    Args:
        passes: run in this order; those of the other stage are passed over.
    """

    passes: tuple[p.Pass, ...]

    @classmethod
    def of(cls, passes: Sequence[p.Pass | Rewrite]) -> Pipeline:
        """A pipeline of passes and plain functions ``(graph) -> count``.

        Raises:
            TypeError: an entry is neither, or ``passes`` is no sequence.
        """
        if isinstance(passes, (str, p.Pass)) or not isinstance(passes, Iterable):
            raise TypeError(f"passes must be a list of passes, not {passes!r}")
        return cls(tuple(p.as_pass(entry) for entry in passes))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and self.cache_key() == other.cache_key()

    def __hash__(self) -> int:
        return hash(self.cache_key())

    def cache_key(self) -> str:
        """A hash that changes with the passes, their order, their parameters and their code."""
        return p.cache_key(self.passes)

    def run(
        self,
        module: fx.GraphModule,
        stage: p.Stage,
        graph_run: GraphRun,
        *,
        keep_graphs: bool,
        on_failure: Callable[[p.Pass, Exception], None],
    ) -> None:
        """Run the passes of one stage over ``module.graph`` in place.

        A pass that raises, that changes the shape or dtype of an output, or that makes an operator's
        arguments ones it cannot take, is undone (by what came before it being done again) and reported to
        ``on_failure``; the others still run.
        """
        given = copy_graph(module.graph)
        done: list[p.Pass] = []
        for step in self.passes:
            if step.stage != stage:
                continue
            before = copy_graph(module.graph) if keep_graphs else None
            run = PassRun(step.name, 0, step.changes_numerics)
            graph_run.runs.append(run)
            try:
                run.fired = _run_pass(step, module.graph)
                done.append(step)
            except Exception as error:
                run.error = f"{type(error).__name__}: {error}"
                # To copy the graph before every pass would take longer than all passes together.
                module.graph = copy_graph(given)
                for earlier in done:
                    _run_pass(earlier, module.graph)
                on_failure(step, error)
            if keep_graphs:
                run.before, run.after = before, copy_graph(module.graph)


def _run_pass(step: p.Pass, graph: fx.Graph) -> int:
    """How often ``step`` fired; raises if it breaks ``graph``."""
    outputs = output_values(graph)
    # Passes of optcpu keep values right; to look after them would take time in every compilation.
    calls = None if _is_own(step) else {node: _call(node) for node in graph.nodes}
    fired = _checked_count(step(graph))
    graph.lint()
    if calls is None:
        _fill_missing_values(graph)
    else:
        _fill_values_that_change(graph, calls)
    if not step.narrows_outputs and output_values(graph) != outputs:
        raise ValueError("the pass changed the shape or dtype of an output")
    return fired


def _is_own(step: p.Pass) -> bool:
    """Whether ``step`` is a pass of optcpu, not one that a user has written."""
    of_users = isinstance(step, (p.FunctionPass, p.PatternPass))
    return type(step).__module__.startswith("passes.") and not of_users


def _call(node: fx.Node) -> tuple[Any, ...]:
    return node.target, node.args, node.kwargs


def _checked_count(fired: object) -> int:
    if not isinstance(fired, int) or isinstance(fired, bool) or fired < 0:
        raise TypeError(f"a pass returns how many places it rewrote, not {fired!r}")
    return fired


def _fill_missing_values(graph: fx.Graph) -> None:
    """Fill in ``meta["val"]``, on which the code generator relies, where a pass left it out."""
    for node in graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            fill_value(node)


def _fill_values_that_change(graph: fx.Graph, calls: dict[fx.Node, tuple[Any, ...]]) -> None:
    """Compute ``meta["val"]`` of what a pass has put in or changed, and of all that follows from it.

    Raises what an operator raises that cannot take its arguments.

    Args:
        graph: after the pass.
        calls: what the nodes were before it.
    """
    changed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        inputs = node.all_input_nodes
        is_same = calls.get(node) == _call(node) and changed.isdisjoint(inputs)
        is_known = all(
            "val" in given.meta for given in inputs
        )  # not so of a graph within the graph
        if "val" in node.meta and (is_same or not is_known):
            continue
        before = _kinds(value(node))
        fill_value(node)
        if _kinds(value(node)) != before:
            changed.add(node)


def _kinds(result: Any) -> list[Any]:
    """The shape and dtype of all tensors that an operator gives."""
    return [
        (tuple(map(str, leaf.shape)), leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)
        for leaf in tree_leaves(result)
    ]
