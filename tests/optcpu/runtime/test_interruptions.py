"""Interrupted elsewhere than in a step: in a validation, by a callback, half way through a micro-batch."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from training import assert_equal, small_data, small_model, small_trainer, tensors_of

from optcpu import Trainer
from optcpu.errors import OptcpuError
from optcpu.runtime import Callback


class _Moves(nn.Module):
    """What evaluation moves, too: a generator, a buffer, and what only an extra state tells of."""

    calls: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.layers = small_model(seed)
        self.helpers = [torch.Generator().manual_seed(seed)]
        self.register_buffer("calls", torch.zeros(()))
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        noise = torch.randn(x.shape, generator=self.helpers[0])
        scale = 1 + 0.1 * self.calls.sin() + 0.1 * math.cos(self.count)
        result: Tensor = self.layers(x + 0.1 * noise) * scale
        return result

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.count)

    def set_extra_state(self, state: Tensor) -> None:
        self.count = int(state)


class _Interrupts:
    """A metric, or a loss, that stops the run or raises, once."""

    def __init__(self, at: int, trainers: list[Trainer], raises: bool) -> None:
        self._left, self._trainers, self._raises = at, trainers, raises

    def __call__(self, output: Tensor, batch: Any) -> Tensor:
        self._left -= 1
        if self._left == 0 and self._raises:
            raise OSError("once")
        if self._left == 0:
            self._trainers[-1].stop()
        return cross_entropy(output, batch[-1])


def _interrupted(trainer: Trainer, *, raises: bool) -> None:
    if raises:
        with pytest.raises(OSError, match="once"):
            trainer.train()
    else:
        assert trainer.train().stopped_by == "stop()"


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("at", [2, 5])
def test_in_a_validation(tmp_path: Path, raises: bool, at: int) -> None:
    def trainer(seed: int = 0, metric: Any = cross_entropy_of, **given: Any) -> Trainer:
        validation = DataLoader(
            small_data(10), 4, shuffle=True, generator=torch.Generator().manual_seed(seed)
        )
        return small_trainer(
            _Moves(seed), validation_data=validation, metrics={"metric": metric}, **given
        )

    whole = trainer()
    expected = whole.train()
    made: list[Trainer] = []
    made.append(trainer(metric=_Interrupts(at, made, raises), checkpoints=tmp_path))
    _interrupted(made[0], raises=raises)
    resumed = trainer(seed=9, checkpoints=tmp_path)
    assert resumed.train().metrics == expected.metrics
    assert_equal(tensors_of(resumed), tensors_of(whole))


def cross_entropy_of(output: Tensor, batch: Any) -> Tensor:
    return cross_entropy(output, batch[-1])


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("at", [6, 7])
def test_in_a_micro_batch(tmp_path: Path, raises: bool, at: int) -> None:
    whole = small_trainer(_Moves(), loss=cross_entropy_of)
    whole.train()
    made: list[Trainer] = []
    loss = _Interrupts(at, made, raises)
    made.append(small_trainer(_Moves(), loss=loss, checkpoints=tmp_path))
    _interrupted(made[0], raises=raises)
    resumed = small_trainer(_Moves(9), loss=cross_entropy_of, checkpoints=tmp_path)
    resumed.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))


def test_a_skipped_step_leaves_no_trace_in_an_extra_state() -> None:
    model, calls = _Moves(), itertools.count(1)

    def loss(output: Tensor, batch: Any) -> Tensor:
        return cross_entropy(output, batch[-1]) * (math.nan if next(calls) == 6 else 1)

    small_trainer(model, loss=loss, on_nan="skip").train()
    assert model.count == 12 - 2  # the second step had two micro-batches


class _NoisyLoss:
    """A loss that is no module, with a generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, output: Tensor, batch: Any) -> Tensor:
        noise = torch.randn(output.shape, generator=self.generator)
        return cross_entropy(output + 0.1 * noise, batch[-1])


