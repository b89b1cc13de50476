"""What is watched is what validation gives, as far as that can be known, and lost work is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from training import assert_equal, logged_rows, small_data, small_trainer, tensors_of

from optcpu import Trainer
from optcpu.errors import OptcpuError
from optcpu.runtime.checkpoint.folder import CheckpointFolder


class Counts:
    """Several results by name, as some metrics of torchmetrics have them: how many samples there were."""

    def reset(self) -> None:
        self._samples = 0

    def update(self, predictions: Tensor, target: Tensor) -> None:
        self._samples += len(target)

    def compute(self) -> dict[str, int]:
        return {"samples": self._samples, "pairs": self._samples // 2}


def counting(**given: Any) -> Trainer:
    return small_trainer(validation_data=small_data(6), metrics={"n": Counts()}, **given)


def test_results_of_a_metric_that_gives_several_can_be_watched(tmp_path: Path) -> None:
    watched: dict[str, Any] = {"monitor": "n.samples", "mode": "max", "patience": 1}
    result = counting(early_stopping=watched, epochs=5).train()
    assert result.epochs == 2  # the second has not improved
    assert result.stop_reason is not None
    assert result.stop_reason.startswith("n.samples has not improved")
    assert counting(checkpoints={"folder": tmp_path, "best": "n.pairs"}).train().best == 3


@pytest.mark.parametrize("monitor", ["n", "n.sample"])
@pytest.mark.parametrize("setting", ["early_stopping.monitor", "checkpoints.best"])
def test_what_validation_did_not_give_is_told_and_loses_nothing(
    tmp_path: Path, setting: str, monitor: str
) -> None:
    def run(watched: str, folder: Path) -> Trainer:
        best = {"best": watched} if setting == "checkpoints.best" else {}
        given: dict[str, Any] = {"checkpoints": {"folder": folder, **best}}
        if not best:
            given["early_stopping"] = {"monitor": watched, "mode": "max", "patience": 2}
        return counting(log={"folder": folder / "log"}, epochs=4, **given)

    message = rf"{setting} is '{monitor}', but validation gave loss, n.samples, n.pairs\. Remedy"
    with pytest.raises(OptcpuError, match=message):
        run(monitor, tmp_path / "on").train()
    saved = CheckpointFolder(tmp_path / "on").load()
    assert saved is not None
    assert saved.step == 2
    whole, resumed = run("n.samples", tmp_path / "whole"), run("n.samples", tmp_path / "on")
    assert resumed.train().stop_reason == whole.train().stop_reason
    assert_equal(tensors_of(resumed), tensors_of(whole))
    assert logged_rows(tmp_path / "on" / "log") == logged_rows(tmp_path / "whole" / "log")


def test_what_no_validation_can_give_is_refused_before_anything_starts() -> None:
    for monitor in ("m", "m.samples", "nn"):
        with pytest.raises(ValueError, match=f"is '{monitor}', but validation gives loss, n: add"):
            counting(early_stopping={"monitor": monitor})
