"""Whenever a writer dies or the system refuses a call, there is a complete checkpoint, the right one.

The writers are forked, so that they need not import anything; they use no thread but their own.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from optcpu.errors import OptcpuError
from optcpu.runtime.checkpoint.folder import CheckpointFolder

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

# What Python tells an audit hook of, just before it happens.
SYSTEM_CALLS = {
    "open",
    "os.listdir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.scandir",
}
REFUSED = 5  # exit status of a writer that got an OptcpuError


def state(count: int) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((50,), count)},
        "m": [torch.full((9, 9), count)],
        "count": count,
    }


def loaded(folder: CheckpointFolder) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint = folder.load()
    assert checkpoint is not None
    count = checkpoint.state["count"]
    assert isinstance(count, int)
    torch.testing.assert_close(checkpoint.state, state(count))
    return count


def forked(function: Callable[[], object]) -> int:
    """Run in a child process; its id."""
    child = os.fork()
    if child:
        return child
    try:
        function()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def end_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_at_random_moments(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "c", keep_last=1)

    def save_on_and_on(report: int, count: int) -> None:
        while True:
            count += 1
            # Every other save replaces the one before.
            folder.save(state(count), step=count // 2, best=count % 5 == 0)
            os.write(report, b"%d " % count)

    count, draw = 1, random.Random(0)
    folder.save(state(count), step=0)
    kills = 0
    while kills < 30 or count <= 10:  # a busy machine saves little between two kills
        kills += 1
        read, write = os.pipe()
        child = forked(lambda write=write, count=count: save_on_and_on(write, count))
        os.close(write)
        time.sleep(draw.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert end_of(child) == -signal.SIGKILL
        with os.fdopen(read) as pipe:
            finished = [count, *map(int, pipe.read().split())][-1]
        count = loaded(folder)
        assert finished <= count <= finished + 1


@pytest.mark.parametrize("step", [1, 2], ids=["the same step", "the next step"])
@pytest.mark.parametrize("action", ["kill", "refuse"])
def test_stopped_at_each_system_call(tmp_path: Path, step: int, action: str) -> None:
    folder = CheckpointFolder(tmp_path / "c", keep_last=1)

    def save(number: int) -> None:
        _at_call(number, _kill if action == "kill" else _refuse)
        warnings.simplefilter("ignore")
        try:
            folder.save(state(2), step, best=True)
        except OptcpuError as error:
            told = str(error)
            os._exit(REFUSED if str(folder.path) in told and "No space left on" in told else 1)

    ends: list[int] = []
    found: list[int] = []
    while len(ends) < 20 or ends[-3:] != [0, 0, 0]:
        shutil.rmtree(folder.path, ignore_errors=True)
        folder.save(state(1), 1)
        ends.append(end_of(forked(lambda: save(len(ends) + 1))))
        assert ends[-1] in (0, -signal.SIGKILL if action == "kill" else REFUSED), len(ends)
        found.append(loaded(folder))
        assert ends[-1] != 0 or found[-1] == 2  # what was told as saved is there
        if ends[-1] == REFUSED:
            assert not [path for path in folder.path.glob(".*") if path.name != ".lock"]
        folder.save(state(3), 3)
        assert loaded(folder) == 3
        assert not [path for path in folder.path.glob(".*") if path.name != ".lock"]
    assert sum(end != 0 for end in ends) > 10
    assert set(found) == {1, 2}
    if action == "kill":
        assert found == sorted(found)


def _at_call(number: int, action: Callable[[], object]) -> None:
    calls = 0

    def hook(event: str, arguments: object) -> None:
        nonlocal calls
        calls += event in SYSTEM_CALLS
        if calls == number and event in SYSTEM_CALLS:
            action()

    sys.addaudithook(hook)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _refuse() -> None:
    raise OSError(28, "No space left on device")


def test_files_that_cannot_grow(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "c", keep_last=1)
    folder.save(state(1), 1)
    large = {"model": {"w": torch.zeros(10**6)}, "m": torch.zeros(10**6)}

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
        with pytest.raises(OptcpuError) as caught:
            folder.save(large, 2)
        assert str(caught.value) == (
            f"cannot save step 2 in {folder.path}: File too large; the checkpoints that were there are "
            "intact. Free some space there (a checkpoint takes 8 MiB and is complete before an older one "
            "is removed), or give another folder"
        )

    assert end_of(forked(save)) == 0
    assert sorted(os.listdir(folder.path)) == [".lock", "step-00000001"]
    assert loaded(folder) == 1
    folder.save(large, 2)
    assert folder.list() == [folder.path / "step-00000002"]