class _Bootstraps:
    """A metric with a generator, which draws one of the batches."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, output: Tensor, batch: Any) -> Tensor:
        return cross_entropy(output, batch[-1]) * torch.rand((), generator=self.generator)


class _FailsOnce(torch.optim.lr_scheduler.ReduceLROnPlateau):
    left = math.inf  # of all, as a scheduler's own attributes are in its state

    def step(self, metrics: Any, epoch: Any = None) -> None:
        _FailsOnce.left -= 1
        if _FailsOnce.left == 0:
            raise OSError("once")
        super().step(metrics)


@pytest.mark.parametrize("persistent", [False, True])
def test_behind_a_validation(tmp_path: Path, persistent: bool) -> None:
    """The scheduler that follows it fails: it is made again, as it was."""

    def trainer(seed: int = 0, left: float = math.inf, **given: Any) -> Trainer:
        model = _Moves(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scheduler = _FailsOnce(optimizer)
        _FailsOnce.left = left
        workers = {"num_workers": 1, "persistent_workers": True} if persistent else {}
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(small_data(10), 4, shuffle=True, generator=generator, **workers)
        settings = {"optimizer": optimizer, "lr": None, "scheduler": scheduler}
        measured = {"validation_data": loader, "metrics": {"m": _Bootstraps(seed)}, "epochs": 3}
        return small_trainer(model, **settings, **measured, **given)

    whole = trainer()
    expected = whole.train()
    with pytest.raises(OptcpuError, match=r"the scheduler failed.*once"):
        trainer(left=2, checkpoints=tmp_path).train()
    resumed = trainer(seed=9, checkpoints=tmp_path)
    assert resumed.train().metrics == expected.metrics
    assert_equal(tensors_of(resumed), tensors_of(whole))


class _Shrinks(Callback):
    """Changes weights where an epoch, or a validation, has ended; stops behind a certain step."""

    def __init__(self, event: str, stop: int | None) -> None:
        self._event, self._stop = event, stop

    def _end(self, event: str, trainer: Trainer, step: int) -> None:
        if event == self._event:
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.mul_(0.9)
        if step == self._stop:
            trainer.stop()

    def on_epoch_end(self, trainer: Trainer) -> None:
        assert trainer._run is None
        self._end("epoch", trainer, self.steps)

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self._end("validation", trainer, self.steps)

    steps = 0

    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


@pytest.mark.parametrize("event", ["epoch", "validation"])
def test_a_rollback_does_not_depend_on_where_the_run_was_stopped(
    tmp_path: Path, event: str
) -> None:
    """A checkpoint of step 2 may lie in front of the end of the epoch, or behind it."""

    def trainer(folder: str, stop: int | None = None) -> Trainer:
        shrinks = _Shrinks(event, stop)

        def loss(output: Tensor, batch: Any) -> Tensor:
            broken = shrinks.steps == 2 and torch.is_grad_enabled() and not seen
            if broken:
                seen.append(True)
            return cross_entropy(output, batch[-1]) * (math.nan if broken else 1)

        given = {"checkpoints": {"folder": tmp_path / folder, "every_steps": 2}}
        settings = {"on_nan": "rollback", "epochs": 3, "validation_data": small_data(10)}
        return small_trainer(loss=loss, callbacks=[shrinks], **settings, **given)

    seen: list[bool] = []
    whole = trainer("whole")
    whole.train()
    assert seen == [True]
    seen.clear()
    assert trainer("stopped", stop=2).train().stopped_by == "stop()"
    assert not seen
    resumed = trainer("stopped")
    resumed.train()
    assert seen == [True]
    assert_equal(tensors_of(resumed), tensors_of(whole))


def test_a_weight_that_model_and_loss_share_is_trained_once() -> None:
    class Regularised(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, output: Tensor, batch: Any) -> Tensor:
            return cross_entropy(output, batch[-1]) + 0.01 * self.weight.square().sum()

    model = small_model()
    trainer = small_trainer(model, loss=Regularised(model[0].weight))  # type: ignore[index, arg-type, union-attr]
    (group,) = trainer.optimizer.param_groups
    assert len(group["params"]) == len(list(model.parameters()))
    trainer.train()


class _Averages(nn.Module):
    """An extra state that is a tensor in a dictionary, and is written to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = small_model()
        self.average = torch.zeros(6)

    def forward(self, x: Tensor) -> Tensor:
        self.average.lerp_(x.detach().mean(0), 0.5)
        result: Tensor = self.layers(x - self.average)
        return result

    def get_extra_state(self) -> dict[str, Tensor]:
        return {"average": self.average}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        self.average.copy_(state["average"])


