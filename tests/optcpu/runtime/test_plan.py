"""How long a run is, when it begins and when it goes on with other settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import optcpu
from optcpu.runtime import Callback
from optcpu.runtime.plan import Plan


def test_a_new_run() -> None:
    assert Plan.of(10, 4, 3, None).total == 9  # the third step of an epoch has two micro-batches
    assert Plan.of(10, 4, None, 7).total == 7
    assert Plan.of(None, 4, 3, None).total is None


@pytest.mark.parametrize(
    ("plan", "total"),
    [
        (Plan.of(10, 4, 3, None), 9),
        (Plan.of(10, 4, 5, None), 15),
        (Plan.of(5, 2, 3, None), 9),  # as many steps an epoch
        (Plan.of(20, 4, 3, None), 4 + 3 + 5),  # what is left of the second epoch, and the third
        (Plan.of(20, 4, 1, None), 4),  # over already
        (Plan.of(10, 4, None, 20), 20),
        (Plan.of(None, 4, 3, None), None),
    ],
)
def test_a_run_that_goes_on(plan: Plan, total: int | None) -> None:
    saved = Plan.of(10, 4, 3, None).state_dict()
    assert plan.after(saved, step=4, epoch=1, batches_left=12).total == total


def test_going_on_twice_changes_nothing_more() -> None:
    first, other = Plan.of(10, 4, 3, None), Plan.of(20, 4, 3, None)
    once = other.after(first.state_dict(), step=4, epoch=1, batches_left=12)
    again = other.after(once.state_dict(), step=9, epoch=2, batches_left=12)
    assert again == once


class _StopAt(Callback):
    def __init__(self, step: int | None) -> None:
        self.step = step
        self.rates: list[float] = []

    def on_step_end(self, trainer: optcpu.Trainer, metrics: dict[str, float]) -> None:
        self.rates.append(metrics["lr"])
        if len(self.rates) == self.step:
            trainer.stop()


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (16, 1), (4, 1), (8, 2), (8, 3)])
def test_the_schedule_ends_with_the_run(batch_size: int, accumulation: int, tmp_path: Path) -> None:
    """Whatever a step is from then on."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 6), torch.randint(3, (64,)))

    def run(stop: int | None, batch_size: int, accumulation: int) -> tuple[int, list[float]]:
        callback = _StopAt(stop)
        trainer = optcpu.Trainer(
            nn.Linear(6, 3),
            data,
            epochs=6,
            batch_size=batch_size,
            accumulation_steps=accumulation,
            lr=1.0,
            scheduler={"name": "linear"},
            checkpoints=tmp_path,
            callbacks=[callback],
            compile=False,
            progress=False,
        )
        return trainer.train().steps, callback.rates

    run(20, 8, 1)  # within the third of six epochs of eight steps
    steps, rates = run(None, batch_size, accumulation)
    assert steps == 20 + len(rates)
    assert rates == sorted(rates, reverse=True)
    assert rates[-2:] == pytest.approx([2 / steps, 1 / steps])
