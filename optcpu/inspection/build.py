"""From what was observed to what an inspection holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import fx, nn

from optcpu.inspection.model import GraphReport, PassReport, Region, Stage
from optcpu.inspection.read import GraphReader, traced_labels
from optcpu.measure.work import graph_flops
from optcpu.record import GraphRun, Record


def regions_of(record: Record, model: nn.Module, arguments: Sequence[str]) -> tuple[Region, ...]:
    """Read all graphs of a record.

    Args:
        record: with graphs kept.
        model: the module that was compiled.
        arguments: names of its positional inputs.
    """
    reader = GraphReader({id(m): path for path, m in model.named_modules()}, arguments)
    return tuple(
        _region(reader, index, captured, [g for g in record.graphs if g.region == index])
        for index, captured in enumerate(record.captured)
    )


def modules_of(model: nn.Module, regions: Sequence[Region]) -> dict[str, str]:
    """Class of each module that a node belongs to or lies below, by its dotted path."""
    used = {n.module for r in regions for stage in r.stages().values() for n in stage.nodes}
    above = {path.rsplit(".", depth)[0] for path in used for depth in range(path.count(".") + 1)}
    return {
        path: type(module).__name__
        for path, module in model.named_modules()
        if path in above or path == ""
    }


def _region(
    reader: GraphReader, index: int, captured: fx.Graph, runs: Sequence[GraphRun]
) -> Region:
    labels = reader.captured_labels(captured)
    traced: dict[str, str] = {}
    names: Counter[str] = Counter()
    graphs = []
    for run in runs:
        if run.initial is None:
            continue
        if run.kind == "joint" and not traced:
            traced = traced_labels(run.initial, captured, labels)
        names[run.kind] += 1
        number = names[run.kind]
        name = run.kind if number == 1 else f"{run.kind}-{number}"
        graphs.append(_graph(reader, name, run, _labels(run, traced)))
    return Region(index, reader.stage("captured", captured, labels), tuple(graphs))


def _labels(run: GraphRun, traced: Mapping[str, str]) -> dict[str, str]:
    """What the inputs of one graph are; a backward is given what the forward has saved."""
    labels = dict(traced)
    if run.kind == "backward" and run.initial is not None:
        for node in run.initial.nodes:
            if node.op == "placeholder":
                labels.setdefault(node.name, "saved by the forward")
    return labels


def _graph(reader: GraphReader, name: str, run: GraphRun, labels: Mapping[str, str]) -> GraphReport:
    assert run.initial is not None
    initial = stage = reader.stage(f"{name}/initial", run.initial, labels)
    taken: Counter[str] = Counter()
    reports = []
    for step in run.runs:
        taken[step.name] += 1
        number = taken[step.name]
        title = f"{name}/{step.name}" if number == 1 else f"{name}/{step.name}-{number}"
        after = _read_again(reader, title, step.after, stage, labels)
        reports.append(
            PassReport(step.name, step.fired, step.changes_numerics, step.error, stage, after)
        )
        stage = after
    return GraphReport(
        name,
        run.kind,
        initial,
        tuple(reports),
        _read_again(reader, f"{name}/final", run.final, stage, labels),
        graph_flops(run.initial),
        run.output_code,
    )


def _read_again(
    reader: GraphReader,
    title: str,
    graph: fx.Graph | None,
    before: Stage,
    labels: Mapping[str, str],
) -> Stage:
    """The next stage, sharing its nodes with the one before where nothing has changed."""
    if graph is None:
        return Stage(title, before.nodes)
    known = before.by_name
    fresh = reader.stage(title, graph, labels).nodes
    shared = tuple(known[n.name] if known.get(n.name) == n else n for n in fresh)
    return Stage(title, before.nodes if shared == before.nodes else shared)
