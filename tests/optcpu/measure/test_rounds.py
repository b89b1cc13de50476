"""The workers themselves: starting, taking turns, failing, ending."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn

from optcpu.errors import WorkerError
from optcpu.measure import rounds
from optcpu.measure.payload import checked_payload
from optcpu.measure.process import WorkerProcess
from optcpu.measure.progress import Reporter
from optcpu.measure.rounds import Measured, Team, median_ratio, rotated
from optcpu.measure.training import Settings
from optcpu.measure.variants import VARIANTS

X = torch.randn(4, 8)
Y = torch.randint(0, 3, (4,))
SETTINGS = Settings(
    steps=3, accumulation_steps=1, precision="auto", seed=0, threads=1, dropout_off=False
)
EAGER = VARIANTS["eager-fp32"]
OTHER = VARIANTS["eager-bf16"]


class Loud(nn.Linear):
    """Writes to stdout and reads from stdin, both of which belong to the protocol at first."""

    def forward(self, x: Tensor) -> Tensor:
        os.write(1, b'{"result": {}}\nnot json\n')
        print("and more")
        assert os.read(0, 1) == b""
        return super().forward(x)


class Disturbed(nn.Linear):
    """Well in eager FP32; ends in another way in each of the other variants."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        variant = sys.argv[1]
        if variant == "eager-bf16":
            raise RuntimeError("no such kernel\nwith a second line")
        if variant == "eager-bf16-tuned":
            os.write(2, b"last words\n")
            os.kill(os.getpid(), signal.SIGKILL)
        if variant == "eager-fp32-tuned" and self.passes == 6:
            os._exit(7)  # when it has learned and is being timed
        return super().forward(x)


@pytest.fixture
def reporter() -> Reporter:
    return Reporter(False, total=0)


@pytest.fixture
def team(reporter: Reporter) -> Iterator[Team]:
    with Team(reporter, cold=True) as made:
        yield made


def give(team: Team, model: nn.Module) -> None:
    checked_payload(model, (X, Y), None, None).save(team.payload_file)
    team.write(SETTINGS)


def turns(team: Team, count: int = 2) -> None:
    team.take_turns(count, 0.01, [(X, Y)], 1)


def test_a_model_may_write_and_read_as_it_likes(team: Team) -> None:
    give(team, Loud(8, 3))
    team.prepare([EAGER])
    turns(team)
    assert len(team.measured["eager-fp32"].rounds_s) == 2
    assert team.measured["eager-fp32"].peak_mb > 50


@pytest.fixture(scope="module")
def disturbed() -> dict[str, Measured]:
    """What was measured of ``Disturbed``."""
    with Team(Reporter(False, total=0), cold=True) as team:
        give(team, Disturbed(8, 3))
        team.prepare([EAGER, OTHER, VARIANTS["eager-bf16-tuned"], VARIANTS["eager-fp32-tuned"]])
        turns(team, 3)
    return team.measured


def test_one_that_raises_is_told(disturbed: dict[str, Measured]) -> None:
    failed = disturbed["eager-bf16"]
    assert failed.failed == "RuntimeError: no such kernel\nwith a second line"
    assert failed.log is not None
    assert "Traceback" in failed.log


def test_one_that_is_killed_is_told_with_its_last_words(disturbed: dict[str, Measured]) -> None:
    failed = disturbed["eager-bf16-tuned"]
    assert failed.failed is not None
    assert "ended by SIGKILL: the system was probably out of memory" in failed.failed
    assert failed.log == "last words"


def test_one_that_dies_in_its_turn_is_told(disturbed: dict[str, Measured]) -> None:
    failed = disturbed["eager-fp32-tuned"]
    assert failed.preparation is not None
    assert failed.failed == "the worker process ended with exit code 7"


def test_the_others_go_on(disturbed: dict[str, Measured]) -> None:
    assert len(disturbed["eager-fp32"].rounds_s) == 3
    assert disturbed["eager-fp32"].failed is None


def test_nothing_goes_on_without_the_reference(team: Team) -> None:
    give(team, nn.Linear(9, 3))
    with pytest.raises(WorkerError, match=r"(?s)eager-fp32 failed: RuntimeError: mat1.*Traceback"):
        team.prepare([EAGER])


def test_no_worker_is_started_for_which_there_is_no_memory(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(team, nn.Linear(8, 3))
    team.prepare([EAGER])
    nothing = psutil.virtual_memory()._replace(available=10 * 2**20)
    monkeypatch.setattr(rounds.psutil, "virtual_memory", lambda: nothing)
    team.prepare([OTHER])
    assert "10 MB of memory are left" in (team.measured["eager-bf16"].failed or "")


def test_leaving_ends_the_workers_and_removes_the_folder(reporter: Reporter) -> None:
    others = set(psutil.Process().children())
    found: list[psutil.Process] = []

    def interrupted(team: Team) -> None:
        with team:
            give(team, nn.Linear(8, 3))
            team.prepare([EAGER])
            found.extend(set(psutil.Process().children()) - others)
            assert team.folder.stat().st_mode & 0o077 == 0
            raise KeyboardInterrupt

    team = Team(reporter, cold=True)
    with pytest.raises(KeyboardInterrupt):
        interrupted(team)
    assert len(found) == 1
    assert not found[0].is_running()
    assert not team.folder.exists()


def test_a_worker_does_not_outlive_the_process_that_started_it(
    tmp_path: Path, reporter: Reporter
) -> None:
    worker = WorkerProcess(EAGER, tmp_path, cold=True)
    process = psutil.Process(worker._process.pid)
    assert worker._process.stdin is not None
    worker._process.stdin.close()  # what the system does when this process ends
    process.wait(timeout=60)
    worker.close()


def test_a_worker_that_is_silent_is_given_up(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optcpu.measure.process._ANSWER_LIMIT_S", 0.1)
    monkeypatch.setattr("optcpu.measure.process._POLL_S", 0.1)
    worker = WorkerProcess(EAGER, tmp_path, cold=True)
    started = time.monotonic()
    assert worker.ask({"do": "prepare"}, reporter) is None
    assert time.monotonic() - started < 30
    assert "gave no answer" in (worker.failed or "")


def test_the_median_ratio_is_over_rounds() -> None:
    assert median_ratio([4.0, 2.0, 9.0], [1.0, 1.0, 3.0]) == 3.0


def test_the_order_rotates() -> None:
    assert [rotated(["a", "b", "c"], n) for n in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]
