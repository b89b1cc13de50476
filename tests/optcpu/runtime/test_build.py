from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate
from training import small_data, small_trainer

import optcpu
from optcpu import OptcpuError
from optcpu.cpu import capabilities
from optcpu.optim import AdamW
from optcpu.runtime import build
from optcpu.runtime.build import threads_for
from optcpu.runtime.options import TrainerOptions


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


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("already", [True, False])
def test_a_way_of_storing_that_nothing_brings_about_is_refused(already: bool) -> None:
    model, given = _model(), {"compile": already}
    if already:
        optcpu.optimize(model, precision="fp32")
    with pytest.raises(OptcpuError, match="are stored as 'fp32', not 'split'"):
        small_trainer(model, weights="split", **given)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(OptcpuError, match=r"state in torch\.float32, not torch\.bfloat16"):
        small_trainer(model, optimizer=optimizer, lr=None, state_dtype=torch.bfloat16, **given)
    small_trainer(model, weights="fp32", state_dtype=torch.float32, **given)
    own = AdamW(model.parameters(), state_dtype=torch.bfloat16)
    small_trainer(model, optimizer=own, lr=None, state_dtype=torch.bfloat16, **given)


@pytest.mark.filterwarnings("ignore:.*no BF16")
def test_a_way_of_storing_that_is_there_is_taken() -> None:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    optcpu.optimize(model, optimizer, precision="bf16")
    settings: dict[str, Any] = {"optimizer": optimizer, "lr": None, "compile": True}
    small_trainer(model, weights="split", state_dtype=torch.bfloat16, **settings)
    with pytest.raises(OptcpuError, match="are stored as 'split', not 'bf16'"):
        small_trainer(model, weights="bf16", **settings)


def test_settings_of_the_compiler_are_refused_where_it_has_nothing_to_do() -> None:
    for name, value in (("precision", "bf16"), ("layout", "native"), ("dynamic", True)):
        with pytest.raises(
            ValueError, match=rf"{name}={value!r} needs compile: .* leave {name} out"
        ):
            small_trainer(compile=False, **{name: value})
    with pytest.raises(ValueError, match=r"passes needs compile: .* leave them out"):
        small_trainer(compile=False, passes=[])
    small_trainer(compile=False, precision="fp32", layout="none", dynamic=False, passes=None)


@pytest.mark.parametrize(
    ("name", "value", "of_validation"),
    [
        ("batch_size", 32, True),
        ("collate_fn", default_collate, True),
        ("workers", 0, False),
        ("drop_last", True, False),
    ],
)
def test_settings_of_datasets_are_refused_for_batches(
    name: str, value: Any, of_validation: bool
) -> None:
    told = rf"^{name} would change nothing: .*batches already \(DataLoader\)\. Remedy: .* Dataset"
    for validation in (None, DataLoader(small_data(), 4)):
        with pytest.raises(ValueError, match=told):
            small_trainer(
                data=DataLoader(small_data(), 4), validation_data=validation, **{name: value}
            )
    small_trainer(**{name: value})
    mixed: dict[str, Any] = {"data": DataLoader(small_data(), 4), "validation_data": small_data()}
    if of_validation:
        small_trainer(**mixed, **{name: value})
    else:
        with pytest.raises(ValueError, match=told):
            small_trainer(**mixed, **{name: value})


def test_all_such_settings_are_named_and_those_that_ask_for_nothing_are_taken() -> None:
    loader = DataLoader(small_data(), 4)
    with pytest.raises(ValueError, match=r"^workers, drop_last, batch_size, collate_fn would"):
        small_trainer(
            data=loader, workers=1, drop_last=True, batch_size=4, collate_fn=default_collate
        )
    small_trainer(data=loader, workers="auto", drop_last=False, collate_fn=None)
