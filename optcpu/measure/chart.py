"""A comparison as a PNG chart: step time, peak memory and gradient error, one bar per variant."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optcpu import files
from optcpu.errors import OptcpuError
from optcpu.measure.numbers import figure
from optcpu.measure.variants import REFERENCE

if TYPE_CHECKING:
    from optcpu.measure.result import Comparison, Row

COLOURS = {
    "stock": "#a9b4c0",
    "best stock": "#5b6b7b",
    "peer": "#d9b44a",
    "optcpu": "#1b7fbd",
}
_BAD = "#c0392b"
TEXT = "#25313c"
TEXT_DIM = "#66727e"
_LOG_TICKS = 5


def plot(comparison: Comparison, path: str | Path) -> Path:
    """Write the chart; see :meth:`Comparison.plot`."""
    target = files.path_for(path, "plot", "a PNG image", ".png")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptcpuError(
            "drawing the chart needs matplotlib, which is not installed: pip install optcpu[plot]"
        ) from error
    # A figure of its own: pyplot keeps global state and may want a display.
    chart = Figure(figsize=(13, 2.0 + 0.42 * len(comparison.rows)), layout="constrained", dpi=150)
    times, memory, errors = chart.subplots(
        1, 3, sharey=True, gridspec_kw={"width_ratios": [2.2, 1.2, 1.2]}
    )
    # parse_math: a dollar sign in a name is no formula.
    chart.suptitle(comparison.name, fontsize=13, fontweight="bold", color=TEXT, parse_math=False)
    chart.supxlabel(str(comparison.machine), fontsize=9, color=TEXT_DIM)
    _draw_times(times, comparison)
    _draw_memory(memory, comparison)
    _draw_errors(errors, comparison)
    image = io.BytesIO()
    chart.savefig(image, format="png")
    files.write(target, image.getvalue(), "plot")
    return target


def _draw_times(axes: Any, comparison: Comparison) -> None:
    _set_up(axes, comparison, "time of a training step, ms (line: fastest to slowest round)")
    for index, row in enumerate(comparison.rows):
        if row.step_ms is None or row.step_ms_spread is None:
            _say(axes, index, "failed", _BAD)
            continue
        axes.barh(index, row.step_ms, color=_colour(row, comparison), height=0.68)
        axes.plot(row.step_ms_spread, [index, index], color=TEXT, linewidth=1.4)
        told = f"{row.speedup_vs_eager:.2f}x eager" if row.learned else "did not learn"
        _label(axes, max(row.step_ms_spread), index, f"{figure(row.step_ms)}   {told}", row)
    axes.set_xlim(0, 1.4 * max(axes.get_xlim()[1], 1e-9))


def _draw_memory(axes: Any, comparison: Comparison) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    _set_up(axes, comparison, "peak memory while training, MB")
    for index, row in enumerate(comparison.rows):
        if row.peak_memory_mb is not None:
            axes.barh(index, row.peak_memory_mb, color=_colour(row, comparison), height=0.68)
            _label(axes, row.peak_memory_mb, index, f"{row.peak_memory_mb:,.0f}", row)
    axes.set_xlim(0, 1.3 * max(axes.get_xlim()[1], 1e-9))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _draw_errors(axes: Any, comparison: Comparison) -> None:
    from matplotlib.ticker import NullLocator

    _set_up(axes, comparison, "relative error of the gradients (log scale)")
    shown: list[float] = []
    for index, row in enumerate(comparison.rows):
        if row.variant == REFERENCE:
            _say(axes, index, "reference", TEXT_DIM)
        elif row.gradient_error is not None and 0 < row.gradient_error < math.inf:
            # A point: on a logarithmic scale the length of a bar means nothing.
            axes.plot(row.gradient_error, index, "o", color=_colour(row, comparison), markersize=8)
            _label(axes, row.gradient_error, index, f"  {row.gradient_error:.1e}", row)
            shown.append(row.gradient_error)
        elif row.gradient_error is not None:
            _say(axes, index, f"{row.gradient_error:g}", TEXT)
    axes.set_xscale("log")
    if shown:
        low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
        axes.set_xlim(10.0 ** (low - 0.2), 10.0 ** (high + 0.45 * max(high - low, 1)))
        spacing = math.ceil((high - low + 1) / _LOG_TICKS)
        axes.set_xticks([10.0**power for power in range(low, high + 1, spacing)])
    axes.xaxis.set_minor_locator(NullLocator())


def _colour(row: Row, comparison: Comparison) -> str:
    if not row.learned:
        return _BAD
    return COLOURS["best stock" if row.variant == comparison.best_stock else row.kind]


def _label(axes: Any, x: float, index: int, text: str, row: Row) -> None:
    axes.annotate(
        text,
        (x, index),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=TEXT,
        fontweight="bold" if row.kind == "optcpu" else "normal",
    )


def _say(axes: Any, index: int, text: str, colour: str) -> None:
    axes.annotate(
        text,
        (0, index),
        xycoords=("axes fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=colour,
    )


def _set_up(axes: Any, comparison: Comparison, title: str) -> None:
    names = [
        f"{row.variant} (best stock)" if row.variant == comparison.best_stock else row.variant
        for row in comparison.rows
    ]
    set_up_axes(axes, names, title)


def set_up_axes(axes: Any, names: Sequence[str], title: str) -> None:
    """Axes for horizontal bars, one for each of ``names``, from the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_title(title, fontsize=9.5, color=TEXT, loc="left")
    axes.tick_params(length=0, labelsize=9, labelcolor=TEXT)
    axes.tick_params(axis="x", labelcolor=TEXT_DIM)
    axes.grid(axis="x", color="#e3e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
