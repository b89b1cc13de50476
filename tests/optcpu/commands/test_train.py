from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from optcpu.cli import main

JOB = """
import os, signal, torch
from torch.utils.data import TensorDataset

class Slow(torch.nn.Linear):
    def forward(self, x):
        if os.path.exists("stop-me"):
            os.remove("stop-me")
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(x)

def make():
    inputs = torch.randn(64, 4)
    data = TensorDataset(inputs, (inputs.sum(1) > 0).long())
    return Slow(4, 2), data, data

def make_wrong():
    return (torch.nn.Linear(5, 2), *make()[1:])

def make_none():
    return 1 / 0
"""
CONFIG = """
job = "{module}:make"
epochs = 3
batch_size = 8
compile = false
checkpoints = "checkpoints"
log = "log"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    module = f"job_{abs(hash(tmp_path))}"
    (tmp_path / f"{module}.py").write_text(JOB)
    (tmp_path / "run.toml").write_text(CONFIG.format(module=module))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_it_trains_and_tells(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["train", "--config", "run.toml", "--no-progress"])
    out = capsys.readouterr()
    assert status == 0
    assert out.out.startswith("done: 24 steps, 3 epochs, 192 samples\nvalidation: loss 0.")
    assert out.err == ""
    rows = [json.loads(line) for line in (folder / "log/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 24
    weights = safetensors.torch.load_file(
        folder / "checkpoints" / "step-00000024" / "model.safetensors"
    )
    assert weights["weight"].shape == (2, 4)
    assert weights["weight"].dtype == torch.float32


def test_stopped_and_started_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "stop-me").touch()
    status = main(["train", "--config", "run.toml"])
    out = capsys.readouterr()
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; start again to go on: 1 steps" in out.out
    assert main(["train", "--config", "run.toml"]) == 0
    assert f"going on from {folder}/checkpoints/step-00000001" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.toml"], "cannot read none.toml: No such file or directory"),
        (["--config", "run.toml", "--set", "epoch=3"], "no setting 'epoch'; did you mean 'epochs'"),
        (
            ["--config", "run.toml", "--set", "job=mpl"],
            "no job is called 'mpl'; did you mean 'mlp'",
        ),
        (["--config", "run.toml", "--set", "epochs"], "expected NAME=VALUE"),
        (["--config", "run.toml", "--set", "checkpoints=run.toml"], "run.toml"),
    ],
)
def test_wrong_input_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("optcpu: ")]) == 1


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            "make_wrong",
            r"RuntimeError: .*8x4 and 5x2.*; .* failed: model\(float32\[8, 4\]\) .*--traceback",
        ),
        (
            "make_none",
            r"ZeroDivisionError: division by zero; it comes from job_\d+:make_none\(\) ",
        ),
    ],
)
def test_an_error_of_the_users_code_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], factory: str, message: str
) -> None:
    config = folder / "run.toml"
    config.write_text(config.read_text().replace(":make", f":{factory}"))
    assert main(["train", "--config", "run.toml", "--no-progress"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        main(["train", "--config", "run.toml", "--no-progress", "--traceback"])


@pytest.mark.slow
def test_digits_are_learnt_through_kills(folder: Path) -> None:
    """Compiled, on real data, killed on the way: 98 % and the same bits as without."""
    (folder / "run.toml").write_text(
        'job = "digits-cnn"\nepochs = 6\nbatch_size = 64\nschedule = "cosine"\n'
        '[optimizer]\nlr = 3e-3\n[checkpoints]\nfolder = "CHECKPOINTS"\nevery_steps = 10\n'
    )
    command = [sys.executable, "-m", "optcpu", "train", "--config", "run.toml", "--no-progress"]

    def start(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, "--set", f"checkpoints.folder={name}"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "2"},
        )

    def weights(name: str) -> dict[str, torch.Tensor]:
        last = sorted((folder / name).glob("step-*"))[-1]
        return safetensors.torch.load_file(last / "model.safetensors")

    told, _ = start("whole").communicate(timeout=300)
    accuracy = float(told.partition("accuracy ")[2].split()[0])
    assert accuracy >= 0.98
    for wanted in (3, 8):  # kill as soon as this checkpoint is there
        process = start("killed")
        while not any((folder / "killed").glob(f"step-*{wanted}0")) and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    assert start("killed").wait(timeout=300) == 0
    whole, killed = weights("whole"), weights("killed")
    assert whole.keys() == killed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, killed[name]), name
