"""Where the time of a training step goes, by kind of work, and how much of it the ideal step needs.

PyTorch's profiler tells what ran within what. Each operator counts whole, with what it calls, as the kind
of work that its name says; what generated code and Python do themselves is what is left of the ranges
around them. To pack a weight is part of the product that needs it first, and is told apart.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch.profiler import ProfilerActivity, profile

from optcpu.measure.work import Ideal

Kind = Literal[
    "products",
    "packing",
    "convolutions",
    "recurrent",
    "update",
    "generated",
    "operators",
    "python",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

_GRAPH = "CompiledFxGraph"
_OPERATOR = re.compile(r"(?!autograd::)\w+::(\w+)")
_BY_NAME: dict[Kind, frozenset[str]] = {
    "products": frozenset(
        [
            "mm",
            "addmm",
            "bmm",
            "baddbmm",
            "linear",
            "matmul",
            "_linear_pointwise",
            "linear_add",
            "linear_saving_input",
            "linear_backward",
            "attention",
            "attention_backward",
            "scaled_dot_product_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
        ]
    ),
    "packing": frozenset(["pack_weight"]),
    "convolutions": frozenset(
        [
            "convolution",
            "conv1d",
            "conv2d",
            "conv3d",
            "_convolution",
            "convolution_backward",
            "mkldnn_convolution",
            "_convolution_pointwise",
            "_convolution_transpose_pointwise",
            "thnn_conv2d",
        ]
    ),
    "recurrent": frozenset(
        [
            "lstm",
            "gru",
            "rnn_tanh",
            "rnn_relu",
            "mkldnn_rnn_layer",
            "mkldnn_rnn_layer_backward",
            "recurrent_steps",
            "recurrent_steps_backward",
        ]
    ),
}
_PIECES = 5  # told of each kind


@dataclass(frozen=True)
class Piece:
    """An operator on inputs of certain shapes.

    Attributes:
        what: its name and the shapes.
        calls: in a step.
        ms: of all of them, ms.
    """

    what: str
    calls: float
    ms: float


@dataclass(frozen=True)
class Share:
    """What one kind of work takes of a step.

    Attributes:
        kind: of work.
        ms: that it takes, ms.
        ideal_ms: that the ideal step gives it, ms; 0 for what the ideal step does not have.
        pieces: the operators that take most of it, the longest first.
    """

    kind: Kind
    ms: float
    ideal_ms: float
    pieces: list[Piece] = field(default_factory=list)

    @property
    def above_ms(self) -> float:
        """How far above the ideal it is, ms."""
        return self.ms - self.ideal_ms


@dataclass(frozen=True)
class Breakdown:
    """Where the time of a step goes.

    Attributes:
        variant: whose step.
        shares: one for each kind of work, that which is farthest above its ideal first.
    """

    variant: str
    shares: list[Share]

    @property
    def step_ms(self) -> float:
        """Of a profiled step, ms; a little more than one that is not profiled takes."""
        return sum(share.ms for share in self.shares)


def costs_of(run: Callable[[], object], steps: int) -> list[dict[str, Any]]:
    """Profile ``run``, which makes ``steps`` steps: kind, what, calls and ms a step, of each piece."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
    calls: defaultdict[tuple[Kind, str], int] = defaultdict(int)
    micros: defaultdict[tuple[Kind, str], float] = defaultdict(float)
    in_ranges = 0.0
    for event in profiler.events() or ():
        if event.cpu_parent is None:
            in_ranges += event.cpu_time_total
            for kind, what, spent in _pieces_of(event):
                calls[kind, what] += 1
                micros[kind, what] += spent
    micros["python", ""] += max(0.0, 1e6 * seconds - in_ranges)
    return [
        {"kind": kind, "what": what, "calls": calls[kind, what] / steps, "ms": spent / 1e3 / steps}
        for (kind, what), spent in micros.items()
    ]


def _pieces_of(event: Any) -> Iterable[tuple[Kind, str, float]]:
    """Kind, description and microseconds of what ``event`` consists of."""
    kind = _kind(event.name)
    if kind is not None:
        packings = list(_packings_within(event))
        inside = sum(packing.cpu_time_total for packing in packings)
        yield kind, _description(event), event.cpu_time_total - inside
        for packing in packings:
            yield "packing", _description(packing), packing.cpu_time_total
        return
    own: Kind = "generated" if _runs_generated_code(event) else "python"
    yield own, "", event.self_cpu_time_total
    for child in event.cpu_children:
        yield from _pieces_of(child)


def _packings_within(event: Any) -> Iterable[Any]:
    for child in event.cpu_children:
        if _kind(child.name) == "packing":
            yield child
        else:
            yield from _packings_within(child)


def _runs_generated_code(event: Any) -> bool:
    """Whether that is what ``event`` does itself; PyTorch 2.8 has no range of its own for it."""
    if event.name in ("CompiledFunction", "CompiledFunctionBackward"):
        return not any(_GRAPH in child.name for child in event.cpu_children)
    return _GRAPH in event.name


def _kind(name: str) -> Kind | None:
    """The kind of work of an operator; None for a range around several."""
    if name.startswith("Optimizer."):
        return "update"
    operator = _OPERATOR.fullmatch(name)
    if operator is None:
        return None
    for kind, names in _BY_NAME.items():
        if operator[1] in names:
            return kind
    return "operators"


def _description(event: Any) -> str:
    if event.name.startswith("Optimizer."):
        return ""
    shapes = [shape for shape in event.input_shapes or () if shape]
    return " ".join([event.name.split("::")[1], *("x".join(map(str, shape)) for shape in shapes)])


def breakdown(
    variant: str, costs: Iterable[Mapping[str, Any]], ideal: Ideal, flops: Mapping[Kind, float]
) -> Breakdown:
    """What :func:`costs_of` gave, against the ideal step.

    Args:
        variant: whose step.
        costs: of it.
        ideal: what the step would take at best.
        flops: of the operators of each kind in a step.
    """
    ideals = {kind: 1e3 * of_kind / ideal.peak for kind, of_kind in flops.items()}
    ideals["update"] = ideal.update_ms
    pieces: defaultdict[Kind, list[Piece]] = defaultdict(list)
    for cost in costs:
        pieces[cost["kind"]].append(Piece(cost["what"], cost["calls"], cost["ms"]))
    shares = [
        Share(
            kind,
            sum(piece.ms for piece in pieces[kind]),
            ideals.get(kind, 0.0),
            sorted(filter(lambda p: p.what, pieces[kind]), key=lambda p: -p.ms)[:_PIECES],
        )
        for kind in KINDS
        if pieces[kind]
    ]
    return Breakdown(variant, sorted(shares, key=lambda share: -share.above_ms))


def kind_of_operator(name: str) -> Kind:
    """The kind of work of an ATen operator by its name, as in ``"convolution_backward"``."""
    return _kind(f"aten::{name}") or "operators"
