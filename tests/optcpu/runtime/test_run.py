"""A run that is interrupted and goes on ends with the bits of one that was not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import (
    Losses,
    assert_equal,
    foreign_loader,
    small_data,
    small_model,
    small_trainer,
    tensors_of,
)

from optcpu.errors import OptcpuError
from optcpu.measure.batches import default_loss
from optcpu.runtime import Callback

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


def test_bf16_weights_and_state(tmp_path: Path) -> None:
    given: dict[str, Any] = {"compile": True, "precision": "fp32", "state_dtype": torch.bfloat16}
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


def test_a_run_of_other_parts_is_refused(tmp_path: Path) -> None:
    small_trainer(checkpoints=tmp_path).train()
    with pytest.raises(OptcpuError, match="with 0 callbacks, this one has 1"):
        small_trainer(checkpoints=tmp_path, callbacks=[_Counter()]).train()
    with pytest.raises(OptcpuError, match="of a run without a stopper, and this run has one"):
        small_trainer(
            checkpoints=tmp_path, validation_data=small_data(), early_stopping={}
        ).train()
    with pytest.raises(OptcpuError, match=r"is of another model.*Missing key"):
        small_trainer(nn.Linear(6, 2), checkpoints=tmp_path).train()


def test_resume_can_be_demanded_or_forbidden(tmp_path: Path) -> None:
    with pytest.raises(OptcpuError, match=r"resume is 'must', but .* holds no checkpoint"):
        small_trainer(checkpoints=tmp_path, resume="must").train()
    small_trainer(checkpoints=tmp_path, resume="never").train()
    with pytest.raises(OptcpuError, match=r"resume is 'never', but .* holds a checkpoint of step 4"):
        small_trainer(checkpoints=tmp_path, resume="never").train()


def test_other_accumulation_in_the_middle_of_a_step_is_refused(tmp_path: Path) -> None:
    small_trainer(checkpoints=tmp_path, loss=_StopAt(1)).train()
    with pytest.raises(OptcpuError, match="in a step of 4 micro-batches, and the data now give 3"):
        small_trainer(checkpoints=tmp_path, accumulation_steps=3).train()


def test_losses_go_on(tmp_path: Path) -> None:
    whole, first, second = Losses(), Losses(), Losses()
    small_trainer(callbacks=[whole]).train()
    small_trainer(checkpoints=tmp_path, callbacks=[first], loss=_StopAt(6)).train()
    small_trainer(checkpoints=tmp_path, callbacks=[second]).train()
    assert first.losses + second.losses == whole.losses
