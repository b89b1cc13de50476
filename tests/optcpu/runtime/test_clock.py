from __future__ import annotations

import pytest

from optcpu.runtime.clock import Clock


def test_compiling_does_not_spoil_the_estimate() -> None:
    clock = Clock()
    assert clock.remaining(10, 0, 0) is None
    clock.add("compile", 30.0)
    for seconds in (1.0, 1.0, 1.2):
        clock.add("step", seconds)
    clock.add("validation", 5.0)
    assert clock.remaining(10, 2, 3) == pytest.approx(10 * 1.0 + 2 * 5.0)
    assert clock.seconds == pytest.approx(
        {"data": 0.0, "step": 3.2, "compile": 30.0, "validation": 5.0, "checkpoint": 0.0}
    )


def test_a_resumed_run_estimates_at_once() -> None:
    clock = Clock()
    clock.add("step", 2.0)
    resumed = Clock()
    resumed.load_state_dict(clock.state_dict())
    assert resumed.remaining(5, 1, 1) == pytest.approx(10.0)
    resumed.add("step", 4.0)
    assert resumed.seconds["step"] == pytest.approx(6.0)
    assert resumed.counts["step"] == 2


def test_what_raises_is_not_counted() -> None:
    clock = Clock()
    with pytest.raises(KeyError), clock.measure("checkpoint"):
        raise KeyError
    assert clock.counts["checkpoint"] == 0
    with clock.measure("checkpoint"):
        pass
    assert clock.counts["checkpoint"] == 1


def test_waiting_for_data_counts_as_it_comes() -> None:
    clock = Clock()
    clock.add("data", 60.0, is_typical=False)  # processes start
    assert clock.step_with_data() is None
    clock.add("step", 1.0)
    assert clock.step_with_data() == pytest.approx(1.0)
    for seconds in (4.0, 0.0, 0.0, 0.0):  # of four processes
        clock.add("data", seconds)
    assert clock.step_with_data() == pytest.approx(2.0)
    assert clock.remaining(10, 0, 0) == pytest.approx(20.0)
    assert clock.seconds["data"] == pytest.approx(64.0)


def test_a_state_without_data_is_of_an_older_version() -> None:
    state = Clock().state_dict()
    for part in state.values():
        del part["data"]
    clock = Clock()
    clock.load_state_dict(state)
    clock.add("data", 1.0)
    assert clock.counts["data"] == 1
