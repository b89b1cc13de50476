"""From what the workers told to the rows of the comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from optcpu.measure.result import Row, best_stock
from optcpu.measure.rounds import Measured, median_ratio
from optcpu.measure.variants import REFERENCE

# A variant has learned if its loss ends as close to eager FP32's as this share of what eager's loss
# fell by, or as this share of where it started, and if its parameters moved at least this share as
# far. BF16 rounding and other dropout masks stay well within; stale weights do not.
_OF_THE_FALL = 0.2
_OF_THE_START = 0.02
_OF_THE_MOVEMENT = 0.5


def rows_of(
    measured: Sequence[Measured], passes: int, units_per_step: float, ideal_ms: float
) -> tuple[list[Row], str]:
    """The rows, and the name of the fastest stock variant that learned.

    Args:
        measured: what the workers told; the reference among them.
        passes: steps that one pass over the batches takes.
        units_per_step: what ``Row.units_per_second`` counts.
        ideal_ms: of a step, ms.
    """
    reference = next(m for m in measured if m.variant.name == REFERENCE)
    rows = [_row(m, reference, passes, units_per_step) for m in measured]
    best = best_stock(rows)
    base = next(m for m in measured if m.variant.name == best)
    for row, m in zip(rows, measured, strict=True):
        if row.failed is None:
            row.speedup_vs_best_stock = median_ratio(base.rounds_s, m.rounds_s)
            assert row.step_ms is not None
            row.of_ideal = ideal_ms / row.step_ms
    return rows, best


def _row(m: Measured, reference: Measured, passes: int, units_per_step: float) -> Row:
    row = Row(m.variant.name, m.variant.kind, failed=m.failed, failure_log=m.log)
    if m.variant.note is not None:
        row.notes.append(m.variant.note)
    if m.preparation is None:
        return row
    _tell_preparation(row, m, reference, passes)
    if m.failed is not None:
        row.learned = False
        return row
    step_s = statistics.median(m.rounds_s)
    row.rounds_ms = [1e3 * seconds for seconds in m.rounds_s]
    row.step_ms = 1e3 * step_s
    row.step_ms_spread = (min(row.rounds_ms), max(row.rounds_ms))
    row.units_per_second = units_per_step / step_s
    row.speedup_vs_eager = median_ratio(reference.rounds_s, m.rounds_s)
    row.compile_seconds = sum(
        max(0.0, seconds - step_s) for seconds in _preparation(m)["first_seconds"]
    )
    row.peak_memory_mb = m.peak_mb
    row.memory_growth_mb = m.peak_mb - _preparation(m)["before_mb"]
    if not m.peak_is_of_training:
        row.notes.append("its peak memory includes compilation: this system cannot reset it")
    return row


def _preparation(m: Measured) -> dict[str, Any]:
    assert m.preparation is not None
    return m.preparation


def _tell_preparation(row: Row, m: Measured, reference: Measured, passes: int) -> None:
    told = _preparation(m)
    accuracy = told["accuracy"]
    row.notes += told["notes"]
    if accuracy is None:
        row.output_error = row.loss_error = row.gradient_error = row.worst_gradient_error = 0.0
    else:
        row.notes += accuracy["notes"]
        row.output_error = accuracy["output"]
        row.loss_error = accuracy["loss"]
        row.gradient_error = accuracy["gradient"]
        row.worst_gradient = accuracy["worst_gradient"]
        row.worst_gradient_error = accuracy["worst_gradient_error"]
    row.losses = told["losses"]
    row.first_loss, row.final_loss = _ends(row.losses, passes)
    row.movement = _movement(told["change_norms"], _preparation(reference)["change_norms"])
    problem = _not_differentiated(accuracy) or _not_learned(
        row, *_ends(_preparation(reference)["losses"], passes)
    )
    row.learned = problem is None
    if problem is not None:
        row.notes.append(problem)


def _not_differentiated(accuracy: dict[str, Any] | None) -> str | None:
    """Which gradients the variant lacks; a step that computes less is no faster one."""
    missing = accuracy["without_gradient"] if accuracy else []
    if not missing:
        return None
    return (
        f"lacks the gradients of {len(missing)} parameters that eager-fp32 has ({missing[0]}, ...)"
    )


def _ends(losses: Sequence[float], passes: int) -> tuple[float, float]:
    """Mean loss of the first and of the last pass over the batches, or half of the steps."""
    count = max(1, min(passes, len(losses) // 2))
    return statistics.fmean(losses[:count]), statistics.fmean(losses[-count:])


def _movement(changes: dict[str, float], reference: dict[str, float]) -> float:
    common = changes.keys() & reference.keys()
    expected = math.hypot(*(reference[name] for name in common))
    actual = math.hypot(*(changes[name] for name in common))
    if expected == 0.0:
        return 1.0 if actual == 0.0 else math.inf
    return actual / expected


def _not_learned(row: Row, eager_first: float, eager_final: float) -> str | None:
    """Why the variant did not train as eager FP32 did, or None if it did."""
    assert row.final_loss is not None
    assert row.movement is not None
    if not math.isfinite(row.final_loss):
        return f"did not learn: its loss became {row.final_loss}"
    tolerance = max(_OF_THE_FALL * abs(eager_first - eager_final), _OF_THE_START * abs(eager_first))
    if abs(row.final_loss - eager_final) > tolerance:
        return (
            f"did not learn as eager-fp32 did: its loss went from {row.first_loss:.4g} to "
            f"{row.final_loss:.4g}, eager-fp32's from {eager_first:.4g} to {eager_final:.4g}"
        )
    if not row.movement >= _OF_THE_MOVEMENT:
        return (
            f"did not learn as eager-fp32 did: its parameters moved {row.movement:.2g} times as far"
        )
    return None
