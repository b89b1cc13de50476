"""Comparisons of several workloads in one table: where optcpu stands against what else one could use."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from optcpu.measure import export, suite_chart, suite_table
from optcpu.measure.machine import Machine
from optcpu.measure.result import Comparison, Row
from optcpu.measure.rounds import median_ratio
from optcpu.measure.variants import REFERENCE


@dataclass(frozen=True)
class Ratio:
    """How many times faster optcpu is than another variant, by step time.

    Attributes:
        variant: the other one.
        times: median over the rounds of the ratio within a round.
    """

    variant: str
    times: float


@dataclass(frozen=True)
class Standing:
    """Where optcpu stands in a comparison.

    Attributes:
        variant: ``optcpu+optimizer`` if it learned, else ``optcpu``; not the faster of the two, which
            would count the noise of a measurement in its favour.
        step_ms: time of its optimizer step, ms.
        eager: against eager FP32.
        compiled: against ``torch.compile`` as it comes, in BF16 if that was measured; None if it failed.
        best_stock: against the fastest stock variant, those with a tuned allocator among them.
        best_peer: against the fastest peer that learned; None without any.
        of_ideal: the ideal step's time over its own; see :class:`optcpu.measure.work.Ideal`.
        memory: its peak memory over that of the fastest stock variant.
    """

    variant: str
    step_ms: float
    eager: Ratio
    compiled: Ratio | None
    best_stock: Ratio
    best_peer: Ratio | None
    of_ideal: float
    memory: float


@dataclass
class Entry:
    """A workload of the suite.

    Attributes:
        name: of the workload.
        comparison: its figures; None if it could not be compared.
        failed: why not, in one line.
    """

    name: str
    comparison: Comparison | None = None
    failed: str | None = None

    @property
    def standing(self) -> Standing | None:
        """Where optcpu stands; None if nothing of it was measured, or it did not learn."""
        return None if self.comparison is None else standing_in(self.comparison)

    @property
    def problem(self) -> str | None:
        """Why there is no standing, in one line; None if there is one."""
        if self.comparison is None:
            return self.failed
        if self.standing is not None:
            return None
        own = [row for row in self.comparison.rows if row.kind == "optcpu"]
        told = (row.failed or "; ".join(row.notes) or "did not learn" for row in own)
        return next(told, "optcpu was not among the variants")


@dataclass
class Suite:
    """The figures of several workloads.

    ``print(suite)`` shows where optcpu stands in each.

    Attributes:
        machine: what they were measured on.
        entries: one a workload.
    """

    machine: Machine
    entries: list[Entry] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain Python types."""
        return {
            "machine": asdict(self.machine),
            "workloads": [
                {
                    "name": entry.name,
                    "problem": entry.problem,
                    "standing": None if entry.standing is None else asdict(entry.standing),
                    "comparison": None if entry.comparison is None else entry.comparison.to_dict(),
                }
                for entry in self.entries
            ],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The suite as JSON (NaN and infinities become null), also written to ``path``.

        Raises:
            ValueError: ``path`` ends in another suffix than ``.json``.
            OptcpuError: the file cannot be written.
        """
        return export.to_json(self, path)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """The table in Markdown, with the machine described, also written to ``path``.

        Raises:
            ValueError: ``path`` ends in another suffix than ``.md``.
            OptcpuError: the file cannot be written.
        """
        return suite_table.to_markdown(self, path)

    def plot(self, path: str | Path) -> Path:
        """Draw how many times faster than eager FP32 each kind of variant is, as a PNG chart.

        Raises:
            ValueError: ``path`` ends in another suffix than ``.png``.
            OptcpuError: matplotlib is not installed, or the file cannot be written.
        """
        return suite_chart.plot(self, path)

    def __rich__(self) -> RenderableType:
        return suite_table.render(self)

    def __str__(self) -> str:
        return suite_table.to_text(self)


def standing_in(comparison: Comparison) -> Standing | None:
    """Where optcpu stands in ``comparison``; None if no variant of it was measured and learned."""
    candidates = {row.variant: row for row in _learned(comparison, "optcpu")}
    own = candidates.get("optcpu+optimizer", candidates.get("optcpu"))
    if own is None:
        return None
    best = comparison[comparison.best_stock]
    names = [row.variant for row in comparison.rows if row.learned and row.rounds_ms]
    stock = next((name for name in ("compiled-bf16", "compiled-fp32") if name in names), None)
    peers = _learned(comparison, "peer")
    peer = min(peers, key=lambda row: row.step_ms or 0.0, default=None)
    assert own.step_ms is not None
    assert own.of_ideal is not None
    assert own.peak_memory_mb is not None
    assert best.peak_memory_mb is not None
    return Standing(
        variant=own.variant,
        step_ms=own.step_ms,
        eager=_ratio(comparison[REFERENCE], own),
        compiled=None if stock is None else _ratio(comparison[stock], own),
        best_stock=_ratio(best, own),
        best_peer=None if peer is None else _ratio(peer, own),
        of_ideal=own.of_ideal,
        memory=own.peak_memory_mb / best.peak_memory_mb,
    )


def _learned(comparison: Comparison, kind: str) -> list[Row]:
    return [row for row in comparison.rows if row.kind == kind and row.learned and row.rounds_ms]


def _ratio(other: Row, own: Row) -> Ratio:
    return Ratio(other.variant, median_ratio(other.rounds_ms, own.rounds_ms))
