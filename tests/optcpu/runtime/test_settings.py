from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import Losses, small_model, small_trainer

from optcpu import Trainer
from optcpu.runtime.checkpoint.folder import CheckpointFolder


class _Counting(torch.optim.SGD):
    """Counts in its groups, as some optimizers do."""

    def __init__(self, *arguments: Any, **given: Any) -> None:
        super().__init__(*arguments, **given)
        self.param_groups[0] |= {"count": 0, "d": 1e-6, "growth": 2.0}

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.param_groups[0]["count"] += 1
        self.param_groups[0]["d"] *= 2


class _Stops(Losses):
    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        trainer.stop()


def _trainer(folder: Path, growth: float = 2.0, **given: Any) -> Trainer:
    model = small_model()
    optimizer = _Counting(model.parameters(), lr=0.1, **given)
    optimizer.param_groups[0]["growth"] = growth
    return small_trainer(
        model, optimizer=optimizer, lr=None, checkpoints=folder, callbacks=[_Stops()], epochs=3
    )


def test_what_an_optimizer_counts_in_its_groups_is_no_setting(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps = [_trainer(tmp_path).train().steps for _ in range(3)]
    assert steps == [1, 2, 3]


def test_settings_are_compared_with_those_that_the_run_began_with(tmp_path: Path) -> None:
    _trainer(tmp_path).train()
    for _ in range(2):  # what is told once is told again: the run keeps to the first
        with pytest.warns(
            UserWarning, match=r"the optimizer: growth 2\.0 instead of 3\.0\. Remedy"
        ):
            _trainer(tmp_path, growth=3.0).train()


def test_checkpoints_that_lack_those_are_compared_by_what_is_known_to_be_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = CheckpointFolder.load

    def load_older(*arguments: Any) -> Any:
        saved = load(*arguments)
        if saved is not None:
            del saved.state["given"]
        return saved

    monkeypatch.setattr(CheckpointFolder, "load", load_older)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _trainer(tmp_path).train()
        _trainer(tmp_path, growth=3.0).train()
    with pytest.warns(UserWarning, match=r"optimizer: weight_decay 0 instead of 0\.5\. Remedy"):
        _trainer(tmp_path, weight_decay=0.5).train()
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=r"weight_decay 0 instead of 0\.25"):
        _trainer(tmp_path, weight_decay=0.25).train()


def test_a_run_that_goes_on_after_an_error_compares_what_was_given_first(tmp_path: Path) -> None:
    class Fails(Losses):
        def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            super().on_step_end(trainer, metrics)
            if len(self.losses) == 2:
                raise KeyError

    model = small_model()
    optimizer = _Counting(model.parameters(), lr=0.1)
    settings: dict[str, Any] = {"checkpoints": {"folder": tmp_path, "every_steps": 1}}
    trainer = small_trainer(
        model, optimizer=optimizer, lr=None, callbacks=[Fails()], epochs=3, **settings
    )
    with pytest.raises(KeyError):
        trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trainer.train().steps == 6


def test_values_that_no_checkpoint_holds_are_no_settings(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    trainer.optimizer.param_groups[0]["scale"] = torch.ones(2)
    trainer.train()
    saved = CheckpointFolder(tmp_path).load()
    assert saved is not None
    (group,) = saved.state["given"]["groups"]
    assert group["growth"] == 2.0
    assert not any(isinstance(value, Tensor) for value in group.values())


def test_another_lookahead_is_told_with_the_way_to_change_it(tmp_path: Path) -> None:
    def trainer(alpha: float, **given: Any) -> Trainer:
        settings = {"name": "sgd", "lr": 0.1, "lookahead": {"k": 2, "alpha": alpha}}
        return small_trainer(optimizer=settings, lr=None, checkpoints=tmp_path, epochs=2, **given)

    trainer(0.5, callbacks=[_Stops()]).train()
    changed = trainer(0.8, callbacks=[_Stops()])
    with pytest.warns(UserWarning, match=r"alpha 0\.5 instead of 0\.8.*trainer\.optimizer\.k"):
        changed.train()
    assert changed.optimizer.alpha == 0.5
