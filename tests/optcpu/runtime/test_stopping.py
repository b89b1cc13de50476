from __future__ import annotations

import math

import pytest

from optcpu.runtime.options import EarlyStopping
from optcpu.runtime.stopping import Stopper, is_better


def _validations(stopper: Stopper, *values: float) -> list[bool]:
    name = stopper.options.monitor
    return [stopper.reason_to_stop({name: value}) is not None for value in values]


def test_patience_and_min_delta() -> None:
    stopper = Stopper(EarlyStopping(patience=2, min_delta=0.1))
    assert _validations(stopper, 1.0, 0.95, 0.8, 0.75, 0.71) == [False, False, False, False, True]


def test_more_may_be_better() -> None:
    stopper = Stopper(EarlyStopping(monitor="accuracy", mode="max", patience=1))
    assert _validations(stopper, 0.5, 0.6, 0.6) == [False, False, True]
    assert stopper.best == 0.6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_no_number_stops_at_once_if_wanted(value: float) -> None:
    assert Stopper(EarlyStopping()).reason_to_stop({"loss": value}) == f"loss is {value}"
    lenient = Stopper(EarlyStopping(check_finite=False, patience=2))
    assert _validations(lenient, math.nan, 1.0, math.nan, math.nan) == [False, False, False, True]


def test_the_reason_is_told() -> None:
    stopper = Stopper(EarlyStopping(patience=1))
    stopper.reason_to_stop({"loss": 1.0})
    assert stopper.reason_to_stop({"loss": 2.0}) == (
        "loss has not improved in 1 validations (best 1, now 2)"
    )


def test_it_goes_on_from_its_state() -> None:
    stopper = Stopper(EarlyStopping(patience=2))
    _validations(stopper, 1.0, 2.0)
    resumed = Stopper(EarlyStopping(patience=2))
    resumed.load_state_dict(stopper.state_dict())
    assert _validations(resumed, 2.0) == [True]


def test_is_better() -> None:
    assert is_better(1.0, None, "min")
    assert is_better(1.0, math.nan, "max")
    assert not is_better(math.nan, None, "min")
    assert not is_better(math.inf, 1.0, "max")
    assert not is_better(-math.inf, None, "min")
    assert not is_better(1.0, 1.0, "max")


def test_what_another_metric_was_is_forgotten() -> None:
    stopper = Stopper(EarlyStopping(monitor="accuracy", mode="max", patience=2))
    _validations(stopper, 0.5, 0.4)
    other, stricter = (
        Stopper(EarlyStopping(patience=2)),
        Stopper(EarlyStopping(monitor="accuracy", mode="max", patience=1)),
    )
    other.load_state_dict(stopper.state_dict())
    assert (other.best, other.waited) == (None, 0)
    stricter.load_state_dict(stopper.state_dict())
    assert (stricter.best, stricter.waited) == (0.5, 1)
