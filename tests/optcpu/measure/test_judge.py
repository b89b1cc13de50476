from __future__ import annotations

import math
from typing import Any

import pytest

from optcpu.measure.judge import rows_of
from optcpu.measure.rounds import Measured
from optcpu.measure.variants import VARIANTS

FALL = [5.0, 3.0, 2.0, 1.0]


def measured(variant: str, rounds_s: list[float], **told: Any) -> Measured:
    preparation: dict[str, Any] = {
        "first_seconds": [0.5],
        "step_seconds": 0.1,
        "losses": FALL,
        "change_norms": {"w": 1.0},
        "accuracy": None,
        "before_mb": 300.0,
        "resident_mb": 500.0,
        "notes": [],
    }
    return Measured(VARIANTS[variant], preparation | told, rounds_s, peak_mb=900.0)


EAGER = measured("eager-fp32", [0.4, 0.2, 0.4])


def test_ratios_are_medians_of_the_rounds_and_not_ratios_of_medians() -> None:
    rows, best = rows_of([EAGER, measured("compiled-bf16", [0.1, 0.1, 0.2])], 1, 64, ideal_ms=40)
    assert best == "compiled-bf16"
    # By round 4, 2 and 2; the ratio of the medians is 4.
    assert rows[1].speedup_vs_eager == pytest.approx(2.0)
    assert rows[0].speedup_vs_best_stock == pytest.approx(0.5)
    assert rows[1].speedup_vs_best_stock == 1.0
    assert rows[1].step_ms == pytest.approx(100.0)
    assert rows[1].step_ms_spread == pytest.approx((100.0, 200.0))
    assert rows[1].units_per_second == pytest.approx(640.0)
    assert rows[1].memory_growth_mb == 600.0


def test_compile_time_is_what_first_steps_take_beyond_a_steady_one() -> None:
    optcpu = measured("optcpu", [0.1] * 3, first_seconds=[9.1, 0.6, 0.05])
    rows, _ = rows_of([EAGER, optcpu], 1, 1, ideal_ms=40)
    assert rows[1].of_ideal == pytest.approx(0.4)
    assert rows[1].compile_seconds == pytest.approx(9.0 + 0.5)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"losses": [5.0, 5.0, 5.0, 5.0]}, "its loss went from 5 to 5, eager-fp32's from 5 to 1"),
        ({"losses": [5.0, 3.0, 2.0, math.nan]}, "its loss became nan"),
        ({"losses": [5.0, 3.0, 2.0, 2.0]}, "its loss went from 5 to 2"),
        ({"change_norms": {"w": 0.01}}, "its parameters moved 0.01 times as far"),
        ({"change_norms": {"w": math.nan}}, "its parameters moved nan times as far"),
    ],
)
def test_what_does_not_learn_is_flagged_and_is_not_the_best(
    told: dict[str, Any], reason: str
) -> None:
    rows, best = rows_of([EAGER, measured("compiled-bf16", [0.01] * 3, **told)], 1, 1, ideal_ms=40)
    assert not rows[1].learned
    assert reason in rows[1].notes[0]
    assert best == "eager-fp32"


@pytest.mark.parametrize("last", [0.8, 1.0, 1.3])
def test_rounding_is_not_flagged(last: float) -> None:
    told = {"losses": [5.0, 3.0, 2.0, last], "change_norms": {"w": 0.97}}
    rows, _ = rows_of([EAGER, measured("compiled-bf16", [0.1] * 3, **told)], 1, 1, ideal_ms=40)
    assert rows[1].learned
    assert rows[1].notes == []


def test_losses_are_means_of_a_pass_over_the_batches() -> None:
    rows, _ = rows_of([EAGER], 2, 1, ideal_ms=40)
    assert (rows[0].first_loss, rows[0].final_loss) == (4.0, 1.5)
    rows, _ = rows_of([EAGER], 3, 1, ideal_ms=40)  # fewer steps than two passes: halves
    assert (rows[0].first_loss, rows[0].final_loss) == (4.0, 1.5)


def test_one_that_failed_has_its_reason_and_no_figures() -> None:
    early = Measured(VARIANTS["optcpu"], failed="RuntimeError: no", log="Traceback ...")
    late = measured("compiled-fp32", [0.1])
    late.failed = "the worker process was ended by SIGKILL"
    rows, best = rows_of([EAGER, early, late], 1, 1, ideal_ms=40)
    assert best == "eager-fp32"
    assert (rows[1].failed, rows[1].failure_log) == ("RuntimeError: no", "Traceback ...")
    assert rows[1].final_loss is None
    assert rows[2].final_loss == 1.0
    assert rows[2].step_ms is None
    assert not rows[2].learned


def test_a_peer_is_never_the_best_stock_variant() -> None:
    _, best = rows_of([EAGER, measured("ipex", [0.01] * 3)], 1, 1, ideal_ms=40)
    assert best == "eager-fp32"


ACCURACY: dict[str, Any] = {
    "output": 1e-3,
    "loss": 1e-4,
    "gradient": 1e-2,
    "worst_gradient": "w",
    "worst_gradient_error": 0.1,
    "without_gradient": [],
    "notes": ["a note"],
}


def test_what_lacks_gradients_is_not_the_best() -> None:
    told = {"accuracy": ACCURACY | {"without_gradient": ["a", "b"]}}
    rows, best = rows_of([EAGER, measured("compiled-fp32", [0.01] * 3, **told)], 1, 1, ideal_ms=40)
    assert best == "eager-fp32"
    assert rows[1].notes[-1] == "lacks the gradients of 2 parameters that eager-fp32 has (a, ...)"


def test_errors_are_taken_over() -> None:
    rows, _ = rows_of([EAGER, measured("optcpu", [0.1] * 3, accuracy=ACCURACY)], 1, 1, ideal_ms=40)
    assert (rows[1].output_error, rows[1].loss_error, rows[1].gradient_error) == (1e-3, 1e-4, 1e-2)
    assert (rows[1].worst_gradient, rows[1].worst_gradient_error) == ("w", 0.1)
    assert rows[1].notes == ["a note"]