def test_a_stop_in_a_step_that_is_then_skipped(tmp_path: Path) -> None:
    calls = itertools.count(1)
    made: list[Trainer] = []

    def loss(output: Tensor, batch: Any) -> Tensor:
        call = next(calls)
        if call == 2 and made:
            made[0].stop()
        return cross_entropy(output, batch[-1]) * (math.nan if call == 4 else 1)

    whole = _Averages()
    small_trainer(whole, loss=loss, on_nan="skip").train()
    calls = itertools.count(1)
    made.append(small_trainer(_Averages(), loss=loss, on_nan="skip", checkpoints=tmp_path))
    assert made[0].train().stopped_by == "stop()"
    resumed = _Averages()
    small_trainer(resumed, loss=loss, on_nan="skip", checkpoints=tmp_path).train()
    assert torch.equal(resumed.average, whole.average)
    assert torch.equal(resumed.layers[0].weight, whole.layers[0].weight)  # type: ignore[index, arg-type]


class _WithManyAttributes(nn.Identity):
    def __init__(self) -> None:
        super().__init__()
        self.settings = {str(number): {number: {}} for number in range(60)}
        self.more = [[object()] for _ in range(600)]
        for number in range(600):
            setattr(self, f"part_{number}", [object()])


class _Langevin(torch.optim.SGD):
    """An optimizer with a generator."""

    def __init__(self, parameters: Any, seed: int) -> None:
        super().__init__(parameters, lr=0.05)
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, closure: Any = None) -> Any:
        super().step()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter += 0.01 * torch.randn(parameter.shape, generator=self.generator)


class _StopsAfterAnEpoch(Callback):
    def on_epoch_end(self, trainer: Trainer) -> None:
        trainer.stop()


@pytest.mark.parametrize("part", ["loss", "optimizer", "loss of a large model"])
def test_generators_of_other_parts(tmp_path: Path, part: str) -> None:
    def trainer(seed: int = 0, **given: Any) -> Trainer:
        model = small_model(seed)
        if "large" in part:
            model.append(_WithManyAttributes())  # type: ignore[operator]
        if "loss" in part:
            given["loss"] = _NoisyLoss(seed)
        else:
            given |= {"optimizer": _Langevin(model.parameters(), seed), "lr": None}
        return small_trainer(model, **given)

    whole = trainer()
    whole.train()
    trainer(checkpoints=tmp_path, callbacks=[_StopsAfterAnEpoch()]).train()
    resumed = trainer(seed=9, checkpoints=tmp_path)
    resumed.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))


class _Thaws(Callback):
    """Trains the first layer from the second epoch on."""

    def __init__(self, *, stops: bool = False) -> None:
        self._stops = stops

    def on_epoch_end(self, trainer: Trainer) -> None:
        trainer.model[0].requires_grad_(True)  # type: ignore[index, operator]
        if self._stops:
            trainer.stop()


def test_what_is_trained_goes_on(tmp_path: Path) -> None:
    def trainer(seed: int = 0, *, stops: bool = False, **given: Any) -> Trainer:
        model = small_model(seed)
        model[0].requires_grad_(False)  # type: ignore[index, operator]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        thaws = _Thaws(stops=stops)
        return small_trainer(model, optimizer=optimizer, lr=None, callbacks=[thaws], **given)

    whole = trainer()
    before = whole.model[0].weight.detach().clone()  # type: ignore[index, union-attr]
    whole.train()
    assert not torch.equal(before, whole.model[0].weight)  # type: ignore[index, arg-type]
    trainer(stops=True, checkpoints=tmp_path).train()
    resumed = trainer(seed=9, checkpoints=tmp_path)
    resumed.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))


class _Hears(Callback):
    """Counts what it is told, as far as a checkpoint knows."""

    def __init__(self) -> None:
        self.heard: dict[str, int] = {}

    def _hear(self, event: str) -> None:
        self.heard[event] = self.heard.get(event, 0) + 1

    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        assert metrics["loss"] > 0
        self._hear("step")

    def on_epoch_end(self, trainer: Trainer) -> None:
        self._hear("epoch")

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        assert metrics["loss"] > 0
        self._hear("validation")

    def state_dict(self) -> dict[str, Any]:
        return dict(self.heard)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.heard = dict(state)


class _Fails(_Hears):
    """Raises once, when it is told of a certain event for the second time (a validation: the first)."""

    def __init__(self, event: str | None) -> None:
        super().__init__()
        self._event = event

    def _hear(self, event: str) -> None:
        super()._hear(event)
        if event == self._event and self.heard[event] == (1 if event == "validation" else 2):
            raise OSError("once")


