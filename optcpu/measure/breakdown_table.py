"""Where the time of a step goes, as a table."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from optcpu import tables
from optcpu.measure.breakdown import Breakdown, Kind, Share
from optcpu.measure.numbers import figure

_TOLD: dict[Kind, str] = {
    "products": "matrix products and attention",
    "packing": "packing of weights",
    "convolutions": "convolutions",
    "recurrent": "recurrent layers",
    "update": "update of the weights",
    "generated": "generated code",
    "operators": "other operators",
    "python": "Python and waiting",
}
_ADVICE: dict[Kind, str] = {
    "products": "their rate grows with the batch, up to the peak",
    "packing": "once a weight and update, whatever the number of batches in between",
    "convolutions": "those of few channels stay far below the peak of a matrix product",
    "recurrent": "a step in time waits for the one before: a larger batch fills the cores",
    "update": "give the optimizer to optcpu.optimize, or update once for several batches",
    "generated": "activations, norms and losses, bound by memory: BF16 halves their bytes",
    "operators": "PyTorch runs them as they are: optcpu inspect shows where they are from",
    "python": "it does not grow with the batch",
}
_WITH_PIECES = 3  # kinds of work whose operators are told
_PIECES = 3
_NOTABLE = 0.02  # of the step


def breakdown_table(breakdown: Breakdown) -> RenderableType:
    """The table, that which is farthest above its ideal first, and what can be done about it."""
    table = tables.plain_table()
    table.add_column(f"a step of {breakdown.variant}, profiled")
    for heading in ("ms", "ideal", "above"):
        table.add_column(heading, justify="right", no_wrap=True)
    for place, share in enumerate(breakdown.shares):
        table.add_row(_TOLD[share.kind], *map(figure, (share.ms, share.ideal_ms, share.above_ms)))
        for piece in share.pieces[:_PIECES] if place < _WITH_PIECES else ():
            if piece.ms > _NOTABLE * breakdown.step_ms:
                told = f"  {piece.calls:g} x {piece.what}"
                table.add_row(Text(told, "dim"), Text(figure(piece.ms), "dim"), "", "")
    return Group(table, *_advice(breakdown.shares[0]))


def _advice(share: Share) -> list[RenderableType]:
    told = f"Farthest above the ideal: {_TOLD[share.kind]} ({figure(share.above_ms)} ms); "
    return [tables.sentence(told + f"{_ADVICE[share.kind]}.", "dim")]
