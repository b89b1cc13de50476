"""A comparison as text: two tables, what they mean, and what speaks against optcpu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from optcpu import tables
from optcpu.measure.breakdown_table import breakdown_table
from optcpu.measure.numbers import figure
from optcpu.measure.variants import REFERENCE
from optcpu.tables import FirstThatFits, sentence

if TYPE_CHECKING:
    from optcpu.measure.result import Comparison, Row
    from optcpu.measure.roofline import Limits
    from optcpu.measure.updates import UpdateCost
    from optcpu.measure.work import Ideal

# Two processes running the same code differ by this much in a run of 5 rounds of a second.
_LEVEL = 0.03
_NOTABLE_MEMORY = 1.1
_NOTABLE_COMPILE = 1.25
_NOTABLE_COMPILE_S = 2.0
_NOTABLE_ERROR = 1.05
_NONE = "-"


def to_text(comparison: Comparison, width: int | None = None) -> str:
    """The report as plain text, ``width`` columns wide (default: the terminal's)."""
    return tables.to_text(render(comparison), width)


def render(comparison: Comparison) -> RenderableType:
    """The report for a rich console."""
    accumulation = comparison.accumulation_steps
    batches = f", {accumulation} batches in a step" if accumulation > 1 else ""
    title = Text.assemble(
        (comparison.name, "bold"),
        f"  {_count(comparison.parameters)} parameters{batches}\n",
        (str(comparison.machine), "dim"),
    )
    parts: list[RenderableType] = [
        title,
        "",
        FirstThatFits(_speed_table(comparison), _speed_table(comparison, ranges=False)),
        "",
        FirstThatFits(
            _numbers_table(comparison),
            Group(_numbers_table(comparison, names=False), *_worst_gradients(comparison)),
        ),
        "",
    ]
    if comparison.breakdown is not None:
        parts += [breakdown_table(comparison.breakdown), ""]
    for row in comparison.rows:
        if row.failed is not None:
            parts.append(sentence(f"{row.variant} failed: {_one_line(row.failed)}", "red"))
        parts += [sentence(f"{row.variant}: {note}", "yellow") for note in row.notes]
    parts.append(sentence(_ideal(comparison.ideal), "dim"))
    parts += [sentence(note, "dim") for note in comparison.notes]
    parts += [sentence(told, "bold") for told in comparison.verdict]
    return Group(*parts)


def _speed_table(comparison: Comparison, ranges: bool = True) -> Table:
    table = tables.plain_table()
    table.add_column("variant", no_wrap=True)
    table.add_column("ms/step", justify="right", no_wrap=True)
    if ranges:
        table.add_column("(range)", justify="right", no_wrap=True, style="dim")
    for heading in (
        f"{comparison.unit}/s",
        "x\neager",
        "x\nstock",
        "of\nideal",
        "peak\nMB",
        "compile\ns",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.rows:
        if row.failed is not None:
            table.add_row(row.variant, Text("failed", "red"), *[_NONE] * (7 if ranges else 6))
            continue
        assert row.step_ms_spread is not None
        low, high = row.step_ms_spread
        table.add_row(
            _name(row, comparison),
            figure(row.step_ms),
            *([f"{figure(low)}-{figure(high)}"] if ranges else []),
            _thousands(row.units_per_second),
            _ratio(row.speedup_vs_eager),
            _ratio(row.speedup_vs_best_stock),
            _NONE if row.of_ideal is None else f"{row.of_ideal:.0%}",
            _thousands(row.peak_memory_mb),
            _NONE if row.variant.startswith("eager") else f"{row.compile_seconds:.1f}",
            style=_style(row),
        )
    return table


def _numbers_table(comparison: Comparison, names: bool = True) -> Table:
    table = tables.plain_table()
    table.add_column("variant", no_wrap=True)
    for heading in ("output\nerror", "loss\nerror", "gradient\nerror"):
        table.add_column(heading, justify="right", no_wrap=True)
    if names:
        table.add_column("worst gradient", no_wrap=True)
    else:
        table.add_column("worst\ngrad.", justify="right", no_wrap=True)
    table.add_column(f"loss at\nstep {comparison.steps}", justify="right", no_wrap=True)
    table.add_column("learned", no_wrap=True)
    for row in comparison.rows:
        if row.final_loss is None:
            table.add_row(row.variant, *[_NONE] * 6)
            continue
        worst = _error(row.worst_gradient_error)
        errors: list[RenderableType] = [
            _error(row.output_error),
            _error(row.loss_error),
            _error(row.gradient_error),
            f"{worst} {row.worst_gradient}" if names and row.worst_gradient else worst,
        ]
        if row.variant == REFERENCE:
            errors = [Text("reference", "dim"), "", "", ""]
        table.add_row(
            _name(row, comparison),
            *errors,
            f"{row.final_loss:.4g}",
            "yes" if row.learned else Text("NO", "bold red"),
            style=_style(row),
        )
    return table


def limits_table(limits: Limits) -> Table:
    """What a machine can do at best."""
    table = tables.plain_table()
    table.add_column("limit", no_wrap=True)
    table.add_column("per second", justify="right", no_wrap=True)
    for dtype, rates in limits.gemm.items():
        for library, rate in rates.items():
            table.add_row(f"products in {dtype}, {library}", f"{_count(rate)}FLOP")
    table.add_row("update in place", f"{_count(limits.bandwidth)}B")
    for pages, touched in (("usual", limits.first_touch), ("huge", limits.first_touch_huge)):
        told = "unknown" if touched is None else f"{_count(touched)}B"
        table.add_row(f"first touch, {pages} pages", told)
    return table


def updates_table(costs: Sequence[UpdateCost]) -> Table:
    """What the updates of optimizers take."""
    table = tables.plain_table()
    table.add_column("optimizer", no_wrap=True)
    headings = "ms", "speedup", "moved", "of bandwidth", "resident"
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for cost in costs:
        share = _NONE if cost.of_bandwidth is None else f"{cost.of_bandwidth:.0%}"
        moved = _NONE if cost.moved is None else f"{cost.moved:.1f} B"
        speedup = _NONE if cost.speedup is None else figure(cost.speedup)
        row = cost.name, figure(cost.ms), speedup, moved, share, f"{cost.resident:.1f} B"
        table.add_row(*row, style="" if cost.name == cost.against else "green")
    return table


def _ideal(ideal: Ideal) -> str:
    return (
        f"Ideal step: {figure(ideal.step_ms)} ms, of which {figure(ideal.product_ms)} for "
        f"{_count(ideal.flops)}FLOP of products at {_count(ideal.peak)}FLOP/s ({ideal.dtype}, "
        f"{ideal.library}) and {figure(ideal.update_ms)} for an update of {_count(ideal.update_bytes)}B at "
        f"{_count(ideal.bandwidth)}B/s: what this machine was measured to do at best."
    )


def _worst_gradients(comparison: Comparison) -> list[Padding]:
    """The names for which a narrow table has no room."""
    variants: dict[str, list[str]] = {}
    for row in comparison.rows:
        if row.worst_gradient is not None:
            variants.setdefault(row.worst_gradient, []).append(row.variant)
    return [
        sentence(f"worst gradient of {', '.join(found)}: {name}", "dim")
        for name, found in variants.items()
    ]


def _name(row: Row, comparison: Comparison) -> str:
    return f"{row.variant} *" if row.variant == comparison.best_stock else row.variant


def _style(row: Row) -> str:
    if not row.learned:
        return "red"
    return "green" if row.kind == "optcpu" else ""


def _thousands(value: float | None) -> str:
    if value is None:
        return _NONE
    return f"{value:,.0f}" if value >= 100 else figure(value)


def _ratio(value: float | None) -> str:
    if value is None:
        return _NONE
    return f"{value:.2f}" if value >= 0.1 else figure(value)


def _error(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1e}"


def _count(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"


def _one_line(text: str) -> str:
    first = next((line.strip() for line in text.splitlines() if line.strip()), text)
    return first if len(first) <= 300 else first[:300] + " ..."


def verdict(comparison: Comparison) -> list[str]:
    """What the figures say about optcpu, for and against it, one sentence each."""
    best = comparison[comparison.best_stock]
    sentences = [f"* The fastest stock variant is {best.variant} ({figure(best.step_ms)} ms)."]
    for row in comparison.rows:
        if row.kind == "optcpu":
            sentences += _about(row, best, comparison.rows)
    return sentences


def _about(row: Row, best: Row, rows: Sequence[Row]) -> list[str]:
    if row.failed is not None:
        return [f"{row.variant} FAILED; the other figures say nothing about it."]
    if not row.learned:
        return [f"{row.variant} did NOT LEARN as eager-fp32 did: its speed means nothing."]
    sentences = [_speed(row, best)]
    for peer in rows:
        if peer.kind == "peer" and peer.learned and peer.rounds_ms:
            assert row.step_ms is not None
            assert peer.step_ms is not None
            sentences.append(_against(row.variant, peer.step_ms / row.step_ms, peer.variant))
    against = _losses(row, best, _eager_bf16(rows))
    if against:
        sentences.append(f"Against {row.variant}: {'; '.join(against)}.")
    return sentences


def _eager_bf16(rows: Sequence[Row]) -> Row | None:
    names = ("eager-bf16", "eager-bf16-tuned")
    return next((row for row in rows if row.variant in names and row.failed is None), None)


def _speed(row: Row, best: Row) -> str:
    assert row.speedup_vs_best_stock is not None
    against = _against(
        row.variant, row.speedup_vs_best_stock, f"the best stock variant ({best.variant})"
    )
    if best.variant == REFERENCE:
        return against
    return f"{against[:-1]}, and {_ratio(row.speedup_vs_eager)}x as fast as eager-fp32."


def _against(name: str, speedup: float, other: str) -> str:
    if abs(speedup - 1) <= _LEVEL:
        return f"{name} is level with {other}: {speedup:.2f}x, within the noise of a measurement."
    if speedup < 1:
        return f"{name} is SLOWER than {other}: {_ratio(speedup)}x its speed."
    return f"{name} is {speedup:.2f}x as fast as {other}."


def _losses(row: Row, best: Row, eager_bf16: Row | None) -> list[str]:
    """Where optcpu is worse, speed apart."""
    losses = []
    if eager_bf16 is not None:
        for what in ("output", "loss", "gradient"):
            own, other = (getattr(r, f"{what}_error") for r in (row, eager_bf16))
            # Not "own > ...", which a NaN would pass.
            if own is not None and other is not None and not own <= _NOTABLE_ERROR * other:
                losses.append(
                    f"its {what} error is LARGER than {eager_bf16.variant}'s "
                    f"({own:.1e} against {other:.1e})"
                )
    if row.peak_memory_mb and best.peak_memory_mb:
        factor = row.peak_memory_mb / best.peak_memory_mb
        if factor > _NOTABLE_MEMORY:
            losses.append(f"it needs {factor:.2f}x the memory of {best.variant}")
    assert row.compile_seconds is not None
    assert best.compile_seconds is not None
    longer = row.compile_seconds - best.compile_seconds
    if (
        longer > _NOTABLE_COMPILE_S
        and row.compile_seconds > _NOTABLE_COMPILE * best.compile_seconds
    ):
        losses.append(f"it compiles {longer:.0f} s longer than {best.variant}")
    return losses
