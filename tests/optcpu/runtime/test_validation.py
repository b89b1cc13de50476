from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from optcpu.errors import OptcpuError
from optcpu.measure.batches import default_loss
from optcpu.runtime.validation import accuracy, check_metrics, names_of, validate

INPUTS, TARGETS = torch.randn(10, 4), torch.randint(3, (10,))


def test_means_are_over_samples_not_batches() -> None:
    model = nn.Linear(4, 3)
    batches = list(DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=4))
    results = validate(model, batches, default_loss, {"accuracy": accuracy})
    assert results is not None
    logits = model(INPUTS)
    assert results["loss"] == pytest.approx(nn.functional.cross_entropy(logits, TARGETS).item())
    assert results["accuracy"] == pytest.approx(
        (logits.argmax(-1) == TARGETS).float().mean().item()
    )


def test_nothing_is_left_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout())
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    validate(model, DataLoader(TensorDataset(INPUTS, TARGETS), shuffle=True), default_loss, {})
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_metrics_of_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = torchmetrics.Accuracy(task="multiclass", num_classes=3, average="micro")
    model = nn.Linear(4, 3)
    batches = list(DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=4))
    for _ in range(2):  # what an earlier validation saw is forgotten
        results = validate(model, batches, default_loss, {"theirs": metric, "ours": accuracy})
        assert results is not None
        assert results["theirs"] == pytest.approx(results["ours"])


def test_an_interruption_gives_nothing() -> None:
    seen = []

    def loss(output: Any, batch: Any) -> Tensor:
        seen.append(batch)
        return output.sum()

    batches = [(INPUTS, TARGETS)] * 5
    assert validate(nn.Linear(4, 3), batches, loss, {}, interrupted=lambda: len(seen) == 2) is None
    assert len(seen) == 2


def test_no_data() -> None:
    with pytest.raises(OptcpuError, match="validation data are empty"):
        validate(nn.Linear(4, 3), [], default_loss, {})


def test_accuracy_by_hand() -> None:
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert accuracy(logits, (None, torch.tensor([1, 1, -100]))) == 0.5


def test_wrong_metrics_are_named() -> None:
    assert check_metrics(["accuracy"]) == {"accuracy": accuracy}
    with pytest.raises(ValueError, match=r"no metric 'acc'; known by name are accuracy"):
        check_metrics(["acc"])
    with pytest.raises(ValueError, match="must not be called 'loss'"):
        check_metrics({"loss": accuracy})
    with pytest.raises(TypeError, match="metric 'a' must be a function"):
        check_metrics({"a": 3})  # type: ignore[dict-item]
    for alone in ("accuracy", torchmetrics_accuracy()):
        with pytest.raises(TypeError, match="metrics must be a list of names or a mapping"):
            check_metrics(alone)


def torchmetrics_accuracy() -> Any:
    torchmetrics = pytest.importorskip("torchmetrics")
    return torchmetrics.Accuracy(task="multiclass", num_classes=3, average="micro")


def test_a_collection_of_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    parts = {
        "accuracy": torchmetrics_accuracy(),
        "f1": torchmetrics.F1Score("multiclass", num_classes=3),
    }
    metrics = {"all": torchmetrics.MetricCollection(parts), "ours": accuracy}
    results = validate(nn.Linear(4, 3), [(INPUTS, TARGETS)], default_loss, metrics)
    assert results is not None
    assert list(results) == ["loss", "ours", "all.accuracy", "all.f1"]
    assert set(results) == set(names_of(metrics))
    assert results["all.accuracy"] == pytest.approx(results["ours"])


@pytest.mark.parametrize("labels", ["label", "labels"])
def test_labels_of_a_batch_that_is_a_dict(labels: str) -> None:
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    batch = {"x": torch.ones(2, 3), labels: torch.tensor([1, 1])}
    assert accuracy({"logits": logits}, batch) == 0.5
    with pytest.raises(OptcpuError, match="a metric needs a target: the last element of a batch"):
        accuracy(logits, {"x": torch.ones(2, 3)})


@pytest.mark.parametrize("value", [torch.ones(3), None, "much"])
def test_what_is_no_number_is_told(value: Any) -> None:
    with pytest.raises(TypeError, match=r"metric 'mine' gives .*; one number was expected"):
        validate(
            nn.Linear(4, 3),
            [(INPUTS, TARGETS)],
            default_loss,
            {"mine": lambda output, batch: value},
        )
