from __future__ import annotations

import json
import math
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, TensorDataset
from training import (
    CLASSES,
    FEATURES,
    Losses,
    Noisy,
    assert_equal,
    small_data,
    small_model,
    small_trainer,
    tensors_of,
)

from optcpu import Trainer
from optcpu.errors import OptcpuError
from optcpu.measure.batches import default_loss
from optcpu.optim import AdamW
from optcpu.runtime import Callback, CheckpointFolder, TrainingDiverged, metrics_log
from optcpu.runtime.world import World


class _BadIn:
    """A loss that is NaN in certain micro-batches."""

    def __init__(self, *numbers: int) -> None:
        self._numbers, self._count = numbers, -1

    def __call__(self, output: Any, batch: Any) -> Tensor:
        self._count += 1
        loss = default_loss(output, batch)
        return loss * math.nan if self._count in self._numbers else loss


class _SteepIn(_BadIn):
    """A loss whose gradient is infinite in certain micro-batches, and which is finite itself."""

    def __call__(self, output: Any, batch: Any) -> Tensor:
        self._count += 1
        loss = default_loss(output, batch)
        infinite = (output - output.detach()).clamp(min=0).sqrt().sum()
        return loss + infinite if self._count in self._numbers else loss


def test_a_loss_that_is_no_number_ends_the_run_and_loses_nothing(tmp_path: Path) -> None:
    trainer = small_trainer(checkpoints=tmp_path, loss=_BadIn(6))
    with pytest.raises(
        TrainingDiverged, match=r"in step 3, the loss of model\(.*\) is nan\. Lower"
    ):
        trainer.train()
    saved = CheckpointFolder(tmp_path).load()
    assert saved is not None
    assert saved.step == 2
    whole = small_trainer()
    whole.train()
    resumed = small_trainer(checkpoints=tmp_path)
    assert resumed.train().steps == 4
    # The running statistics of the step that failed were moved by its first micro-batches.
    assert not math.isnan(sum(p.sum().item() for p in resumed.model.parameters()))


def test_skip_leaves_the_step_out() -> None:
    losses = Losses()
    trainer = small_trainer(loss=_BadIn(4), on_nan="skip", callbacks=[losses])
    assert trainer.train().steps == 4
    assert [math.isnan(loss) for loss in losses.losses] == [False, True, False, False]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert trainer.optimizer.state_dict()["state"][0]["step"] == 3


def test_the_logged_loss_is_that_of_the_steps_that_were_made(tmp_path: Path) -> None:
    losses = Losses()
    log = {"folder": tmp_path, "every_steps": 2}
    small_trainer(loss=_BadIn(4), on_nan="skip", callbacks=[losses], log=log).train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    made = [losses.losses[0], (losses.losses[2] + losses.losses[3]) / 2]
    assert [row["loss"] for row in rows] == pytest.approx(made)


def test_skip_ends_when_nothing_else_happens() -> None:
    trainer = small_trainer(loss=_BadIn(*range(100)), on_nan="skip", max_bad_steps=3)
    with pytest.raises(TrainingDiverged, match=r"in step 4, .*, the last of 4 bad steps in a row"):
        trainer.train()


def test_rollback_goes_back_to_the_last_checkpoint(tmp_path: Path) -> None:
    class Weights(Callback):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            self.seen.append(trainer.model[0].weight.detach().clone())

    weights = Weights()
    trainer = small_trainer(
        loss=_BadIn(9),
        on_nan="rollback",
        checkpoints={"folder": tmp_path, "every_steps": 1},
        callbacks=[weights],
    )
    assert trainer.train().steps == 4
    assert torch.equal(weights.seen[2], weights.seen[1])
    assert not torch.equal(weights.seen[3], weights.seen[2])


def test_rollback_leaves_the_learning_rate(tmp_path: Path) -> None:
    rates: list[float] = []

    class Rates(Callback):
        def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            rates.append(trainer.optimizer.param_groups[0]["lr"])

    small_trainer(
        steps=5,
        lr=1.0,
        scheduler={"name": "constant", "warmup_steps": 2},
        loss=_BadIn(9),  # in the fourth step
        on_nan="rollback",
        checkpoints={"folder": tmp_path, "every_steps": 1000},
        callbacks=[Rates()],
    ).train()
    assert rates == [1.0] * 5


