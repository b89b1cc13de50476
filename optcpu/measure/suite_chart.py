"""A suite as a PNG chart: how many times faster than eager FP32 each kind of variant is."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optcpu import files
from optcpu.errors import OptcpuError
from optcpu.measure.chart import COLOURS, TEXT, TEXT_DIM, set_up_axes

if TYPE_CHECKING:
    from optcpu.measure.suite import Standing, Suite

_BAR = 0.2  # high; four of them and a gap for each workload


def plot(suite: Suite, path: str | Path) -> Path:
    """Write the chart; see :meth:`Suite.plot`."""
    target = files.path_for(path, "plot", "a PNG image", ".png")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptcpuError(
            "drawing the chart needs matplotlib, which is not installed: pip install optcpu[plot]"
        ) from error
    height = 1.6 + 0.9 * len(suite.entries)
    chart = Figure(figsize=(9, height), layout="constrained", dpi=150)
    axes = chart.subplots()
    chart.supxlabel(str(suite.machine), fontsize=9, color=TEXT_DIM)
    names = [entry.name for entry in suite.entries]
    set_up_axes(axes, names, "times as fast as eager FP32 (training step)")
    for index, entry in enumerate(suite.entries):
        if entry.standing is None:
            axes.annotate("failed", (0, index), va="center", fontsize=9, color=TEXT)
        else:
            _draw(axes, index, entry.standing)
    axes.axvline(1.0, color=TEXT_DIM, linewidth=0.8)
    axes.set_xlim(0, 1.25 * max(axes.get_xlim()[1], 1.0))
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    chart.legend(
        unique.values(),
        unique.keys(),
        loc="outside upper right",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    image = io.BytesIO()
    chart.savefig(image, format="png")
    files.write(target, image.getvalue(), "plot")
    return target


def _draw(axes: Any, index: int, standing: Standing) -> None:
    """The bars of a workload, from the top: compiled, the best stock variant, the best peer, optcpu."""
    bars = (
        ("torch.compile", standing.compiled, COLOURS["stock"]),
        ("best stock variant", standing.best_stock, COLOURS["best stock"]),
        ("best peer", standing.best_peer, COLOURS["peer"]),
    )
    shown = [
        (label, standing.eager.times / ratio.times, colour)
        for label, ratio, colour in bars
        if ratio is not None
    ]
    shown.append(("optcpu", standing.eager.times, COLOURS["optcpu"]))
    for place, (label, times, colour) in enumerate(shown):
        y = index + (place - (len(shown) - 1) / 2) * _BAR
        axes.barh(y, times, color=colour, height=0.9 * _BAR, label=label)
        axes.annotate(
            f"{times:.2f}",
            (times, y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=TEXT,
            fontweight="bold" if label == "optcpu" else "normal",
        )
