from __future__ import annotations

import math

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
