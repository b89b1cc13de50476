from __future__ import annotations

import csv
import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from optcpu.errors import OptcpuError
from optcpu.runtime.metrics_log import MetricsLog


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _table(folder: Path) -> list[list[str]]:
    return list(csv.reader((folder / "metrics.csv").open()))


def test_rows_are_in_both_files(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "new" / "log")
    log.add("train", 10, 0, {"loss": 0.5, "lr": 0.1})
    log.add("validation", 10, 1, {"loss": math.nan})
    log.close()
    folder = tmp_path / "new" / "log"
    assert _rows(folder) == [
        {"step": 10, "epoch": 0, "phase": "train", "loss": 0.5, "lr": 0.1},
        {"step": 10, "epoch": 1, "phase": "validation", "loss": "nan"},
    ]
    assert _table(folder) == [
        ["step", "epoch", "phase", "name", "value"],
        ["10", "0", "train", "loss", "0.5"],
        ["10", "0", "train", "lr", "0.1"],
        ["10", "1", "validation", "loss", "nan"],
    ]


def test_steps_that_are_made_again_are_taken_out(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.add("train", step, 0, {"loss": step / 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "epo')  # killed while writing
    resumed = MetricsLog(tmp_path, after_step=2)
    resumed.add("train", 3, 0, {"loss": 7.0})
    assert [(row["step"], row["loss"]) for row in _rows(tmp_path)] == [(1, 0.5), (2, 1), (3, 7)]
    assert [line[0] for line in _table(tmp_path)] == ["step", "1", "2", "3"]


def test_a_new_run_begins_anew(tmp_path: Path) -> None:
    MetricsLog(tmp_path).add("train", 1, 0, {"loss": 1.0})
    MetricsLog(tmp_path)
    assert _rows(tmp_path) == []
    assert '"loss": 1.0' in (tmp_path / "metrics-1.jsonl").read_text()
    assert (tmp_path / "metrics-1.csv").read_text().endswith("1,0,train,loss,1.0\n")
    MetricsLog(tmp_path).add("train", 1, 0, {"loss": 2.0})
    MetricsLog(tmp_path)
    assert '"loss": 2.0' in (tmp_path / "metrics-2.jsonl").read_text()


@pytest.mark.parametrize("told", [(), ("train",), ("train", "validation")])
def test_rows_that_come_again_are_taken_out(tmp_path: Path, told: tuple[str, ...]) -> None:
    log = MetricsLog(tmp_path)
    for step in (1, 2):
        log.add("train", step, 0, {"loss": 1.0})
        log.add("validation", step, 0, {"loss": 1.0})
    MetricsLog(tmp_path, after_step=2, told=told)
    rows = [(row["step"], row["phase"]) for row in _rows(tmp_path)]
    assert rows == [(1, "train"), (1, "validation"), *((2, phase) for phase in told)]


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptcpuError, match=r"cannot write metrics to .*file"):
        MetricsLog(tmp_path / "file")


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricsLog(tmp_path, tensorboard=True)
    log.add("train", 5, 0, {"loss": 0.25})
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(5, 0.25)]


def test_a_folder_that_was_removed_is_made_anew(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "log")
    log.add("train", 1, 0, {"loss": 0.5})
    shutil.rmtree(tmp_path / "log")
    log.add("train", 2, 0, {"loss": 0.25})
    assert [row["step"] for row in _rows(tmp_path / "log")] == [2]
    table = (tmp_path / "log" / "metrics.csv").read_text().splitlines()
    assert table == ["step,epoch,phase,name,value", "2,0,train,loss,0.25"]


@pytest.mark.parametrize("after_step", [0, 4])
def test_tensorboard_hides_what_is_made_again(tmp_path: Path, after_step: int) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, later in ((0, range(2, 9, 2)), (after_step, range(after_step + 2, 13, 2))):
        log = MetricsLog(tmp_path, tensorboard=True, after_step=first)
        for step in later:
            log.add("train", step, 0, {"loss": 0.25})
        log.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", is_full)
    with pytest.raises(
        OptcpuError, match=r"cannot write metrics to .*No space left.*Free some space"
    ):
        MetricsLog(tmp_path)


def test_a_disk_that_is_full_for_tensorboard_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")

    def is_full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = MetricsLog(tmp_path, tensorboard=True)
    monkeypatch.setattr(log._writer, "add_scalar", is_full)
    with pytest.raises(
        OptcpuError, match=r"cannot write metrics to .*No space left.*Free some space"
    ):
        log.add("train", 1, 0, {"loss": 0.5})
    monkeypatch.setattr(log._writer, "close", is_full)
    with pytest.warns(UserWarning, match="No space left"):  # what was trained is not lost for that
        log.close()