class _Steps(_Hears):
    """Another kind, without a past of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("now", [["_Hears"], ["_Steps", "_Hears"], ["_Fails", "_Steps", "_Hears"]])
def test_callbacks_that_are_others_now_are_told_what_concerns_them(
    tmp_path: Path, now: list[str]
) -> None:
    given: dict[str, Any] = {"checkpoints": tmp_path}
    failing = small_trainer(callbacks=[_Fails("step"), _Hears(), _Steps()], **given)
    with pytest.raises(OSError, match="once"):
        failing.train()
    hears = _Hears()
    made: dict[str, Callback] = {"_Hears": hears, "_Steps": _Steps(), "_Fails": _Fails(None)}
    kept = [made[name] for name in now]
    if "_Fails" not in now:  # whose state nobody would take
        kept.append(_Fails(None))
    small_trainer(callbacks=kept, **given).train()
    assert hears.heard == {"step": 4, "epoch": 2}


def test_a_callback_may_fail_again_while_it_is_told_the_rest(tmp_path: Path) -> None:
    class Twice(_Hears):
        failed = 0

        def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            super().on_step_end(trainer, metrics)
            metrics["mine"] = object()  # type: ignore[assignment]
            if self.heard["step"] == 2 and Twice.failed < 2:
                Twice.failed += 1
                raise OSError("once more")

    def callbacks() -> list[Callback]:
        return [_Hears(), Twice(), Twice(), _Hears()]

    for _ in range(2):
        with pytest.raises(OSError, match="once more"):
            small_trainer(callbacks=callbacks(), checkpoints=tmp_path).train()
    final = callbacks()
    small_trainer(callbacks=final, checkpoints=tmp_path).train()
    assert [callback.state_dict() for callback in final] == [{"step": 4, "epoch": 2}] * 4


def test_flags_go_back_where_a_run_goes_on_from_before_they_changed(tmp_path: Path) -> None:
    class Freezes(Callback):
        steps = 0

        def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            self.steps += 1
            if self.steps == 3:
                trainer.model[0].requires_grad_(False)  # type: ignore[index, operator]

        def state_dict(self) -> dict[str, Any]:
            return {"steps": self.steps}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.steps = state["steps"]

    class Fails(torch.optim.SGD):
        left = math.inf

        def step(self, closure: Any = None) -> Any:
            self.left -= 1
            if self.left == 0:
                raise OSError("once")
            return super().step(closure)

    def trainer(**given: Any) -> Trainer:
        model = small_model()
        optimizer = Fails(model.parameters(), lr=0.05)
        settings = {"optimizer": optimizer, "lr": None, "callbacks": [Freezes()], "epochs": 3}
        return small_trainer(model, **settings, **given)

    whole = trainer()
    whole.train()
    failing = trainer(checkpoints={"folder": tmp_path, "every_steps": 2})
    failing.optimizer.left = 4  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="once"):
        failing.train()
    failing.train()
    assert_equal(tensors_of(failing), tensors_of(whole))


def test_an_extra_state_that_is_only_told_is_left_alone() -> None:
    class Versioned(nn.Identity):
        def get_extra_state(self) -> Tensor:
            return torch.tensor(3)

    model = nn.Sequential(small_model(), Versioned())
    calls = itertools.count(1)

    def loss(output: Tensor, batch: Any) -> Tensor:
        return cross_entropy(output, batch[-1]) * (math.nan if next(calls) == 6 else 1)

    assert small_trainer(model, loss=loss, on_nan="skip").train().steps == 4


@pytest.mark.parametrize("event", ["step", "epoch", "validation"])
def test_callbacks_behind_one_that_fails_are_told_once(tmp_path: Path, event: str) -> None:
    def callbacks(fails: str | None) -> list[Callback]:
        return [_Hears(), _Fails(fails), _Hears()]

    given: dict[str, Any] = {"validation_data": small_data(10), "checkpoints": tmp_path}
    failing = small_trainer(callbacks=callbacks(event), **given)
    with pytest.raises(OSError, match="once"):
        failing.train()
    resumed = callbacks(None)
    small_trainer(callbacks=resumed, **given).train()
    expected = {"step": 4, "epoch": 2, "validation": 2}
    assert [callback.state_dict() for callback in resumed] == [expected] * 3
