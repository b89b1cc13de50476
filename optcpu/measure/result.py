"""The figures of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from optcpu.measure import chart, export, report
from optcpu.measure.breakdown import Breakdown
from optcpu.measure.machine import Machine
from optcpu.measure.roofline import Limits
from optcpu.measure.variants import REFERENCE
from optcpu.measure.work import Ideal


@dataclass
class Row:
    """What one variant showed. A figure is None where the variant failed before it was measured.

    Attributes:
        variant: its name.
        kind: ``"stock"`` (plain PyTorch), ``"optcpu"`` or ``"peer"``.
        step_ms: time of an optimizer step, median over the rounds, ms.
        step_ms_spread: the same in the fastest and in the slowest round, ms.
        rounds_ms: the same in each round, ms.
        units_per_second: samples (or what ``unit`` says) trained on per second.
        speedup_vs_eager: median over the rounds of eager FP32's step time over this one's.
        speedup_vs_best_stock: the same for the fastest stock variant.
        of_ideal: the ideal step's time over this one's; see :class:`optcpu.measure.work.Ideal`.
        peak_memory_mb: most resident memory of the process while it trained, compilation left out
            where the system lets a process reset that figure (Linux), MiB.
        memory_growth_mb: that, less what was resident before the model was loaded (Python, torch,
            the compiler's own code), MiB.
        compile_seconds: what the first steps took beyond a steady one.
        output_error: relative L2 error of the first step's output against eager FP32.
        loss_error: the same of its loss.
        gradient_error: the same over all of its gradients.
        worst_gradient: name of the parameter whose gradient has the largest error.
        worst_gradient_error: that error.
        first_loss: mean loss of the learning check's first pass over the batches (of the first half
            of its steps, where they are fewer than two passes).
        final_loss: mean loss of its last pass over the batches (or of the second half).
        losses: the loss of each of its steps.
        movement: how far the parameters moved in it, relative to eager FP32 (L2 norm).
        learned: whether loss and movement followed eager FP32's, and no gradient was missing.
        failed: why the variant has no figures, in one line; None if it has them.
        failure_log: the traceback or the end of the output, where it failed.
        notes: what a reader must know about these figures.
    """

    variant: str
    kind: str
    step_ms: float | None = None
    step_ms_spread: tuple[float, float] | None = None
    rounds_ms: list[float] = field(default_factory=list)
    units_per_second: float | None = None
    speedup_vs_eager: float | None = None
    speedup_vs_best_stock: float | None = None
    of_ideal: float | None = None
    peak_memory_mb: float | None = None
    memory_growth_mb: float | None = None
    compile_seconds: float | None = None
    output_error: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    worst_gradient: str | None = None
    worst_gradient_error: float | None = None
    first_loss: float | None = None
    final_loss: float | None = None
    losses: list[float] = field(default_factory=list)
    movement: float | None = None
    learned: bool = False
    failed: str | None = None
    failure_log: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    """Every variant's figures, side by side.

    ``print(comparison)`` shows them as a table; so does ``rich.print``.

    Attributes:
        name: what was trained.
        rows: one per variant, the reference ``eager-fp32`` first.
        best_stock: name of the fastest stock variant that learned.
        machine: what it ran on.
        unit: what ``units_per_second`` counts.
        steps: optimizer steps of the learning check.
        accumulation_steps: batches per optimizer step.
        parameters: number of trainable values in the model.
        ideal: the least time that a step can take on this machine.
        limits: what this machine can do at best, on which that is based.
        notes: what a reader must know about the whole comparison.
        breakdown: where a step of the fastest variant of optcpu spends its time; None if there is none.
    """

    name: str
    rows: list[Row]
    best_stock: str
    machine: Machine
    unit: str
    steps: int
    accumulation_steps: int
    parameters: int
    ideal: Ideal
    limits: Limits
    notes: list[str]
    breakdown: Breakdown | None = None

    def __getitem__(self, variant: str) -> Row:
        """The row of a variant.

        Raises:
            KeyError: if it was not measured.
        """
        for row in self.rows:
            if row.variant == variant:
                return row
        measured = ", ".join(row.variant for row in self.rows)
        raise KeyError(f"{variant!r} was not measured; measured: {measured}")

    @property
    def verdict(self) -> list[str]:
        """What the figures say about optcpu, for and against it, one sentence each."""
        return report.verdict(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain Python types; NaN and infinities stay floats."""
        return {**asdict(self), "ideal_ms": self.ideal.step_ms, "verdict": self.verdict}

    def to_json(self, path: str | Path | None = None) -> str:
        """The comparison as JSON (NaN and infinities become null), also written to ``path``.

        Raises:
            ValueError: ``path`` ends in another suffix than ``.json``.
            OptcpuError: the file cannot be written.
        """
        return export.to_json(self, path)

    def to_csv(self, path: str | Path | None = None) -> str:
        """The rows as CSV, one line per variant, also written to ``path``.

        Raises:
            ValueError: ``path`` ends in another suffix than ``.csv``.
            OptcpuError: the file cannot be written.
        """
        return export.to_csv(self, path)

    def plot(self, path: str | Path) -> Path:
        """Draw step time, peak memory and gradient error as a PNG chart.

        Returns:
            Where it was written to.

        Raises:
            ValueError: ``path`` ends in another suffix than ``.png``.
            OptcpuError: matplotlib is not installed, or the file cannot be written.
        """
        return chart.plot(self, path)

    def __rich__(self) -> RenderableType:
        return report.render(self)

    def __str__(self) -> str:
        return report.to_text(self)


def best_stock(rows: Sequence[Row]) -> str:
    """The fastest stock variant that learned; the reference where none has."""
    candidates = {
        row.variant: row.step_ms
        for row in rows
        if row.kind == "stock" and row.learned and row.step_ms is not None
    }
    return min(candidates, key=lambda name: candidates[name], default=REFERENCE)
