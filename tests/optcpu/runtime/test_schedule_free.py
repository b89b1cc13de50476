from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import Losses, assert_equal, small_data, small_model, small_trainer, tensors_of

from optcpu import Lookahead, Trainer
from optcpu.runtime.schedule_free import evaluation_weights


class Averaging(torch.optim.Optimizer):
    """Trains points between the newest weights and their mean, which is what it means to be evaluated."""

    def __init__(self, parameters: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "steps": 0, "train_mode": False})

    def _move(self, share: float, train_mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train_mode:
                group["train_mode"] = train_mode
                for p in group["params"]:
                    if "newest" in self.state[p]:  # and makes an entry, as others do
                        p.data.lerp_(self.state[p]["newest"], share)

    def eval(self) -> None:
        self._move(1 - 1 / self.param_groups[0]["beta"], False)

    def train(self) -> None:
        self._move(1 - self.param_groups[0]["beta"], True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert group["train_mode"], "not in training mode"
            group["steps"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                newest = self.state[p].setdefault("newest", p.clone())
                p.lerp_(newest, 1 / group["steps"]).sub_(p.grad, alpha=group["lr"] * group["beta"])
                newest.sub_(p.grad, alpha=group["lr"])


class _Unused(nn.Sequential):
    """With a parameter that gets no gradient."""

    def __init__(self) -> None:
        super().__init__(*small_model())
        self.unused = nn.Parameter(torch.ones(3))


def _trainer(**given: Any) -> Trainer:
    model = _Unused()
    optimizer = Averaging(model.parameters())
    return small_trainer(
        model, optimizer=optimizer, lr=None, validation_data=small_data(9), epochs=3, **given
    )


def _loss(model: nn.Module, optimizer: Averaging) -> Tensor:
    """Of a copy in evaluation mode."""
    model, optimizer = copy.deepcopy((model, optimizer))
    optimizer.eval()
    inputs, targets = small_data(9).tensors
    return nn.functional.cross_entropy(model.eval()(inputs), targets)


def test_validation_is_of_the_weights_to_evaluate() -> None:
    trainer = _trainer()
    loss = trainer.train().metrics["loss"]
    assert loss == pytest.approx(_loss(trainer.model, trainer.optimizer).item())
    assert trainer.optimizer.param_groups[0]["train_mode"]
    assert trainer.validate()["loss"] == loss
    trainer.optimizer.eval()
    assert trainer.validate()["loss"] == pytest.approx(loss)
    assert not trainer.optimizer.param_groups[0]["train_mode"]


def test_training_goes_on_with_the_same_bits() -> None:
    often, never = _trainer(validate_every=1), _trainer(validate_every=100)
    often.train(), never.train()
    assert_equal(tensors_of(often), tensors_of(never))


def test_the_state_is_what_it_was() -> None:
    trainer = _trainer()
    trainer.train()
    before = copy.deepcopy(trainer.optimizer.state_dict()["state"])
    entries = trainer.optimizer.state[trainer.model[0].weight]
    newest = entries["newest"]
    with evaluation_weights(trainer.optimizer):
        newest.zero_()
        entries["other"] = 1
    after = trainer.optimizer.state_dict()["state"]
    assert before.keys() == after.keys()
    for index, expected in before.items():
        assert_equal(after[index], expected)
    assert entries["newest"] is newest


def test_an_error_leaves_the_weights_to_train() -> None:
    trainer = _trainer()
    trainer.train()
    before = tensors_of(trainer)
    trainer._metrics = {"broken": lambda output, batch: 1 / 0}
    with pytest.raises(ZeroDivisionError):
        trainer.validate()
    assert_equal(tensors_of(trainer), before)


def test_resume_is_exact(tmp_path: Path) -> None:
    class Stops(Losses):
        def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            trainer.stop()

    whole = _trainer()
    results = whole.train()
    for _ in range(5):
        resumed = _trainer(checkpoints=tmp_path, callbacks=[Stops()])
        last = resumed.train()
    assert last.stopped_by is None
    assert last.metrics == results.metrics
    assert_equal(tensors_of(resumed), tensors_of(whole))


def test_the_optimizers_of_a_library() -> None:
    others = pytest.importorskip("pytorch_optimizer")
    for kind in (others.ScheduleFreeAdamW, others.ScheduleFreeSGD, others.SPlus):
        trainers = []
        for every in (1, 100):
            model = small_model()
            trainer = small_trainer(
                model,
                optimizer=kind(model.parameters(), lr=0.05),
                lr=None,
                validation_data=small_data(9),
                validate_every=every,
            )
            trainer.validate()
            trainer.train()
            trainers.append(trainer)
        assert_equal(*map(tensors_of, trainers))


def test_it_is_found_within_lookahead() -> None:
    model = _Unused()
    inner = Averaging(model.parameters())
    trainer = small_trainer(
        model,
        optimizer=Lookahead(inner, k=2),
        lr=None,
        validation_data=small_data(9),
        epochs=3,
    )
    trainer.train()
    assert inner.param_groups[0]["train_mode"]
    expected = _loss(model, inner)
    assert trainer.validate()["loss"] == pytest.approx(expected.item(), rel=1e-6)