def test_rollback_in_the_first_step_goes_back_to_the_beginning(tmp_path: Path) -> None:
    model = small_model()
    before = model[0].weight.detach().clone()

    class Check(Callback):
        def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            if math.isnan(metrics["loss"]):
                assert torch.equal(trainer.model[0].weight, before)

    trainer = small_trainer(
        model, loss=_BadIn(0), on_nan="rollback", checkpoints=tmp_path, callbacks=[Check()]
    )
    trainer.train()
    assert not torch.equal(model[0].weight, before)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    class Spoil(Callback):
        def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            with torch.no_grad():
                trainer.model[0].weight[0, 0] = math.inf

    with pytest.raises(TrainingDiverged, match=r"after step 1 the weights of '0.weight' are not"):
        small_trainer(
            checkpoints={"folder": tmp_path, "every_steps": 1}, callbacks=[Spoil()]
        ).train()
    assert CheckpointFolder(tmp_path).load() is None


def test_checkpoints_come_when_they_are_due(tmp_path: Path) -> None:
    def steps(**given: Any) -> list[int]:
        class Note(Callback):
            def __init__(self) -> None:
                self.paths: list[Path] = []

            def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
                self.paths.append(path)

        note = Note()
        small_trainer(callbacks=[note], **given).train()
        return [int(path.name.partition("-")[2]) for path in note.paths]

    assert steps(checkpoints=tmp_path / "epochs") == [2, 4]
    assert steps(checkpoints={"folder": tmp_path / "3", "every_steps": 3}) == [3, 4]
    assert steps(checkpoints=tmp_path / "steps", steps=25) == [*range(2, 25, 2), 25]
    given = {"validation_data": small_data(10, seed=3), "validate_every": 1}
    best = {"folder": tmp_path / "best", "every_steps": 100, "best": "loss", "keep_last": 1}
    assert steps(checkpoints=best, **given)[-1] == 4
    folder = CheckpointFolder(tmp_path / "best")
    assert folder.best() is not None


def test_another_metric_has_another_best(tmp_path: Path) -> None:
    given: dict[str, Any] = {"validation_data": small_data(), "metrics": ["accuracy"]}

    def best(epochs: int, **checkpoints: Any) -> float:
        checkpoints["folder"] = tmp_path
        result = small_trainer(epochs=epochs, checkpoints=checkpoints, **given).train()
        assert result.best is not None
        return result.best

    assert best(1, best="accuracy", mode="max") <= 1.0
    lowest = best(3, best="loss")
    folder = CheckpointFolder(tmp_path)
    marked = folder.load(folder.best())
    assert marked is not None
    assert marked.state["position"]["metrics"]["loss"] == lowest


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    # Labels for validation that contradict those of training: it can only get worse.
    inputs, targets = small_data().tensors
    trainer = small_trainer(
        epochs=50,
        lr=0.1,
        validation_data=TensorDataset(inputs, (targets + 1) % 3),
        early_stopping={"patience": 3},
        checkpoints={"folder": tmp_path, "best": "loss"},
    )
    result = trainer.train()
    assert result.epochs < 50
    assert result.stop_reason is not None
    assert result.stop_reason.startswith("loss has not improved in 3 validations")
    folder = CheckpointFolder(tmp_path)
    best = folder.load(folder.best())
    assert best.state["position"]["metrics"]["loss"] == result.best
    assert (
        small_trainer(
            epochs=50,
            lr=0.1,
            validation_data=TensorDataset(inputs, (targets + 1) % 3),
            early_stopping={"patience": 3},
            checkpoints={"folder": tmp_path, "best": "loss"},
        )
        .train()
        .steps
        == result.steps
    ), "a run that has stopped early is over"


