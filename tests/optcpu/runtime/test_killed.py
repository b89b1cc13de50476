"""A run that is killed at random points and started again ends with the bits of one that was not."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training import (
    Losses,
    assert_equal,
    foreign_loader,
    small_trainer,
    tensors_of,
)

KILLS = 100


def _settings(folder: Path | None, loader: bool) -> dict[str, Any]:
    checkpoints = None if folder is None else {"folder": folder, "every_steps": 3}
    return {
        "data": foreign_loader() if loader else None,
        "epochs": 30,
        "accumulation_steps": 2,
        "checkpoints": checkpoints,
        "scheduler": "cosine",
        "optimizer": {"name": "adamw", "lookahead": {"k": 4}},
    }


def _train_and_leave(folder: Path, loader: bool) -> None:
    """What the process that will be killed does."""
    try:
        torch.set_num_threads(1)
        trainer = small_trainer(threads=1, **_settings(folder, loader))
        trainer.train()
        torch.save(tensors_of(trainer), folder / "end.pt")
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.slow
@pytest.mark.parametrize("loader", [False, True], ids=["dataset", "foreign loader"])
def test_killed_at_any_point(tmp_path: Path, loader: bool) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    losses = Losses()
    whole = small_trainer(threads=1, callbacks=[losses], **_settings(None, loader))
    started = time.perf_counter()
    whole.train()
    seconds = time.perf_counter() - started
    moments = random.Random(0)
    killed = 0
    for _ in range(4 * KILLS):
        child = os.fork()
        if child == 0:
            _train_and_leave(tmp_path, loader)
        if killed < KILLS:
            time.sleep(moments.uniform(0, seconds / 8))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
            continue
        assert os.WEXITSTATUS(status) == 0
        assert_equal(torch.load(tmp_path / "end.pt"), tensors_of(whole))
        if killed >= KILLS:
            break
        # It came to its end before the next kill: begin anew.
        for path in sorted(tmp_path.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    assert killed >= KILLS
