"""What freezing in a run takes the run's length for: whether a freeze comes in time, and pays back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from training import small_data, small_trainer

import optcpu


class _WithoutLength:
    """Two batches an epoch, which nobody knows before they came."""

    def __iter__(self) -> Iterator[Any]:
        yield from DataLoader(small_data(8), batch_size=4)


def test_a_length_that_nobody_knows_is_told() -> None:
    with pytest.warns(UserWarning, match=r"length of the run is not known.*freezing\.payback=Fal"):
        trainer = small_trainer(data=_WithoutLength(), freezing={"window": 1})
    assert trainer.freezer is not None
    assert trainer.freezer.total_steps is None


@pytest.mark.parametrize("known", ["steps", "payback"])
def test_nothing_is_told_where_it_is_known_or_not_needed(known: str) -> None:
    given = {"steps": 9} if known == "steps" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freezing = {"window": 1, "payback": known != "payback"}
        small_trainer(data=_WithoutLength(), freezing=freezing, **given)


@pytest.mark.parametrize("epochs", [2, 5])
def test_the_trainers_freezer_counts_on_what_a_resumed_run_has_now(
    tmp_path: Path, epochs: int
) -> None:
    given: dict[str, Any] = {"freezing": {"window": 1}, "checkpoints": tmp_path}
    small_trainer(**given).train()
    resumed = small_trainer(epochs=epochs, **given)
    resumed.train()
    assert resumed.freezer is not None
    assert resumed.freezer.total_steps == 2 * epochs


def test_a_freezer_of_the_users_own_keeps_its_length(tmp_path: Path) -> None:
    def own(model: nn.Module, optimizer: torch.optim.Optimizer) -> optcpu.DynamicFreezer:
        return optcpu.DynamicFreezer(model, optimizer, window=1, total_steps=1000)

    small_trainer(freezer=own, checkpoints=tmp_path).train()
    resumed = small_trainer(freezer=own, checkpoints=tmp_path, epochs=3)
    resumed.train()
    assert resumed.freezer is not None
    assert resumed.freezer.total_steps == 1000


def test_a_resumed_run_is_not_told_that_it_is_too_short(tmp_path: Path) -> None:
    given: dict[str, Any] = {"freezing": {"window": 5, "patience": 2}, "checkpoints": tmp_path}
    with pytest.warns(UserWarning, match=r"freezing has no effect.*behind step 15"):
        small_trainer(**given).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert small_trainer(epochs=3, **given).train().steps == 6
