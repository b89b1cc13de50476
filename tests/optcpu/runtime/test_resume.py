"""A run that is interrupted and goes on ends with the bits of one that was not."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate
from training import (
    Losses,
    assert_equal,
    foreign_loader,
    small_data,
    small_model,
    small_trainer,
    tensors_of,
)

from optcpu import Trainer
from optcpu.errors import OptcpuError
from optcpu.measure.batches import default_loss
from optcpu.runtime import Callback, CheckpointFolder
from optcpu.runtime.data.loading import Feed
from optcpu.runtime.plan import Plan
from optcpu.runtime.run import Run
from optcpu.runtime.settings import Settings
from optcpu.runtime.unsaved import Unsaved
from optcpu.runtime.world import World

MICRO_BATCHES = 12  # in two epochs


class _StopAt:
    """A loss that asks the process to stop in a certain micro-batch."""

    def __init__(self, number: int | None) -> None:
        self._left = number

    def __call__(self, output: Any, batch: Any) -> Tensor:
        if self._left is not None and torch.is_grad_enabled():
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            self._left -= 1
        return default_loss(output, batch)


VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "dataset": dict,
    "foreign loader": lambda: {"data": foreign_loader()},
    "lookahead, schedule, validation": lambda: {
        "optimizer": {"name": "lamb", "lookahead": {"k": 3, "pullback": "pullback"}},
        "scheduler": {"name": "cosine", "warmup_steps": 2},
        "validation_data": small_data(10, seed=7),
        "metrics": ["accuracy"],
        "early_stopping": {"patience": 10},
        "max_grad_norm": 1.0,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("number", range(MICRO_BATCHES))
def test_a_stop_in_any_micro_batch(tmp_path: Path, variant: str, number: int) -> None:
    whole = small_trainer(**VARIANTS[variant]())
    expected = whole.train()

    given = {"checkpoints": tmp_path, **VARIANTS[variant]()}
    stopped = small_trainer(loss=_StopAt(number), **given)
    result = stopped.train()
    assert result.stopped_by == "SIGTERM"
    assert result.steps < 4 or number == MICRO_BATCHES - 1
    torch.manual_seed(12345)  # a new process begins elsewhere
    resumed = small_trainer(small_model(seed=9), **given)
    final = resumed.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))
    assert (final.steps, final.samples, final.metrics) == (
        expected.steps,
        expected.samples,
        expected.metrics,
    )


@pytest.mark.parametrize("fetch", [1, 6, 9])
def test_a_stop_while_a_step_is_drawn_again(tmp_path: Path, fetch: int) -> None:
    whole = small_trainer()
    whole.train()
    small_trainer(loss=_StopAt(2), checkpoints=tmp_path).train()

    class Stops(Dataset[Any]):
        left, samples = fetch, small_data()

        def __len__(self) -> int:
            return len(self.samples)

        def __getitem__(self, index: int) -> Any:
            self.left -= 1
            if self.left == 0:
                again.stop()
            return self.samples[index]

    again = small_trainer(data=Stops(), checkpoints=tmp_path, workers=0)
    assert again.train().stopped_by == "stop()"
    resumed = small_trainer(small_model(seed=9), checkpoints=tmp_path)
    resumed.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))


class _Noisy(Dataset[Any]):
    """Augments with generators of its own, one of them in a transform, and perhaps one made late."""

    def __init__(self, *, late: bool = True) -> None:
        self.samples = small_data()
        self.random = np.random.default_rng(0)
        self.transforms = [partial(_add_noise, generator=torch.Generator().manual_seed(1))]
        self.late: random.Random | None = None if late else random.Random(2)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        self.late = self.late or random.Random(2)
        x, y = self.samples[index]
        x = x + float(self.random.standard_normal()) + self.late.random()
        for transform in self.transforms:
            x = transform(x)
        return x, y


def _add_noise(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + torch.randn(x.shape, generator=generator)


class _MixUp:
    def __init__(self) -> None:
        self.random = np.random.RandomState(3)

    def __call__(self, samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        share = float(self.random.beta(0.4, 0.4))
        return share * x + (1 - share) * x[self.random.permutation(len(x))], y


def _noisy_loader(*, late: bool = False) -> DataLoader[Any]:
    return DataLoader(_Noisy(late=late), 4, shuffle=True, collate_fn=_MixUp())


class _NoisyModel(nn.Module):
    """Has a generator of its own, and a buffer that its state_dict() leaves out."""

    running: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.layers = small_model(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.register_buffer("running", torch.zeros(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running = 0.9 * self.running + 0.1 * x.mean(0)
        noise = torch.randn(x.shape, generator=self.generator)
        result: Tensor = self.layers(x - self.running + 0.1 * noise)
        return result


@pytest.mark.parametrize("stop", [1, 4, 8])
@pytest.mark.parametrize(
    ("make_model", "given"),
    [
        (small_model, {"data": _Noisy}),
        (small_model, {"data": _noisy_loader}),
        (small_model, {"data": partial(_noisy_loader, late=True)}),
        (small_model, {"collate_fn": _MixUp}),
        (_NoisyModel, {}),
    ],
    ids=["dataset", "foreign loader", "late generator", "collate_fn", "model"],
)
def test_generators_that_parts_have_of_their_own(
    tmp_path: Path, make_model: Callable[..., nn.Module], given: dict[str, Any], stop: int
) -> None:
    def trainer(seed: int = 0, **options: Any) -> Trainer:
        made = {name: make() for name, make in given.items()}
        return small_trainer(make_model(seed), **made, **options)

    whole = trainer()
    whole.train()
    trainer(loss=_StopAt(stop), checkpoints=tmp_path).train()
    resumed = trainer(seed=9, checkpoints=tmp_path)
    resumed.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))


class _EndsWithTheGroup(Dataset[Any]):
    """Raises once the process is to stop, as loading processes do that the same signal has ended."""

    def __init__(self, fetches: int | None) -> None:
        self.samples, self.fetches = small_data(), fetches

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        if self.fetches is not None:
            self.fetches -= 1
            if self.fetches < 0:
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("DataLoader worker exited unexpectedly")
        return self.samples[index]


def test_a_signal_that_ends_the_loading_processes_as_well_is_no_failure(tmp_path: Path) -> None:
    whole = small_trainer(data=_EndsWithTheGroup(None), workers=0)
    whole.train()
    stopped = small_trainer(data=_EndsWithTheGroup(30), workers=0, checkpoints=tmp_path)
    assert stopped.train().stopped_by == "SIGTERM"
    resumed = small_trainer(
        small_model(9), data=_EndsWithTheGroup(None), workers=0, checkpoints=tmp_path
    )
    resumed.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))


def test_stopped_again_and_again(tmp_path: Path) -> None:
    whole = small_trainer(data=foreign_loader())
    whole.train()
    for attempt in range(MICRO_BATCHES + 1):
        trainer = small_trainer(
            small_model(seed=attempt), foreign_loader(), loss=_StopAt(0), checkpoints=tmp_path
        )
        if trainer.train().stopped_by is None:
            break
    assert attempt == MICRO_BATCHES
    assert_equal(tensors_of(trainer), tensors_of(whole))


@pytest.mark.slow
def test_bf16_weights_and_state(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "compile": True,
        "compile_loss": False,  # the loss is another one where the run stops
        "precision": "fp32",
        "state_dtype": torch.bfloat16,
    }
    for weights in ("split", "bf16"):
        folder = tmp_path / weights
        whole = small_trainer(weights=weights, **given)
        whole.train()
        small_trainer(weights=weights, checkpoints=folder, loss=_StopAt(5), **given).train()
        resumed = small_trainer(small_model(9), weights=weights, checkpoints=folder, **given)
        resumed.train()
        assert_equal(tensors_of(resumed), tensors_of(whole))


class _Counter(Callback):
    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def test_callbacks_go_on(tmp_path: Path) -> None:
    small_trainer(checkpoints=tmp_path, callbacks=[_Counter()], loss=_StopAt(5)).train()
    counter = _Counter()
    small_trainer(checkpoints=tmp_path, callbacks=[counter]).train()
    assert counter.steps == 4


class _FromSecond(_Counter):
    """Has nothing to save before its second step."""

    def state_dict(self) -> dict[str, Any]:
        return {} if self.steps < 2 else super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state.get("steps", 1)


def test_callbacks_without_a_state_yet_go_back_to_that(tmp_path: Path) -> None:
    counter = _FromSecond()

    def fail_once(output: Any, batch: Any) -> Tensor:
        if counter.steps == 3 and not failed:
            failed.append(True)
            raise KeyboardInterrupt
        return default_loss(output, batch)

    failed: list[bool] = []
    checkpoints = {"folder": tmp_path, "every_steps": 1, "keep_last": 10}
    given: dict[str, Any] = {"accumulation_steps": 1, "checkpoints": checkpoints, "loss": fail_once}
    trainer = small_trainer(callbacks=[counter], **given)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    for path in sorted(tmp_path.glob("step-*"))[1:]:
        shutil.rmtree(path)
    result = trainer.train()
    assert counter.steps == result.steps


class _Best(Callback):
    """Has a state from its first validation on, and expects what it gave."""

    def __init__(self) -> None:
        self.best: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self.best is None else {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]


def test_an_empty_state_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    small_trainer(checkpoints=tmp_path, callbacks=[_Best()], loss=_StopAt(5)).train()
    small_trainer(checkpoints=tmp_path, callbacks=[_Best()], loss=_StopAt(2)).train()
    assert small_trainer(checkpoints=tmp_path).train().steps == 4  # nor is its callback missed


class _StatefulOrder:
    """Batches whose order is counted on from epoch to epoch, by an object that knows the epoch."""

    def __init__(self) -> None:
        self.epoch = self.taken = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.taken = epoch, 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(20, generator=generator).tolist()
        while self.taken < 20:
            self.taken += 4
            yield order[self.taken - 4 : self.taken]

    def __len__(self) -> int:
        return 5


@pytest.mark.parametrize("stop", [3, 7, 9])
def test_a_late_generator_and_a_sampler_that_counts(tmp_path: Path, stop: int) -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(_Noisy(), batch_sampler=_StatefulOrder())

    whole = small_trainer(data=loader(), accumulation_steps=1)
    whole.train()
    given: dict[str, Any] = {"accumulation_steps": 1, "checkpoints": tmp_path}
    small_trainer(data=loader(), loss=_StopAt(stop), **given).train()
    resumed = small_trainer(small_model(9), data=loader(), **given)
    resumed.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))


@pytest.mark.parametrize("fetches", [34, 41])  # before and after the stop would be seen anyway
@pytest.mark.filterwarnings("ignore:.*persistent_workers")
def test_persistent_workers_that_end_with_the_group(tmp_path: Path, fetches: int) -> None:
    def loader(fetches: int | None) -> DataLoader[Any]:
        data = _EndsInWorker(fetches)
        return DataLoader(data, 4, num_workers=1, persistent_workers=True)

    whole = small_trainer(data=loader(None), accumulation_steps=1, epochs=3)
    whole.train()
    given: dict[str, Any] = {"accumulation_steps": 1, "checkpoints": tmp_path, "epochs": 3}
    assert small_trainer(data=loader(fetches), **given).train().stopped_by == "SIGTERM"
    resumed = small_trainer(small_model(9), data=loader(None), **given)
    resumed.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))


class _EndsInWorker(Dataset[Any]):
    """Its worker ends by the signal that tells the process that trains to stop."""

    def __init__(self, fetches: int | None) -> None:
        self.samples, self.fetches = small_data(20), fetches

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        if self.fetches is not None:
            self.fetches -= 1
            if self.fetches == 0:
                os.kill(os.getppid(), signal.SIGTERM)
                os._exit(
                    0
                )  # else PyTorch raises the news anywhere, and not where batches are fetched
        return self.samples[index]


def test_buffers_that_no_checkpoint_holds_go_back_to_the_first_ones(tmp_path: Path) -> None:
    """Also where training is begun again after an error, in the same process."""

    class Doubles(nn.Module):
        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layers = small_model()
            self.register_buffer("scale", torch.ones(1), persistent=False)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 3:
                self.scale *= 2
            if self.calls == 4:
                raise KeyboardInterrupt
            result: Tensor = self.layers(x * self.scale)
            return result

    model = Doubles()
    checkpoints = {"folder": tmp_path, "every_steps": 2}
    trainer = small_trainer(model, accumulation_steps=1, checkpoints=checkpoints)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert model.scale.item() == 1


def test_a_run_of_other_parts_is_refused(tmp_path: Path) -> None:
    small_trainer(checkpoints=tmp_path, callbacks=[_Counter()]).train()
    with pytest.raises(OptcpuError, match="has the state of a callback _Counter, which this run"):
        small_trainer(checkpoints=tmp_path, callbacks=[Losses()]).train()
    with pytest.raises(OptcpuError, match="of a run without freezing, and this run has a freezer"):
        small_trainer(checkpoints=tmp_path, compile=True, freezing={}).train()
    with pytest.raises(OptcpuError, match="run with AdamW, this one has Lookahead around SGD"):
        small_trainer(
            checkpoints=tmp_path, optimizer={"name": "sgd", "lookahead": {}}, lr=0.1
        ).train()
    with pytest.raises(OptcpuError, match=r"is of another model.*Missing key"):
        small_trainer(nn.Linear(6, 2), checkpoints=tmp_path).train()


def test_an_optimizer_with_other_groups_is_refused(tmp_path: Path) -> None:
    def trainer(*groups: str) -> Trainer:
        model = small_model()
        parts = [{"params": list(model.get_submodule(name).parameters())} for name in groups]
        return small_trainer(
            model, checkpoints=tmp_path, optimizer=torch.optim.SGD(parts, lr=0.1), lr=None
        )

    trainer("0", "1", "4").train()
    for other in (("0", "1"), ("0", "4", "1")):
        with pytest.raises(
            OptcpuError,
            match=r"other groups of parameters \(0.weight, 0.bias \| 1.weight, .*; now 0.weight",
        ):
            trainer(*other).train()


def test_a_step_resumed_in_its_middle_and_then_skipped(tmp_path: Path) -> None:
    """Running statistics are those of before the step, not those of the checkpoint in its middle."""

    class StopsThenBad(_StopAt):
        def __init__(self, stop_at: int | None, bad_at: int) -> None:
            super().__init__(stop_at)
            self._left = bad_at

        def __call__(self, output: Any, batch: Any) -> Tensor:
            self._left -= 1
            return super().__call__(output, batch) * (math.nan if self._left == 0 else 1)

    whole = small_trainer(loss=StopsThenBad(None, 8), on_nan="skip")
    whole.train()
    stopped = small_trainer(loss=StopsThenBad(6, 8), on_nan="skip", checkpoints=tmp_path)
    stopped.train()
    resumed = small_trainer(loss=StopsThenBad(None, 1), on_nan="skip", checkpoints=tmp_path)
    resumed.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))


def test_other_settings_of_lookahead_are_told(tmp_path: Path) -> None:
    def trainer(steps: int, k: int, alpha: float) -> Trainer:
        lookahead = {"k": k, "alpha": alpha}
        optimizer = {"name": "sgd", "lr": 0.1, "lookahead": lookahead}
        return small_trainer(checkpoints=tmp_path, steps=steps, lr=None, optimizer=optimizer)

    trainer(2, 5, 0.5).train()
    with pytest.warns(UserWarning, match=r"k 5 instead of 3, alpha 0\.5 instead of 0\.75"):
        trainer(3, 3, 0.75).train()


@pytest.mark.parametrize("now", [8, 2])
def test_other_batches_of_an_own_loader_are_refused(tmp_path: Path, now: int) -> None:
    """Within an epoch: so many of them do not hold the samples that were used."""

    def trainer(batch_size: int, stop_at: int | None, **given: Any) -> Trainer:
        loader = DataLoader(small_data(32), batch_size=batch_size)
        folder = {"folder": tmp_path, "every_steps": 1}
        return small_trainer(data=loader, loss=_StopAt(stop_at), checkpoints=folder, **given)

    trainer(4, 5).train()
    with pytest.raises(OptcpuError, match=rf"batches in an epoch=8, but now .*={32 // now}: which"):
        trainer(now, None).train()
    trainer(4, None).train()
    trainer(now, None, epochs=3).train()  # between epochs there is nothing to be mistaken


def test_epochs_of_an_own_loader_may_differ_in_length(tmp_path: Path) -> None:
    class Growing:
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return 4 + self.epoch

        def __iter__(self) -> Any:
            return iter([torch.utils.data.default_collate(list(small_data(4)))] * len(self))

    def trainer(folder: str, stop_at: int | None) -> Trainer:
        return small_trainer(data=Growing(), checkpoints=tmp_path / folder, loss=_StopAt(stop_at))

    whole = trainer("whole", None)
    whole.train()
    assert trainer("stopped", 6).train().stopped_by == "SIGTERM"  # in the second epoch
    resumed = trainer("stopped", None)
    resumed.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))


@pytest.mark.parametrize("number", range(4))
def test_an_embedding_with_sparse_gradients(tmp_path: Path, number: int) -> None:
    """No file holds these; a step with some is begun anew."""

    def trainer(folder: str, stop_at: int | None) -> Trainer:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
        data = TensorDataset(torch.arange(64).view(32, 2) % 9, torch.arange(32) % 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        settings = {"optimizer": optimizer, "lr": None, "checkpoints": tmp_path / folder}
        return small_trainer(model, data, loss=_StopAt(stop_at), **settings)

    whole = trainer("whole", None)
    whole.train()
    assert trainer("stopped", number).train().stopped_by == "SIGTERM"
    resumed = trainer("stopped", None)
    resumed.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))


def test_an_expanded_buffer(tmp_path: Path) -> None:
    def trainer(stop_at: int | None) -> Trainer:
        model = small_model()
        model.register_buffer("ones", torch.ones(1).expand(4))
        return small_trainer(model, checkpoints=tmp_path, loss=_StopAt(stop_at))

    trainer(6).train()
    resumed = trainer(None)
    assert resumed.train().steps == 4


@pytest.mark.parametrize("part", ["buffer", "callback"])
def test_what_no_checkpoint_holds_is_told_before_the_first_step(tmp_path: Path, part: str) -> None:
    class Holds(Losses):
        def on_train_begin(self, trainer: Any) -> None:
            self.seen = {1, 2}

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

    model, losses = small_model(), Holds() if part == "callback" else Losses()
    if part == "buffer":
        model.register_buffer("graph", torch.eye(3).to_sparse())
    trainer = small_trainer(model, checkpoints=tmp_path, callbacks=[losses])
    with pytest.raises(TypeError, match=r"model\.graph is a tensor|callbacks.*seen is a set"):
        trainer.train()
    assert losses.losses == []


def test_other_settings_of_the_optimizer_are_told(tmp_path: Path) -> None:
    """The checkpoint's are used; the rate that the schedule has reached is not another setting."""
    settings = {"checkpoints": tmp_path, "steps": 2, "schedule": "linear"}
    small_trainer(**settings).train()
    settings["steps"] = 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small_trainer(**settings).train()


