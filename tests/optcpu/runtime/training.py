"""A small training run that several tests vary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from optcpu import Trainer
from optcpu.runtime import Callback
from optcpu.runtime.data.loaders import is_dataset

FEATURES, CLASSES = 6, 3


def small_model(seed: int = 0) -> nn.Module:
    """One with random numbers (dropout) and a state besides its weights (batch norm)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES)
    )


def small_data(size: int = 22, seed: int = 1) -> TensorDataset:
    """Samples whose class can be learnt."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, FEATURES, generator=generator)
    teacher = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(99))
    return TensorDataset(inputs, (inputs @ teacher).argmax(-1))


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Random augmentation from the global generator."""

    def __init__(self, data: TensorDataset) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = self._data[index]
        return inputs + 0.1 * torch.randn(FEATURES), target


def foreign_loader() -> DataLoader[Any]:
    """A loader of the user's own, that shuffles and augments."""
    return DataLoader(Noisy(small_data()), batch_size=4, shuffle=True)


def small_trainer(model: nn.Module | None = None, data: Any = None, **given: Any) -> Trainer:
    """An eager run of two epochs of two steps; the last step has two micro-batches, of 4 and 2."""
    settings: dict[str, Any] = {
        "batch_size": 4,
        "accumulation_steps": 4,
        "compile": False,
        "progress": False,
        "threads": 2,
        "lr": 0.05,
        **given,
    }
    batches = data is not None and not is_dataset(data)
    if batches and "batch_size" not in given and not is_dataset(given.get("validation_data")):
        del settings["batch_size"]
    if "steps" not in settings:
        settings.setdefault("epochs", 2)
    return Trainer(model or small_model(), small_data() if data is None else data, **settings)


def tensors_of(trainer: Trainer) -> dict[str, Tensor]:
    """All numbers that training has moved."""
    state = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    optimizer = trainer.optimizer.state_dict()["state"]
    for index, entries in optimizer.items():
        for name, entry in entries.items():
            if isinstance(entry, Tensor):
                state[f"optimizer.{index}.{name}"] = entry
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def logged_rows(folder: Path) -> list[dict[str, Any]]:
    """What a log in ``folder`` tells, without what depends on the time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("samples_per_second", 1) > 0 for row in rows)
    return rows


class Losses(Callback):
    """Notes the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self.losses.append(metrics["loss"])
