from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from optcpu.runtime.options import ScheduleOptions
from optcpu.runtime.schedule import factor, make_schedule


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)


def test_cosine_after_warm_up_by_hand() -> None:
    options = ScheduleOptions(name="cosine", warmup_steps=4, final=0.1)
    factors = [factor(step, options, 12) for step in (0, 1, 3, 4, 8, 12, 20)]
    middle = 0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2
    assert factors == pytest.approx([0.25, 0.5, 1.0, 1.0, middle, 0.1, 0.1])


def test_linear_and_constant_by_hand() -> None:
    linear = ScheduleOptions(name="linear")
    assert [factor(step, linear, 4) for step in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    constant = ScheduleOptions(warmup_steps=2)
    assert [factor(step, constant, None) for step in range(4)] == [0.5, 1, 1, 1]


def test_the_scheduler_sets_the_learning_rate() -> None:
    optimizer = _optimizer()
    schedule = make_schedule(optimizer, ScheduleOptions(name="linear"), 4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_a_schedule_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="give steps instead of epochs"):
        make_schedule(_optimizer(), ScheduleOptions(name="cosine"), None)
    with pytest.raises(ValueError, match="warmup_steps is 10, but there are only 10 steps"):
        make_schedule(_optimizer(), ScheduleOptions(warmup_steps=10), 10)


def test_a_rate_that_someone_has_set_stays_where_the_schedule_is_flat() -> None:
    optimizer = _optimizer()
    schedule = make_schedule(optimizer, ScheduleOptions(warmup_steps=2), None)
    rates = []
    for step in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        if step in (0, 3):
            optimizer.param_groups[0]["lr"] = 7.0
        optimizer.step()
        schedule.step()
    assert rates == [1.0, 2.0, 2.0, 2.0, 7.0]


@pytest.mark.parametrize(
    ("lr", "total", "expected"), [(2.0, 4, [9.0, 0.5]), (2.0, 8, [1.5, 1.25]), (4.0, 4, [2.0, 1.0])]
)
def test_a_run_goes_on_by_what_is_set_now(lr: float, total: int, expected: list[float]) -> None:
    """As it was if nothing has changed, a callback's rate included; else by the new settings."""
    options = ScheduleOptions(name="linear")
    first = _optimizer()
    schedule = make_schedule(first, options, 4)
    for _ in range(2):
        first.step()
        schedule.step()
    first.param_groups[0]["lr"] = 9.0
    second = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    resumed = make_schedule(second, options, total)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    rates = [second.param_groups[0]["lr"]]
    second.step()
    resumed.step()
    assert [*rates, second.param_groups[0]["lr"]] == pytest.approx(expected)


@pytest.mark.parametrize(("name", "last"), [("linear", 0.5), ("constant", 1.0)])
def test_a_group_that_is_added_follows_from_its_own_rate(name: Any, last: float) -> None:
    optimizer = _optimizer()
    schedule = make_schedule(optimizer, ScheduleOptions(name=name), 4)
    for step in range(2):
        if step == 1:
            optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 8.0})
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [2.0 * last, 8.0 * last]
    assert schedule.state_dict()["base_lrs"] == [2.0, 8.0]
    schedule.end_at(2)
    optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 1.0})
    assert schedule.state_dict()["base_lrs"] == [2.0, 8.0, 1.0]
    schedule.end_at(8)
    assert len(schedule.get_last_lr()) == 3


def _after_a_run(scheduled: bool) -> torch.optim.Optimizer:
    """An optimizer whose rate somebody has brought from 2 to 1, of a linear course to 0."""
    optimizer = _optimizer()
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    if scheduled:
        scheduler = make_schedule(optimizer, ScheduleOptions(name="linear"), 4)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 1.0
    return optimizer


@pytest.mark.parametrize("name", ["constant", "linear"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_rate_set_after_another_scheduler_is_where_a_schedule_begins(
    scheduled: bool, name: Any
) -> None:
    optimizer = _after_a_run(scheduled)
    optimizer.param_groups[0]["lr"] = 0.25
    schedule = make_schedule(optimizer, ScheduleOptions(name=name), 4)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert schedule.base_lrs == [0.25]


@pytest.mark.parametrize(
    ("scheduled", "name", "begins"),
    [
        (True, "linear", 2.0),
        (True, "constant", 1.0),
        (False, "linear", 1.0),
        (False, "constant", 1.0),
    ],
)
def test_what_a_scheduler_has_left(scheduled: bool, name: Any, begins: float) -> None:
    """A schedule that follows a schedule begins as that did; without one the rate stays."""
    optimizer = _after_a_run(scheduled)
    make_schedule(optimizer, ScheduleOptions(name=name), 4)
    assert optimizer.param_groups[0]["lr"] == begins
