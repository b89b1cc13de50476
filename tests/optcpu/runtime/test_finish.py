"""Errors in what follows an optimizer step lose nothing, and what they left to do is done once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training import (
    Losses,
    assert_equal,
    logged_rows,
    small_data,
    small_model,
    small_trainer,
    tensors_of,
)

from optcpu import DynamicFreezer, Trainer
from optcpu.errors import OptcpuError
from optcpu.measure.batches import default_loss
from optcpu.runtime.checkpoint.folder import CheckpointFolder

FACTORS = [1.0, 0.9, 0.5, 0.4, 0.3]


class Table:
    """A scheduler's function, which knows some of the factors."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: FACTORS[: self.length][step]
        )


class HalfWay(torch.optim.lr_scheduler.LRScheduler):
    """Fails when it has set the learning rate."""

    fails_after: int | None = None

    def step(self, epoch: int | None = None) -> None:
        super().step()
        if self.last_epoch == self.fails_after:
            raise RuntimeError("half way")

    def get_lr(self) -> list[float]:
        return [group["lr"] * 0.5 for group in self.optimizer.param_groups]


class Counting(Losses):
    """Has a state of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = list(state["losses"])


def run_in(folder: Path, scheduler: Any, **given: Any) -> tuple[Trainer, Counting]:
    counting = Counting()
    trainer = small_trainer(
        scheduler=scheduler,
        checkpoints=folder / "checkpoints",
        log={"folder": folder / "log", "every_steps": 1},
        callbacks=[counting],
        **given,
    )
    return trainer, counting


@pytest.mark.parametrize("in_this_process", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_scheduler_that_fails(tmp_path: Path, length: int, in_this_process: bool) -> None:
    whole, expected = run_in(tmp_path / "whole", Table(5), validation_data=small_data(6))
    whole.train()
    table = Table(length)
    given: dict[str, Any] = {"validation_data": small_data(6)}
    trainer, counting = run_in(tmp_path / "on", table, **given)
    message = rf"the scheduler failed after step {length}: IndexError: list index .*Remedy: mend it"
    for _ in range(2):  # trained again without having been mended, it loses nothing either
        with pytest.raises(OptcpuError, match=message) as caught:
            trainer.train()
        assert isinstance(caught.value.__cause__, IndexError)
    saved = CheckpointFolder(tmp_path / "on" / "checkpoints").load()
    assert saved is not None
    assert saved.step == length
    table.length = 5
    if not in_this_process:
        trainer, counting = run_in(tmp_path / "on", table, model=small_model(9), **given)
    trainer.train()
    assert_equal(tensors_of(trainer), tensors_of(whole))
    assert trainer.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
    assert counting.losses == expected.losses
    assert logged_rows(tmp_path / "on" / "log") == logged_rows(tmp_path / "whole" / "log")


def test_a_learning_rate_that_was_set_half_way_is_put_back(tmp_path: Path) -> None:
    class Failing(HalfWay):
        fails_after = 2

    Failing.__name__ = "HalfWay"
    whole, _ = run_in(tmp_path / "whole", HalfWay)
    whole.train()
    with pytest.raises(OptcpuError, match="after step 2: RuntimeError: half way"):
        run_in(tmp_path / "on", Failing)[0].train()
    resumed, _ = run_in(tmp_path / "on", HalfWay, model=small_model(9))
    resumed.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))


def test_a_scheduler_that_fails_behind_a_skipped_step(tmp_path: Path) -> None:
    def nan_in_the_second(output: Any, batch: Any) -> Any:
        bad = len(callback.losses) == 1
        return default_loss(output, batch) * (float("nan") if bad else 1.0)

    given: dict[str, Any] = {"loss": nan_in_the_second, "on_nan": "skip"}
    whole, callback = run_in(tmp_path / "whole", Table(5), **given)
    whole.train()
    first, callback = run_in(tmp_path / "on", Table(2), **given)
    with pytest.raises(OptcpuError, match="after step 2: IndexError"):
        first.train()
    resumed, callback = run_in(tmp_path / "on", Table(5), **given)
    resumed.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))
    assert logged_rows(tmp_path / "on" / "log") == logged_rows(tmp_path / "whole" / "log")


def test_a_plateau_scheduler_that_fails_has_its_validation_made_again(tmp_path: Path) -> None:
    class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
        fails = False

        def step(self, metrics: Any, epoch: int | None = None) -> None:
            super().step(metrics)
            if self.fails and self.last_epoch == 1:
                raise ZeroDivisionError("mine")

    class Failing(Plateau):
        fails = True

    Failing.__name__ = "Plateau"
    given: dict[str, Any] = {"validation_data": small_data(6)}

    def plateau(kind: type[Plateau]) -> Any:
        return lambda optimizer: kind(optimizer, patience=0, threshold=1e9)

    whole, _ = run_in(tmp_path / "whole", plateau(Plateau), **given)
    whole.train()
    with pytest.raises(OptcpuError, match="after step 2: ZeroDivisionError: mine"):
        run_in(tmp_path / "on", plateau(Failing), **given)[0].train()
    resumed, _ = run_in(tmp_path / "on", plateau(Plateau), **given)
    resumed.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))
    assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
    assert logged_rows(tmp_path / "on" / "log") == logged_rows(tmp_path / "whole" / "log")


@pytest.mark.parametrize("at", [1, 4, 5, 6])
def test_a_freezer_that_fails(tmp_path: Path, at: int) -> None:
    class Freezer(DynamicFreezer):
        fails_at = 0

        def step(self) -> Any:
            if self.steps == self.fails_at:
                raise KeyError("mine")
            return super().step()

    def freezer(model: nn.Module, optimizer: torch.optim.Optimizer) -> Freezer:
        return Freezer(model, optimizer, window=2, patience=1, percentile=100.0, observe_every=1)

    def failing(model: nn.Module, optimizer: torch.optim.Optimizer) -> Freezer:
        made = freezer(model, optimizer)
        made.fails_at = at
        return made

    whole, _ = run_in(tmp_path / "whole", None, freezer=freezer, epochs=4)
    whole.train()
    with pytest.raises(OptcpuError, match=f"the freezer failed after step {at}: KeyError: 'mine'"):
        run_in(tmp_path / "on", None, freezer=failing, epochs=4)[0].train()
    resumed, _ = run_in(tmp_path / "on", None, freezer=freezer, epochs=4)
    resumed.train()
    assert whole.freezer is not None
    assert resumed.freezer is not None
    assert [event.step for event in whole.freezer.events] == [6]
    assert resumed.freezer.events == whole.freezer.events
    assert_equal(tensors_of(resumed), tensors_of(whole))


def test_freezes_are_told(capfd: pytest.CaptureFixture[str]) -> None:
    def freezer(model: nn.Module, optimizer: torch.optim.Optimizer) -> DynamicFreezer:
        return DynamicFreezer(model, optimizer, window=2, patience=1, percentile=100.0)

    trainer = small_trainer(freezer=freezer, epochs=4, progress=True)
    trainer.train()
    assert trainer.freezer is not None
    (event,) = trainer.freezer.events
    assert f"{event}\n" in capfd.readouterr().err
    assert small_trainer().freezer is None
