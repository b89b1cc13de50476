"""What updates take: counted by hand, measured in processes that take turns."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from optcpu.errors import WorkerError
from optcpu.measure import updates
from optcpu.measure.updates import CANDIDATES, STREAM, Subject, measure_updates
from optcpu.optim.weights import StoredWeight

FUSED, SPLIT = "torch AdamW, fused", "AdamW, split weights"
EAGER_LAMB = "pytorch-optimizer LAMB"
TAKES_BF16 = hasattr(torch.Tensor, "grad_dtype")  # PyTorch 2.8 gives them in its own graphs alone
GRADIENT = 2 if TAKES_BF16 else 4


def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(64, 32, bias=False)


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        (FUSED, 2 * 4 + 4 + 2 * 8),
        ("AdamW, FP32 weights", 2 * 4 + 4 + 2 * 4),
        ("AdamW, split weights", 2 * 4 + GRADIENT + 2 * 4),
        ("AdamW, BF16 weights", 2 * 2 + GRADIENT + 2 * 4),
        ("LAMB, FP32 weights", (4 + 4 + 2 * 4) + (2 * 4 + 4)),
        ("LAMB, split weights", (4 + GRADIENT + 2 * 4) + (2 * 4 + 4)),
        ("LAMB, BF16 weights", (2 + GRADIENT + 2 * 4) + (2 * 2 + 4)),
    ],
)
def test_each_updates_and_its_bytes_are_counted(name: str, moved: int) -> None:
    model = layer()
    (weight,) = model.parameters()
    before = weight.detach().clone()
    subject = Subject(name, model)
    assert (subject.parameters, subject.moved) == (64 * 32, moved)
    (weight,) = model.parameters()
    assert isinstance(weight, StoredWeight) == ("split" in name or "BF16" in name)
    after = weight.detach().clone()
    subject.update()
    assert not torch.equal(after, before)
    assert not torch.equal(weight.detach(), after)


def test_what_nobody_counts() -> None:
    pytest.importorskip("pytorch_optimizer")
    assert Subject(EAGER_LAMB, layer()).moved is None


def test_the_stream_goes_over_as_many_numbers() -> None:
    subject = Subject(STREAM, layer())
    assert (subject.parameters, subject.moved) == (64 * 32, 8)
    subject.update()


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was asked for; one update of each takes the next number of milliseconds there."""
    milliseconds = {
        STREAM: [8.0] * 4,
        FUSED: [9.0, 10.0, 30.0, 12.0],
        SPLIT: [5.0, 5.0, 10.0, 4.0],
    }
    asked: list[tuple[str, int]] = []

    def ask(name: str, process: Any, count: int) -> dict[str, Any]:
        asked.append((name, count))
        seconds = milliseconds[name].pop(0) / 1e3
        moved = 8.0 if name == STREAM else 16.0
        return {"seconds": seconds, "parameters": 1000, "moved": moved, "resident": 9.5}

    monkeypatch.setattr(updates, "_ask", ask)
    monkeypatch.setattr(updates, "_process", lambda name, threads: contextlib.nullcontext())
    monkeypatch.setattr(updates.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        updates,
        "CANDIDATES",
        {name: CANDIDATES[name] for name in (FUSED, EAGER_LAMB, SPLIT)},
    )
    return asked


def test_figures_are_medians_of_ratios_within_rounds(turns: list[tuple[str, int]]) -> None:
    fused, split = measure_updates(2, rounds=3, round_seconds=0.05, progress=False)
    assert (fused.name, split.name) == (FUSED, SPLIT)  # the peer is not there
    assert fused.ms == pytest.approx(12.0)
    assert fused.speedup == 1.0
    assert split.ms == pytest.approx(5.0)
    assert split.speedup == pytest.approx(3.0)  # of 2, 3 and 3
    assert split.of_bandwidth == pytest.approx(2 * 8 / 5)  # of 2 * 8 / 10 and 2 * 8 / 4
    assert split.resident == 9.5
    assert [name for name, _ in turns[3:]] == [
        *(STREAM, FUSED, SPLIT),
        *(FUSED, SPLIT, STREAM),
        *(SPLIT, STREAM, FUSED),
    ]
    assert dict(turns[3:6]) == {STREAM: 7, FUSED: 6, SPLIT: 10}


def test_a_process_that_fails_is_told() -> None:
    with (
        pytest.raises(WorkerError, match=r"update of nonsense failed: KeyError: 'nonsense'"),
        updates._process("nonsense", 1) as process,
    ):
        updates._ask("nonsense", process, 1)


@pytest.mark.slow
def test_in_processes(capfd: pytest.CaptureFixture[str]) -> None:
    options = "--rounds", "1", "--round-seconds", "0.1"
    subprocess.run([sys.executable, "-m", "optcpu", "bench", "--updates", *options], check=True)
    told = capfd.readouterr()
    assert "optcpu bench: round 1/1" in told.err
    for name in CANDIDATES:
        if name != EAGER_LAMB:
            assert name in told.out
