from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from optcpu import Lamb, Lookahead
from optcpu.cpu import capabilities
from optcpu.optim import SGD, AdamW
from optcpu.runtime import build
from optcpu.runtime.build import make_optimizer, threads_for
from optcpu.runtime.options import OptimizerOptions, TrainerOptions


def test_only_the_settings_that_an_optimizer_has_arrive() -> None:
    model = nn.Linear(3, 2)
    adamw = make_optimizer(model.parameters(), OptimizerOptions(lr=0.1, betas=(0.8, 0.9)))
    assert isinstance(adamw, AdamW)
    assert adamw.defaults["betas"] == (0.8, 0.9)
    assert (
        adamw.defaults["weight_decay"]
        == torch.optim.AdamW(model.parameters()).defaults["weight_decay"]
    )
    sgd = make_optimizer(
        model.parameters(), OptimizerOptions(name="sgd", lr=0.1, momentum=0.5, weight_decay=0.2)
    )
    assert isinstance(sgd, SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.5, 0.2)


def test_lookahead_goes_around() -> None:
    options = OptimizerOptions(name="lamb", lookahead={"k": 7, "alpha": 0.25})
    optimizer = make_optimizer(nn.Linear(3, 2).parameters(), options)
    assert isinstance(optimizer, Lookahead)
    assert isinstance(optimizer.optimizer, Lamb)
    assert (optimizer.k, optimizer.alpha) == (7, 0.25)


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 2).requires_grad_(False), nn.Linear(2, 1))
    (group,) = make_optimizer(model.parameters(), OptimizerOptions()).param_groups
    assert [tuple(p.shape) for p in group["params"]] == [(1, 2), (1,)]


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    machine = replace(capabilities(), physical_cores=8)
    monkeypatch.setattr(build, "capabilities", lambda: machine)
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def _threads(processes: int = 1, **given: Any) -> int:
    return threads_for(TrainerOptions(epochs=1, **given), processes)


def test_threads(eight_cores: pytest.MonkeyPatch) -> None:
    assert _threads() == 8
    assert _threads(processes=2) == 4
    assert _threads(processes=20) == 1
    assert _threads(processes=2, threads=3) == 3
    eight_cores.setenv("OMP_NUM_THREADS", "5")
    assert _threads() == 5
    eight_cores.setenv("OMP_NUM_THREADS", "1")  # as torchrun sets it, though nobody asked for it
    eight_cores.setenv("TORCHELASTIC_RUN_ID", "x")
    assert _threads(processes=2) == 4
