"""Updates in the backward pass come while a trainer trains, and neither before nor after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import assert_equal, small_data, small_model, small_trainer, tensors_of

from optcpu import DynamicFreezer, Trainer
from optcpu.errors import OptcpuError
from optcpu.measure.batches import default_loss
from optcpu.optim import SGD
from optcpu.runtime.updates import updates_in_backward

LOOKAHEAD: dict[str, Any] = {"optimizer": {"name": "adamw", "lookahead": {"k": 2}}}


class StopIn:
    """A loss that stops the trainer in certain micro-batches."""

    trainer: Trainer

    def __init__(self, *numbers: int) -> None:
        self._numbers, self._done = numbers, 0

    def __call__(self, output: Any, batch: Any) -> Tensor:
        if self._done in self._numbers:
            self.trainer.stop()
        self._done += 1
        return default_loss(output, batch)


def stopping(numbers: tuple[int, ...], **given: Any) -> Trainer:
    loss = StopIn(*numbers)
    loss.trainer = small_trainer(loss=loss, update_in_backward=True, **given)
    return loss.trainer


def watched(trainer: Trainer) -> bool:
    return any(p._post_accumulate_grad_hooks for p in trainer.model.parameters())


def test_the_parameters_are_watched_while_they_are_trained_only() -> None:
    seen: list[bool] = []

    def loss(output: Any, batch: Any) -> Tensor:
        seen.append(watched(trainer))
        return default_loss(output, batch)

    trainer = small_trainer(loss=loss, update_in_backward=True)
    assert not watched(trainer)
    trainer.train()
    assert set(seen) == {True}
    assert not watched(trainer)


def test_they_are_not_watched_after_an_error() -> None:
    def loss(output: Any, batch: Any) -> Tensor:
        raise KeyError("mine")

    trainer = small_trainer(loss=loss, update_in_backward=True)
    with pytest.raises(KeyError):
        trainer.train()
    assert not watched(trainer)


def test_another_trainer_and_another_loop_train_as_if_it_had_never_been() -> None:
    first, twin = small_trainer(update_in_backward=True), small_trainer()
    for before in (first, twin):
        before.train()
        small_trainer(before.model, optimizer="sgd", accumulation_steps=1).train()
    assert_equal(tensors_of(first), tensors_of(twin))
    nn.functional.cross_entropy(first.model(torch.ones(4, 6)), torch.arange(4) % 3).backward()
    assert all(p.grad is not None for p in first.model.parameters())


@pytest.mark.parametrize("given", [{}, LOOKAHEAD], ids=["plain", "lookahead"])
@pytest.mark.parametrize("number", range(11))
def test_a_stop_within_a_step_changes_nothing(
    tmp_path: Path, given: dict[str, Any], number: int
) -> None:
    whole = small_trainer(update_in_backward=True, **given)
    whole.train()

    again = stopping((number,), **given)
    assert again.train().stopped_by == "stop()"
    assert again.train().stopped_by is None
    assert_equal(tensors_of(again), tensors_of(whole))

    stopping((number,), checkpoints=tmp_path, **given).train()
    resumed = stopping((), model=small_model(9), checkpoints=tmp_path, **given)
    resumed.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))


def test_a_bad_gradient_in_a_step_that_is_gone_on_with_is_seen(tmp_path: Path) -> None:
    """As it is in one that is made at once: by what it has done to the weights."""

    class Steep(StopIn):
        def __call__(self, output: Any, batch: Any) -> Tensor:
            steep = self._done == 7  # the last of the second step, behind the stop
            loss = super().__call__(output, batch)
            return loss + (output - output.detach()).abs().sqrt().sum() if steep else loss

    def run(folder: Path, *stops: int) -> Trainer:
        loss = Steep(*stops)
        loss.trainer = small_trainer(
            loss=loss,
            data=small_data(32),
            update_in_backward=True,
            on_nan="rollback",
            checkpoints={"folder": folder, "every_steps": 1},
        )
        return loss.trainer

    whole, stopped = run(tmp_path / "whole"), run(tmp_path / "on", 5)
    whole.train()
    stopped.train()
    assert stopped.train().steps == 4
    assert_equal(tensors_of(stopped), tensors_of(whole))


def test_updates_of_the_users_own_are_put_back() -> None:
    model = nn.Linear(6, 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.update_in_backward(2)
    with updates_in_backward(optimizer, 1, processes=1):
        model(torch.ones(1, 6)).sum().backward()
        assert model.weight.grad is None
        optimizer.step()
    for left in (True, False):
        model(torch.ones(1, 6)).sum().backward()
        assert (model.weight.grad is not None) == left


def test_what_cannot_be_is_refused_before_anything_starts() -> None:
    optimizer = SGD(nn.Linear(6, 3).parameters(), lr=0.1)
    with (
        pytest.raises(ValueError, match="update_in_backward is for one process"),
        updates_in_backward(optimizer, 1, processes=2),
    ):
        pass
    model = small_model()
    with pytest.raises(ValueError, match=r"needs an optimizer of optcpu\.optim, not Adam"):
        small_trainer(
            model, lr=None, optimizer=torch.optim.Adam(model.parameters()), update_in_backward=True
        )
    with pytest.raises(OptcpuError, match="DynamicFreezer looks at the gradients"):
        small_trainer(freezer=lambda m, o: DynamicFreezer(m, o), update_in_backward=True)


@pytest.mark.slow
def test_a_compiled_model_is_compiled_once() -> None:
    trainer = stopping((5,), compile=True, data=small_data(32), drop_last=True)
    assert trainer.train().seconds["compile"] > 0
    before = trainer.train().seconds["compile"]
    torch._dynamo.utils.counters.clear()
    assert trainer.train().seconds["compile"] == before
