"""What an inspection holds: nodes, stages of a graph, and what each pass did to it. Plain data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from optcpu.record import GraphKind

CAST = "prims.convert_element_type"


@dataclass(frozen=True)
class Value:
    """What one node hands to its users: a tensor, or a number.

    Attributes:
        dtype: short name as in ``"bf16"``; for numbers their Python type.
        shape: sizes, symbolic ones as their expression; None for a number.
        device: ``"cpu"``, or ``""`` for a number.
        number: a number's symbolic expression or value, else ``""``.
    """

    dtype: str
    shape: tuple[int | str, ...] | None = None
    device: str = ""
    number: str = ""

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.dtype} {self.number}".strip()
        sizes = ", ".join(map(str, self.shape))
        device = "" if self.device == "cpu" else f"@{self.device}"
        return f"{self.dtype}[{sizes}]{device}"


@dataclass(frozen=True)
class Source:
    """A line of Python.

    Attributes:
        file: path, shortened to what is below the working directory or an import path.
        line: line number, from 1.
        function: name of the function that the line stands in.
        code: the line's text.
        library: whether it is PyTorch's own code, for want of a frame of the user's.
    """

    file: str
    line: int
    function: str
    code: str
    library: bool = False

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.code}".rstrip()


@dataclass(frozen=True)
class Node:
    """One operation of a graph.

    Attributes:
        name: unique in its graph, and kept from stage to stage.
        operator: such as ``"aten.mm"`` (the default overload's name is left out), ``"input"`` for what
            the graph is called with, ``"return"`` for what it gives.
        arguments: as they stand between the call's parentheses.
        inputs: names of the nodes among the arguments, each once, in order.
        values: dtype, shape and device of the result, one entry for each tensor or number in it.
        tuple_valued: whether the result is a tuple.
        source: the user's line it comes from, if known.
        module: dotted path of the module whose call it belongs to; ``""`` is the model itself.
        label: for inputs: the parameter, buffer or argument it is.
    """

    name: str
    operator: str
    arguments: str = ""
    inputs: tuple[str, ...] = ()
    values: tuple[Value, ...] = ()
    tuple_valued: bool = False
    source: Source | None = None
    module: str = ""
    label: str = ""

    @cached_property
    def type(self) -> str:
        """Dtypes and shapes of the result in one string, as in ``"bf16[128, 4608]"``."""
        text = ", ".join(map(str, self.values))
        return f"({text})" if self.tuple_valued else text

    @property
    def is_cast(self) -> bool:
        """Whether it only converts a tensor to another dtype."""
        return self.operator == CAST


@dataclass(frozen=True)
class Stage:
    """One graph at one moment.

    Attributes:
        name: as in ``"joint/insert-casts"``: the graph, and the pass that has just run.
        nodes: in the order they run.
    """

    name: str
    nodes: tuple[Node, ...]

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def by_name(self) -> dict[str, Node]:
        """The nodes by their name."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def operators(self) -> Counter[str]:
        """How often each operator is called; what comes in and goes out is not counted."""
        return Counter(n.operator for n in self.nodes if n.operator not in ("input", "return"))

    @cached_property
    def casts(self) -> Counter[str]:
        """How many casts there are by direction, as in ``{"f32 to bf16": 4}``."""
        return Counter(self._direction(node) for node in self.nodes if node.is_cast)

    def _direction(self, node: Node) -> str:
        source = self.by_name[node.inputs[0]].values if node.inputs else ()
        before = source[0].dtype if source else "?"
        after = node.values[0].dtype if node.values else "?"
        return f"{before} to {after}"


@dataclass(frozen=True)
class PassReport:
    """What one pass did to one graph.

    Attributes:
        name: the pass's name.
        fired: how many places it rewrote.
        changes_numerics: whether it may change results beyond reordering of exact operations.
        error: why it failed; the graph was then left as it was. None if it did not.
        before, after: the graph.
    """

    name: str
    fired: int
    changes_numerics: bool
    error: str | None
    before: Stage
    after: Stage

    @property
    def gone(self) -> Counter[str]:
        """How many nodes fewer there are of each operator."""
        return self.before.operators - self.after.operators

    @property
    def come(self) -> Counter[str]:
        """How many nodes more there are of each operator."""
        return self.after.operators - self.before.operators

    @property
    def casts_inserted(self) -> Counter[str]:
        """How many casts more there are, by direction."""
        return self.after.casts - self.before.casts

    @property
    def casts_cancelled(self) -> Counter[str]:
        """How many casts fewer there are, by direction."""
        return self.before.casts - self.after.casts


@dataclass(frozen=True)
class GraphReport:
    """One graph on its way through the passes.

    Attributes:
        name: its kind; numbered (``"joint-2"``) where a region has several of a kind.
        kind: joint, forward, backward or inference.
        initial: before the first pass.
        passes: in the order they ran.
        final: as it went to the code generator.
        flops: floating-point operations in its products, convolutions and attention; a multiply-add
            counts as two.
        output_code: what Inductor generated, if that was asked for.
    """

    name: str
    kind: GraphKind
    initial: Stage
    passes: tuple[PassReport, ...]
    final: Stage
    flops: int
    output_code: str | None = None


@dataclass(frozen=True)
class GraphBreak:
    """A place where capture stopped, so that Python runs the rest up to the next region.

    Attributes:
        reason: what PyTorch could not capture.
        explanation: more about it, if there is more to say.
        remedies: what can be done about it.
        source: the user's line, if known.
    """

    reason: str
    explanation: str = ""
    remedies: tuple[str, ...] = ()
    source: Source | None = None


@dataclass(frozen=True)
class Region:
    """A part of the model that was captured in one piece.

    Attributes:
        index: from 0, in the order of capture.
        captured: the graph as Dynamo handed it over.
        graphs: what was made of it: joint, forward and backward, or joint and inference. Empty if it
            could not be compiled.
    """

    index: int
    captured: Stage
    graphs: tuple[GraphReport, ...] = field(default=())

    def stages(self) -> dict[str, Stage]:
        """Every stage by its name, in the order they came about.

        ``"captured"``; then for every graph ``"<graph>/initial"``, ``"<graph>/<pass>"`` after each
        pass, and ``"<graph>/final"``.
        """
        found = {self.captured.name: self.captured}
        for graph in self.graphs:
            for stage in (graph.initial, *(run.after for run in graph.passes), graph.final):
                found[stage.name] = stage
        return found