def test_settings_that_a_scheduler_of_pytorch_follows_are_told(tmp_path: Path) -> None:
    def trainer(steps: int, **given: float) -> Any:
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), **given)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
        return small_trainer(
            model,
            optimizer=optimizer,
            scheduler=scheduler,
            lr=None,
            checkpoints=tmp_path,
            steps=steps,
        )

    trainer(2, lr=0.05).train()
    other = trainer(3, lr=0.5, weight_decay=0.25)
    with pytest.warns(
        UserWarning, match=r"weight_decay 0\.01 instead of 0\.25, initial_lr 0\.05 instead of 0\.5"
    ):
        other.train()
    assert other.optimizer.param_groups[0]["weight_decay"] == 0.01


def test_resume_can_be_demanded_or_forbidden(tmp_path: Path) -> None:
    with pytest.raises(OptcpuError, match=r"resume is 'must', but .* holds no checkpoint"):
        small_trainer(checkpoints=tmp_path, resume="must").train()
    small_trainer(checkpoints=tmp_path, resume="never").train()
    with pytest.raises(
        OptcpuError, match=r"resume is 'never', but .* holds a checkpoint of step 4"
    ):
        small_trainer(checkpoints=tmp_path, resume="never").train()


@pytest.mark.parametrize("other", [{"accumulation_steps": 3}, {"batch_size": 2}])
def test_a_step_of_other_micro_batches_is_begun_anew(tmp_path: Path, other: dict[str, int]) -> None:
    """So that each of its samples counts once, and as much as any other."""
    seen: list[Tensor] = []

    def noted(output: Any, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            seen.extend(batch[0])
        return default_loss(output, batch)

    data = small_data(22)
    settings: dict[str, Any] = {"data": data, "epochs": 1, "checkpoints": tmp_path}
    small_trainer(loss=_StopAt(1), **settings).train()  # two of four micro-batches are used
    resumed = small_trainer(loss=noted, **settings, **other)
    result = resumed.train()
    assert result.samples == len(seen) == 22
    fresh = small_trainer(data=data, epochs=1, **other)
    fresh.train()
    assert_equal(tensors_of(resumed), tensors_of(fresh))


@pytest.mark.parametrize("number", [1, 8, 9, 10])
def test_a_rollback_goes_back_as_far_as_without_a_stop(tmp_path: Path, number: int) -> None:
    data = small_data(64)
    data.tensors[0][5] = math.nan  # in the 12th step

    def train(folder: str, stop_at: int | None) -> Any:
        trainer = small_trainer(
            nn.Linear(6, 3),
            DataLoader(data, batch_size=4, sampler=[*range(8, 52), 5, *range(52, 63)]),
            accumulation_steps=1,
            epochs=1,
            on_nan="rollback",
            checkpoints={"folder": tmp_path / folder, "every_steps": 4},
            loss=_StopAt(stop_at),
        )
        trainer.train()
        return trainer

    torch.manual_seed(0)
    whole = train("whole", None)
    torch.manual_seed(0)
    train("stopped", number)
    assert_equal(tensors_of(train("stopped", None)), tensors_of(whole))


@pytest.mark.parametrize("again", ["in this process", "from the checkpoint"])
@pytest.mark.parametrize("number", range(4, 8))
def test_a_stop_within_a_step_leaves_its_beginning_to_go_back_to(
    tmp_path: Path, number: int, again: str
) -> None:
    """Its checkpoint takes the place of the one behind the step before, running statistics included."""

    class Bad(_StopAt):
        def __init__(self, stop_at: int | None, bad_in: int) -> None:
            super().__init__(stop_at)
            self._count = -bad_in

        def __call__(self, output: Any, batch: Any) -> Tensor:
            self._count += torch.is_grad_enabled()
            return super().__call__(output, batch) * (math.nan if self._count == 0 else 1)

    def make(folder: str, stop_at: int | None, bad_in: int) -> Trainer:
        return small_trainer(
            data=small_data(64),
            on_nan="rollback",
            checkpoints={"folder": tmp_path / folder, "every_steps": 1},
            loss=Bad(stop_at, bad_in),
        )

    whole = make("whole", None, 8)  # in the last micro-batch of the second step
    whole.train()
    stopped = make("stopped", number, 8)
    assert stopped.train().stopped_by == "SIGTERM"
    if again == "from the checkpoint":
        stopped = make("stopped", None, 7 - number)
    stopped.train()
    assert_equal(tensors_of(stopped), tensors_of(whole))


def test_the_best_stays_what_was_validated(tmp_path: Path) -> None:
    found: list[dict[str, Tensor]] = []

    class Best(Callback):
        def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
            found.append(safetensors.torch.load_file(path / "model.safetensors"))

    trainer = small_trainer(
        data=small_data(64),
        validation_data=small_data(8),
        validate_every=1,
        checkpoints={"folder": tmp_path, "every_steps": 100, "best": "loss"},
        loss=_StopAt(5),
        callbacks=[Best()],
    )
    trainer.train()
    validated, stopped = found
    assert_equal(stopped, validated)
    assert not torch.equal(trainer.model[1].running_mean, stopped["1.running_mean"])


def test_losses_go_on(tmp_path: Path) -> None:
    whole, first, second = Losses(), Losses(), Losses()
    small_trainer(callbacks=[whole]).train()
    small_trainer(checkpoints=tmp_path, callbacks=[first], loss=_StopAt(6)).train()
    small_trainer(checkpoints=tmp_path, callbacks=[second]).train()
    assert first.losses + second.losses == whole.losses


def test_parts_without_a_past_can_be_added(tmp_path: Path) -> None:
    small_trainer(checkpoints=tmp_path, callbacks=[_Counter()], loss=_StopAt(5)).train()
    counter = _Counter()
    result = small_trainer(
        checkpoints=tmp_path,
        callbacks=[Losses(), counter, _Counter()],
        validation_data=small_data(),
        early_stopping={},
    ).train()
    assert (result.steps, counter.steps) == (4, 4)


def test_a_run_that_stopped_early_goes_on_with_more_patience(tmp_path: Path) -> None:
    def train(patience: int) -> int:
        inputs, targets = small_data().tensors
        return (
            small_trainer(
                epochs=8,
                lr=0.1,
                validation_data=TensorDataset(inputs, (targets + 1) % 3),
                early_stopping={"patience": patience},
                checkpoints=tmp_path,
            )
            .train()
            .epochs
        )

    assert train(2) == train(2) < train(4) < 8


class _Weighted(nn.Module):
    """A loss with parameters."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self._stop = _StopAt(stop_at)

    def forward(self, output: Any, batch: Any) -> Tensor:
        return self._stop(output * self.weight, batch)


@pytest.mark.parametrize("number", [1, 4, 7])
def test_a_loss_with_parameters(tmp_path: Path, number: int) -> None:
    given: dict[str, Any] = {"max_grad_norm": 0.01, "optimizer": "sgd", "lr": 1.0}
    losses = [_Weighted(), _Weighted(number), _Weighted()]
    small_trainer(loss=losses[0], **given).train()
    small_trainer(loss=losses[1], checkpoints=tmp_path, **given).train()
    small_trainer(small_model(9), loss=losses[2], checkpoints=tmp_path, **given).train()
    assert torch.equal(losses[0].weight, losses[2].weight)
    assert 0 < (losses[0].weight - 1).norm() < 0.2  # four steps and momentum, of 0.01 at most each


def test_several_processes_begin_a_step_anew(tmp_path: Path) -> None:
    trainer = small_trainer(checkpoints=tmp_path, loss=_StopAt(1))
    trainer.train()
    saved = CheckpointFolder(tmp_path).load()
    assert saved is not None
    assert saved.state["pending"]["done"] == 2
    two = World(rank=1, size=2)
    run = Run(
        trainer.model,
        default_loss,
        trainer.optimizer,
        trainer._scheduler,
        Feed(small_data(), batch_size=4, rank=1, world_size=2),
        two,
        None,
        None,
        [],
        Plan.of(4, 2, 2, None),
        Unsaved(trainer.model),
        Settings.given(trainer.optimizer, trainer._scheduler),
    )
    assert run.load_state_dict(saved.state) is None
    assert run.feed.batches_done == 0
    assert all(p.grad is None for p in trainer.model.parameters())


def test_another_scheduler_is_refused(tmp_path: Path) -> None:
    def trainer(make: Callable[[Any], Any] | None, steps: int) -> Any:
        return small_trainer(checkpoints=tmp_path, scheduler=make, steps=steps)

    schedulers = torch.optim.lr_scheduler
    trainer(lambda optimizer: schedulers.StepLR(optimizer, 3), 2).train()
    trainer(lambda optimizer: schedulers.StepLR(optimizer, 3), 4).train()
    with pytest.raises(OptcpuError, match="of a run with StepLR, this one has CosineAnnealingLR"):
        trainer(lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 6), 6).train()
    with pytest.raises(OptcpuError, match="of a run with StepLR, this one has Schedule"):
        trainer(None, 6).train()


def test_the_parts_of_a_scheduler_count(tmp_path: Path) -> None:
    schedulers = torch.optim.lr_scheduler

    def chained(last: str) -> Callable[[Any], Any]:
        return lambda optimizer: schedulers.ChainedScheduler(
            [schedulers.StepLR(optimizer, 3), getattr(schedulers, last)(optimizer, 0.9)]
        )

    small_trainer(checkpoints=tmp_path, scheduler=chained("ExponentialLR"), steps=2).train()
    with pytest.raises(OptcpuError, match=r"of StepLR, ExponentialLR, this one has .* ConstantLR"):
        small_trainer(checkpoints=tmp_path, scheduler=chained("ConstantLR"), steps=4).train()


def test_other_settings_of_the_scheduler_are_told(tmp_path: Path) -> None:
    def trainer(gamma: float, steps: int) -> Any:
        def make(optimizer: Any) -> Any:
            return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma)

        return small_trainer(checkpoints=tmp_path, scheduler=make, steps=steps)

    trainer(0.5, 2).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(0.5, 3).train()
    with pytest.warns(UserWarning, match=r"settings of the scheduler: gamma 0\.5 instead of 0\.9"):
        trainer(0.9, 4).train()


def test_a_scheduler_that_ends_before_a_longer_run_is_refused(tmp_path: Path) -> None:
    def trainer(epochs: int, callback: Losses) -> Any:
        def make(optimizer: Any) -> Any:
            return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=2 * epochs)

        return small_trainer(
            checkpoints=tmp_path, scheduler=make, epochs=epochs, callbacks=[callback]
        )

    assert trainer(2, Losses()).train().steps == 4
    assert trainer(2, Losses()).train().steps == 4
    longer = Losses()
    told = r"OneCycleLR has 0 optimizer steps to its end, and the run has 4, .*model\.safetensors"
    for _ in range(2):
        with (
            pytest.warns(UserWarning, match="total_steps 4 instead of 8"),
            pytest.raises(OptcpuError, match=told),
        ):
            trainer(4, longer).train()
    assert longer.losses == []


def test_a_group_that_a_callback_adds_goes_on(tmp_path: Path) -> None:
    class Adds(Losses):
        def on_train_begin(self, trainer: Any) -> None:
            self.is_new = len(trainer.optimizer.param_groups) == 1

        def on_epoch_end(self, trainer: Any) -> None:
            if self.is_new and len(trainer.optimizer.param_groups) == 1:
                head = list(trainer.model[4].parameters())
                trainer.optimizer.add_param_group({"params": head, "lr": 0.01})

    def trainer(folder: str, groups: int, stop_at: int | None) -> Any:
        model = small_model()
        parts = [{"params": model[0].parameters()}, {"params": model[4].parameters(), "lr": 0.01}]
        optimizer = torch.optim.SGD(parts[:groups], lr=0.1, momentum=0.9)
        return small_trainer(
            model,
            optimizer=optimizer,
            lr=None,
            scheduler="cosine",
            loss=_StopAt(stop_at),
            callbacks=[Adds()],
            checkpoints=tmp_path / folder,
            epochs=4,
        )

    whole = trainer("whole", 1, None)
    whole.train()
    assert trainer("stopped", 1, 15).train().stopped_by == "SIGTERM"
    resumed = trainer("stopped", 2, None)
    resumed.train()
    assert_equal(tensors_of(resumed), tensors_of(whole))