def test_validation_comes_when_it_is_due() -> None:
    class Note(Callback):
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.last = 0

        def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            self.last += 1

        def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            self.steps.append(self.last)

    for given, expected in (
        ({}, [2, 4]),
        ({"validate_every": 3}, [3, 4]),
        ({"validate_every": 2, "steps": 5}, [2, 4, 5]),
    ):
        note = Note()
        small_trainer(validation_data=small_data(6), callbacks=[note], **given).train()
        assert note.steps == expected


def test_what_a_callback_adds_to_results_is_its_own(tmp_path: Path) -> None:
    class Adds(Callback):
        def on_validation_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
            metrics["confusion"] = object()

    result = small_trainer(
        validation_data=small_data(6), callbacks=[Adds()], checkpoints=tmp_path
    ).train()
    assert result.metrics.keys() == {"loss"}


def test_of_a_validation_that_compiles_only_the_compiling_counts_as_such(tmp_path: Path) -> None:
    class Slow(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Any:
            time.sleep(0.05)
            return small_data(6)[index]

    trainer = small_trainer(
        compile=True, epochs=1, validation_data=Slow(), checkpoints=tmp_path, precision="fp32"
    )
    seconds = trainer.train().seconds
    assert seconds["validation"] >= 0.3
    assert seconds["compile"] > 0
    clock = CheckpointFolder(tmp_path).load().state["clock"]  # type: ignore[union-attr]
    assert clock["typical"]["validation"] == pytest.approx(seconds["validation"])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_batch_norm_of_one_sample_is_told_with_the_remedy(compiled: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    with pytest.raises(OptcpuError, match=r"two samples or more.* drop_last=True"):
        small_trainer(model, small_data(9), compile=compiled).train()
    small_trainer(model, small_data(9), compile=compiled, drop_last=True).train()


def test_the_first_process_validates_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows from a validation must be the same in each, whatever each has found."""

    def gather(world: World, mine: Any) -> list[Any]:
        return [{"loss": 0.125}, mine] if isinstance(mine, dict) and "loss" in mine else [mine]

    monkeypatch.setattr(World, "gather", gather)
    assert small_trainer(validation_data=small_data(6)).train().metrics == {"loss": 0.125}


def test_a_plateau_scheduler_follows_validation() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
    small_trainer(
        model, optimizer=optimizer, lr=None, scheduler=plateau, validation_data=small_data(6)
    ).train()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_data_that_fail_lose_nothing(tmp_path: Path) -> None:
    class Failing(TensorDataset):
        broken = True

        def __getitem__(self, index: int) -> Any:
            if self.broken and index == 21:
                raise KeyError("no such file")
            return super().__getitem__(index)

    data = Failing(*small_data().tensors)
    with pytest.raises(
        OptcpuError, match=r"the training data failed at batch \d of epoch \d.*KeyE"
    ):
        small_trainer(data=data, checkpoints={"folder": tmp_path, "every_steps": 100}).train()
    data.broken = False
    resumed = small_trainer(data=data, checkpoints={"folder": tmp_path, "every_steps": 100})
    resumed.train()
    whole = small_trainer(data=data)
    whole.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))


def test_metrics_are_logged(tmp_path: Path) -> None:
    losses = Losses()
    small_trainer(
        log={"folder": tmp_path, "every_steps": 2},
        validation_data=small_data(6),
        max_grad_norm=1.0,
        callbacks=[losses],
    ).train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["phase"]) for row in rows] == [
        (2, "train"),
        (2, "validation"),
        (4, "train"),
        (4, "validation"),
    ]
    assert rows[0]["loss"] == pytest.approx(sum(losses.losses[:2]) / 2)
    assert {"lr", "grad_norm", "samples_per_second"} <= rows[0].keys()


def test_a_stream_of_one_epoch_ends_with_it() -> None:
    def stream() -> Iterator[Any]:
        for sample in small_data():
            yield sample[0][None], sample[1][None]

    model = nn.Linear(6, 3)
    assert small_trainer(model, stream(), epochs=1).train().steps == 6
    with pytest.raises(TypeError, match="generator can be gone through once only, and epochs is 2"):
        small_trainer(model, stream(), epochs=2)


def test_progress_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    small_trainer(progress=None, validation_data=small_data(6)).train()
    told = capfd.readouterr().err
    assert "step 1/4  epoch 1  loss" in told
    assert "step 4: validation loss" in told
    small_trainer(progress=False, validation_data=small_data(6)).train()
    assert capfd.readouterr().err == ""


def test_the_mode_of_the_model_is_kept() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5))
    model.eval()
    modes = []

    class Note(Callback):
        def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            modes.append(trainer.model.training)

    small_trainer(model, callbacks=[Note()], validation_data=small_data(6)).train()
    assert set(modes) == {True}
    assert not model.training


@pytest.mark.slow
def test_memory_is_flat_over_5000_steps() -> None:
    class Memory(Callback):
        def __init__(self) -> None:
            self.steps = 0
            self.resident: dict[int, int] = {}

        def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            self.steps += 1
            if self.steps % 1000 == 0:
                self.resident[self.steps] = psutil.Process().memory_info().rss

    memory = Memory()
    small_trainer(
        nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)),
        steps=5000,
        accumulation_steps=1,
        compile=True,
        callbacks=[memory],
        validation_data=small_data(8),
        validate_every=500,
    ).train()
    assert memory.resident[5000] - memory.resident[1000] < 2**20


class _At(Callback):
    """Calls a function after a certain step."""

    def __init__(self, step: int, function: Any) -> None:
        self._left, self._function = step, function

    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self._left -= 1
        if self._left == 0:
            self._function(trainer)


def test_a_callback_can_stop_the_run(tmp_path: Path) -> None:
    stopped = small_trainer(checkpoints=tmp_path, callbacks=[_At(3, Trainer.stop)])
    result = stopped.train()
    assert (result.steps, result.stopped_by) == (3, "stop()")
    resumed, whole = small_trainer(checkpoints=tmp_path, callbacks=[_At(3, id)]), small_trainer()
    assert resumed.train().steps == 4
    whole.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))


def test_a_stop_in_the_last_validation_is_none_at_the_end(tmp_path: Path) -> None:
    def loss(output: Any, batch: Any) -> Tensor:
        if not torch.is_grad_enabled():
            trainer.stop()
        return default_loss(output, batch)

    given: dict[str, Any] = {"steps": 2, "validation_data": small_data(6), "checkpoints": tmp_path}
    trainer = small_trainer(loss=loss, **given)
    result = trainer.train()
    assert (result.stopped_by, result.metrics) == ("stop()", {})
    result = small_trainer(**given).train()
    assert result.stopped_by is None
    assert set(result.metrics) == {"loss"}


@pytest.mark.slow
def test_many_shapes_are_told() -> None:
    def batches(shapes: int) -> list[Any]:
        return [(torch.randn(n, 6), torch.randint(3, (n,))) for n in range(2, 2 + shapes)]

    given: dict[str, Any] = {"compile": True, "accumulation_steps": 1, "epochs": 1}
    with pytest.warns(UserWarning, match="had 4 different shapes so far.*Remedy: dynamic=True"):
        small_trainer(nn.Linear(6, 3), batches(5), **given).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small_trainer(nn.Linear(6, 3), batches(3), **given).train()


def test_a_model_that_is_compiled_already_costs_no_compile_time() -> None:
    model, data = nn.Linear(6, 3), [(torch.randn(4, 6), torch.randint(3, (4,)))] * 2
    given: dict[str, Any] = {"compile": True, "accumulation_steps": 1, "epochs": 1}
    assert small_trainer(model, data, **given).train().seconds["compile"] > 0
    assert small_trainer(model, data, **given).train().seconds["compile"] == 0


@pytest.mark.parametrize("station", ["on_epoch_end", "on_validation_end", "on_checkpoint"])
def test_a_failure_between_epochs_loses_nothing(tmp_path: Path, station: str) -> None:
    class Failing(Callback):
        fails = True

    def fail(self: Failing, *_: Any) -> None:
        if self.fails:
            self.fails = False
            raise KeyError("mine")

    setattr(Failing, station, fail)
    callback = Failing()
    given: dict[str, Any] = {"validation_data": small_data(6), "checkpoints": tmp_path}
    with pytest.raises(KeyError):
        small_trainer(callbacks=[callback], **given).train()
    resumed, whole = small_trainer(small_model(9), callbacks=[callback], **given), small_trainer()
    assert resumed.train().steps == 4
    whole.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))


def test_a_skipped_step_leaves_running_statistics() -> None:
    inputs, targets = small_data().tensors
    inputs = inputs.clone()
    inputs[3] = math.nan
    model = small_model()
    small_trainer(
        model, TensorDataset(inputs, targets), on_nan="skip", accumulation_steps=1
    ).train()
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())


def test_a_rescue_is_from_before_the_step_that_failed(tmp_path: Path) -> None:
    """Running statistics as well: started again, it ends as if nothing had happened."""
    calls = []

    def failing(output: Any, batch: Any) -> Tensor:
        calls.append(None)
        if len(calls) == 6:  # in the middle of the second step
            raise RuntimeError("once")
        return default_loss(output, batch)

    whole = small_model()
    small_trainer(whole).train()
    with pytest.raises(RuntimeError, match="once"):
        small_trainer(small_model(), loss=failing, checkpoints=tmp_path).train()
    resumed = small_model()
    small_trainer(resumed, checkpoints=tmp_path).train()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_weights_that_are_no_numbers_at_the_end_are_told() -> None:
    """The loss of the last step is finite, its gradient is not."""

    def loss(output: Tensor, batch: Any) -> Tensor:
        return default_loss(output, batch) + (output - output.detach()).clamp(min=0).sqrt().sum()

    with pytest.raises(
        TrainingDiverged, match=r"after step 1 the weights of .* are not finite: lower"
    ):
        small_trainer(loss=loss, steps=1).train()


def test_rollback_sees_a_gradient_that_is_no_number(tmp_path: Path) -> None:
    model = small_model()
    given: dict[str, Any] = {"checkpoints": {"folder": tmp_path, "every_steps": 1}, "steps": 4}
    result = small_trainer(
        model, loss=_SteepIn(2), on_nan="rollback", accumulation_steps=1, **given
    ).train()
    assert result.steps == 4
    assert all(torch.isfinite(p).all() for p in model.parameters())


def _own_adamw(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), lr=0.05, state_dtype=torch.float32)


def test_rollback_begins_a_step_anew_where_updates_come_in_backward(tmp_path: Path) -> None:
    """The bad micro-batch is one in the middle of a step, behind which the step is not finished."""

    def end(update_in_backward: bool) -> dict[str, Tensor]:
        model = small_model()
        trainer = small_trainer(
            model,
            lr=None,
            optimizer=_own_adamw(model),
            loss=_BadIn(6),
            on_nan="rollback",
            update_in_backward=update_in_backward,
            checkpoints={"folder": tmp_path / str(update_in_backward), "every_steps": 1},
        )
        assert trainer.train().steps == 4
        return tensors_of(trainer)

    assert_equal(end(True), end(False))


def test_rollback_sees_what_such_a_gradient_has_done_in_backward(tmp_path: Path) -> None:
    model = small_model()
    result = small_trainer(
        model,
        loss=_SteepIn(2),
        lr=None,
        optimizer=_own_adamw(model),
        on_nan="rollback",
        update_in_backward=True,
        accumulation_steps=1,
        steps=4,
        checkpoints={"folder": tmp_path, "every_steps": 1},
    ).train()
    assert result.steps == 4
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_an_error_amid_updates_in_backward_saves_nothing_half_updated(tmp_path: Path) -> None:
    model = small_model()

    def loss(output: Tensor, batch: Any) -> Tensor:
        if trainer_step[0] == 2:
            model[0].weight.register_hook(_fail)  # the last layer has been updated by then
        return default_loss(output, batch)

    def _fail(gradient: Tensor) -> None:
        raise RuntimeError("in backward")

    class Count(Callback):
        def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            trainer_step[0] += 1

    trainer_step = [0]
    trainer = small_trainer(
        model,
        loss=loss,
        lr=None,
        optimizer=_own_adamw(model),
        update_in_backward=True,
        accumulation_steps=1,
        callbacks=[Count()],
        checkpoints={"folder": tmp_path, "every_steps": 1},
    )
    with pytest.raises(RuntimeError, match="in backward"):
        trainer.train()
    saved = CheckpointFolder(tmp_path).load()
    assert saved is not None
    whole = small_model()
    small_trainer(
        whole, lr=None, optimizer=_own_adamw(whole), accumulation_steps=1, steps=saved.step
    ).train()
    assert saved.step == 2
    for name, weight in whole.state_dict().items():
        assert torch.equal(saved.state["model"][name], weight), name


@pytest.mark.parametrize("given", [{"on_nan": "skip"}, {"max_grad_norm": 0.01}])
def test_sparse_gradients_have_a_norm(given: dict[str, Any]) -> None:
    """Of each row once, however often it was looked up; eager PyTorch has none to clip by."""

    def end(sparse: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        tokens = torch.tensor([[0, 1, 1], [5, 1, 0], [2, 2, 2], [3, 4, 5]])
        data = TensorDataset(tokens, torch.tensor([0, 1, 2, 0]))
        small_trainer(model, data, lr=None, optimizer=optimizer, epochs=3, **given).train()
        return model[0].weight.detach()

    torch.testing.assert_close(end(True), end(False))


def test_an_optimizer_that_needs_a_closure_is_refused_before_anything_starts() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="LBFGS computes the loss anew within a step"):
        small_trainer(model, lr=None, optimizer=torch.optim.LBFGS(model.parameters()))


def test_a_plateau_of_what_is_to_rise_is_refused() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ReduceLROnPlateau(optimizer, mode="max")
    with pytest.raises(ValueError, match="follows the loss of validation, which is to fall"):
        small_trainer(
            model, lr=None, optimizer=optimizer, scheduler=scheduler, validation_data=small_data()
        )


def test_after_an_error_nothing_is_left_to_go_on_from() -> None:
    class Raises(Callback):
        def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
            raise RuntimeError("once")

    trainer = small_trainer(callbacks=[Raises()])
    with pytest.raises(RuntimeError, match="once"):
        trainer.train()
    with pytest.raises(OptcpuError, match="ended in an error, and there is no checkpoint"):
        trainer.train()


@pytest.mark.parametrize("phase", ["train", "validation"])
@pytest.mark.parametrize("step", [2, 4])
def test_a_row_that_cannot_be_written_comes_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, step: int
) -> None:
    """A validation is made again, and nothing that follows from it happens twice or not at all."""

    def make(folder: str) -> Trainer:
        torch.manual_seed(0)
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return small_trainer(
            model,
            small_data(64),
            optimizer=optimizer,
            lr=None,
            scheduler=ReduceLROnPlateau(optimizer, patience=0, threshold=1.0),
            validation_data=small_data(8),
            validate_every=2,
            checkpoints={"folder": tmp_path / folder / "c", "every_steps": 3},
            log={"folder": tmp_path / folder / "log", "every_steps": 2},
        )

    def rows(folder: str) -> list[dict[str, Any]]:
        lines = (tmp_path / folder / "log" / "metrics.jsonl").read_text().splitlines()
        keep = ("step", "phase", "loss", "lr")
        found = [{name: json.loads(line).get(name) for name in keep} for line in lines]
        return sorted(found, key=lambda row: (row["step"], row["phase"]))

    whole = make("whole")
    whole.train()
    append = metrics_log._append

    def fails(path: Path, text: str, head: str = "") -> None:
        if path.suffix == ".csv" and f"{step},0,{phase}" in text:
            raise OptcpuError("the disk is full")
        append(path, text, head)

    monkeypatch.setattr(metrics_log, "_append", fails)
    with pytest.raises(OptcpuError, match="the disk is full"):
        make("failed").train()
    monkeypatch.undo()
    resumed = make("failed")
    resumed.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))
    assert rows("failed") == rows("whole")
    assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"] < 0.1


def test_a_callback_that_fails_at_a_checkpoint_leaves_it_saved(tmp_path: Path) -> None:
    told = []

    class Raises(Callback):
        def on_checkpoint(self, trainer: Any, path: Path) -> None:
            told.append(path)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        small_trainer(checkpoints=tmp_path, callbacks=[Raises()]).train()
    assert told == CheckpointFolder(tmp_path).list()  # and not saved again because of the error


@pytest.mark.parametrize("stop_at", [3, 5])
def test_frozen_blocks_stay_in_evaluation_mode_when_a_run_goes_on(stop_at: int) -> None:
    """In the same process, after the model was set to training mode anew."""

    class Stops(Callback):
        def __init__(self, at: int) -> None:
            self._at = at

        def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
            self._at -= 1
            if self._at == 0:
                trainer.stop()

    def train(at: int) -> Trainer:
        freezing = {"window": 1, "patience": 1, "percentile": 100.0, "eval_frozen": True}
        freezing |= {"step_seconds": 1.0, "compile_seconds": 0.0}
        trainer = small_trainer(
            data=small_data(64), accumulation_steps=2, freezing=freezing, callbacks=[Stops(at)]
        )
        while trainer.train().stopped_by:
            pass
        return trainer

    assert_equal(tensors_of(train(stop_at)), tensors_of(train(0)))


def test_the_logged_learning_rate_is_that_of_the_step(tmp_path: Path) -> None:
    used: list[float] = []
    told: list[float] = []

    class Notes(Callback):
        def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
            told.append(metrics["lr"])

    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.register_step_pre_hook(
        lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"])
    )
    trainer = small_trainer(
        model,
        optimizer=optimizer,
        lr=None,
        accumulation_steps=1,
        scheduler={"name": "linear", "warmup_steps": 4},
        callbacks=[Notes()],
        log={"folder": tmp_path, "every_steps": 1},
    )
    trainer.train()
    assert told == used
    assert used[:4] == [0.25, 0.5, 0.75, 1.0]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == used


def test_a_rollback_puts_buffers_back_that_no_checkpoint_holds_yet(tmp_path: Path) -> None:
    class Counts(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(FEATURES, CLASSES)
            self.register_buffer("seen", torch.zeros(1), persistent=False)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen += 1
            return self.linear(x) * (float("nan") if self.calls == 4 else 1)

    seen: list[float] = []

    class Notes(Callback):
        def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
            seen.append(trainer.model.seen.item())

    small_trainer(
        Counts(),
        accumulation_steps=1,
        epochs=1,
        on_nan="rollback",
        checkpoints={"folder": tmp_path, "every_steps": 100},
        callbacks=[Notes()],
    ).train()
    assert seen == [1, 2, 3, 0, 1, 2]


class _Unfreeze(Callback):
    """Unfreezes the first layer behind the first step, and gives it to the optimizer if it ``adds``."""

    def __init__(self, adds: bool = True) -> None:
        self.adds = adds

    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        first = trainer.model[0]
        if not first.weight.requires_grad:
            first.requires_grad_(True)
            if self.adds:
                trainer.optimizer.add_param_group({"params": first.parameters()})


@pytest.mark.parametrize("adds", [False, True])
def test_what_a_callback_unfreezes_is_told_of_unless_it_is_updated(adds: bool) -> None:
    model = small_model()
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small_trainer(model, steps=4, callbacks=[_Unfreeze(adds)]).train()
    told = [str(one.message) for one in caught if "unfrozen" in str(one.message)]
    assert len(told) == (not adds)
    assert adds or ("2 parameters have been unfrozen" in told[0] and "'0.weight'" in told[0])
    assert torch.equal(model[0].weight, before) != adds


def test_a_rollback_behind_an_added_group_says_so(tmp_path: Path) -> None:
    model = small_model()
    model[0].requires_grad_(False)
    trainer = small_trainer(
        model,
        loss=_BadIn(9),
        on_nan="rollback",
        checkpoints={"folder": tmp_path, "every_steps": 1000},
        callbacks=[_Unfreeze()],
    )
    with pytest.raises(TrainingDiverged, match=r"of step 0 cannot be put back.*on_train_begin"):
        trainer.train()


class _Slow(Dataset[tuple[Tensor, Tensor]]):
    """Samples that take a while to come."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._data = seconds, small_data()
        self.given = 0

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(self._seconds)
        self.given += 1
        return self._data[index]


def test_waiting_for_data_is_in_the_time_that_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = small_trainer(
        None, _Slow(0.02), steps=6, accumulation_steps=1, batch_size=4, workers=0
    )
    result = trainer.train()
    assert result.seconds["data"] >= 22 * 0.02
    assert trainer._run.clock.step_with_data() >= 18 * 0.02 / 5  # without the first batch


def test_a_stop_does_not_wait_for_the_data_of_the_whole_step(tmp_path: Path) -> None:
    data = _Slow(0.0)

    def take(index: int) -> tuple[Tensor, Tensor]:
        if data.given == 6:  # within the second of the micro-batches
            trainer.stop()
        return _Slow.__getitem__(data, index)

    data.__class__ = type("Stopping", (_Slow,), {"__getitem__": lambda self, i: take(i)})
    given: dict[str, Any] = {"checkpoints": tmp_path / "stopped", "workers": 0}
    trainer = small_trainer(None, data, **given)
    result = trainer.train()
    assert result.steps == 0
    assert result.stopped_by == "stop()"
    assert data.given == 8
    resumed, whole = small_model(), small_model()
    small_trainer(resumed, small_data(), **given).train()
    small_trainer(whole, small_data(), workers=0).train()
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_step_leaves_no_batches_behind() -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Watched(_Slow):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            if index == 0 and alive:
                seen.append(sum(one() is not None for one in alive))
            inputs, target = super().__getitem__(index)
            return inputs, target

    seen: list[int] = []

    def collate(samples: list[Any]) -> Any:
        batch = torch.utils.data.default_collate(samples)
        alive.append(weakref.ref(batch[0]))
        return batch

    loader = DataLoader(Watched(0.0), batch_size=22, collate_fn=collate)
    small_trainer(None, loader, epochs=4).train()
    assert seen == [0, 0, 0]


def test_freezing_that_cannot_come_before_the_end_is_told() -> None:
    with pytest.warns(
        UserWarning, match=r"freezing has no effect.*behind step 60.* has 4\. Remedy"
    ):
        small_trainer(freezing={"window": 20, "patience": 2}).train()


def test_a_stop_loses_nothing_of_data_that_come_once() -> None:
    def batches(stop_at: int | None) -> Iterator[Any]:
        for number in range(30):
            if number == stop_at:
                trainer.stop()
            generator = torch.Generator().manual_seed(number)
            inputs = torch.randn(4, FEATURES, generator=generator)
            yield inputs, torch.randint(CLASSES, (4,), generator=generator)

    ends = []
    for stop_at in (None, 7):  # within the third step
        model = small_model()
        trainer = small_trainer(model, batches(stop_at), steps=8, accumulation_steps=3)
        while trainer.train().stopped_by is not None:
            pass
        ends.append(model[0].weight)
    assert torch.equal(*ends)


def test_where_steps_wait_for_their_data_more_processes_load_them() -> None:
    class Waiting(Noisy):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            time.sleep(0.004)
            return super().__getitem__(index)

    def train(workers: Any) -> Trainer:
        data = Waiting(small_data(200))
        trainer = small_trainer(data=data, steps=30, accumulation_steps=2, workers=workers)
        trainer.train()
        return trainer

    trainer = train("auto")
    loader = trainer._feed._source.loader  # type: ignore[attr-defined]
    assert loader.num_workers > 1  # as for a step of 20 ms
    assert_equal(tensors_of(trainer), tensors_of(train(0)))
