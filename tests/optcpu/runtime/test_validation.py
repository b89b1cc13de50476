from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from optcpu.errors import OptcpuError, notes_of
from optcpu.measure.batches import default_loss
from optcpu.runtime.validation import (
    Accuracy,
    check_metrics,
    names_of,
    predictions_of,
    target_of,
    validate,
)

INPUTS, TARGETS = torch.randn(10, 4), torch.randint(3, (10,))


def test_means_are_over_samples_not_batches() -> None:
    model = nn.Linear(4, 3)
    batches = list(DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=4))
    results = validate(model, batches, default_loss, {"accuracy": Accuracy()})
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
        results = validate(model, batches, default_loss, {"theirs": metric, "ours": Accuracy()})
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


def accuracy(logits: Tensor, target: Tensor) -> float:
    metric = Accuracy()
    metric.update(logits, target)
    return metric.compute()


def test_accuracy_by_hand() -> None:
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert accuracy(logits, torch.tensor([1, 1, -100])) == 0.5


@pytest.mark.parametrize("shape", [(4, 1), (4,), (4, 3)])
def test_accuracy_of_two_classes(shape: tuple[int, ...]) -> None:
    """What binary cross entropy takes: logits and targets of one shape."""
    target = torch.randint(2, shape).float()
    logits = target - 0.5
    logits[0] *= -1
    assert accuracy(logits, target) == 0.75
    assert accuracy(logits.unsqueeze(-1), target) == 0.75


@pytest.mark.parametrize("side", [4, 5])
def test_accuracy_of_segmentation(side: int) -> None:
    """Also where classes and pixels are as many."""
    logits = torch.randn(2, 4, side, side)
    target = torch.randint(4, (2, side, side))
    expected = (logits.argmax(1) == target).float().mean().item()
    assert accuracy(logits, target) == pytest.approx(expected)


def test_accuracy_of_sequences() -> None:
    logits, target = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    expected = (logits.argmax(-1) == target).float().mean().item()
    assert accuracy(logits, target) == pytest.approx(expected)


def test_accuracy_counts_targets_and_not_batches() -> None:
    metric = Accuracy()
    metric.update(torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 1, 1, 1]))
    metric.update(torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, -100, -100, -100]))
    assert metric.compute() == 0.4
    metric.reset()
    assert math.isnan(metric.compute())


def test_accuracy_of_what_has_no_classes() -> None:
    with pytest.raises(OptcpuError, match=r"output of shape \[4, 3\] with a target of shape \[5\]"):
        accuracy(torch.randn(4, 3), torch.zeros(5))


def test_the_loss_is_weighted_as_training_weights_it() -> None:
    def counted(batch: Any) -> int:
        return int((batch[1] >= 0).sum())

    model = nn.Linear(4, 3)
    first, second = TARGETS[:5].clone(), TARGETS[5:].clone()
    first[1:] = -100
    batches = [(INPUTS[:5], first), (INPUTS[5:], second)]
    results = validate(model, batches, default_loss, {}, size_of=counted)
    assert results is not None
    expected = nn.functional.cross_entropy(model(INPUTS), torch.cat([first, second]))
    assert results["loss"] == pytest.approx(expected.item())


def test_each_module_keeps_its_mode() -> None:
    class WithDropout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout()
            self.modes: list[bool] = []

        def forward(self, output: Tensor, batch: Any) -> Tensor:
            self.modes.append(self.drop.training)
            return self.drop(output).sum()

    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model[1].eval()
    loss = WithDropout()
    validate(model, [(INPUTS, TARGETS)], loss, {})
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert loss.modes == [False]
    assert loss.drop.training


def test_wrong_metrics_are_named() -> None:
    assert isinstance(check_metrics(["accuracy"])["accuracy"], Accuracy)
    with pytest.raises(ValueError, match=r"no metric 'acc'; known by name are accuracy"):
        check_metrics(["acc"])
    for column in ("loss", "step"):
        with pytest.raises(ValueError, match=f"must not be called '{column}'"):
            check_metrics({column: Accuracy()})
    assert [*check_metrics({"own": Accuracy()})] == ["own"]
    with pytest.raises(TypeError, match="metric 'a' must be a function"):
        check_metrics({"a": 3})  # type: ignore[dict-item]
    for alone in ("accuracy", torchmetrics_accuracy()):
        with pytest.raises(TypeError, match="metrics must be a list of names or a mapping"):
            check_metrics(alone)


def torchmetrics_accuracy() -> Any:
    torchmetrics = pytest.importorskip("torchmetrics")
    return torchmetrics.Accuracy(task="multiclass", num_classes=3, average="micro")


def test_torchmetrics_count_what_one_process_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """In several processes each goes through all data: nothing is to be added up."""
    torchmetrics = pytest.importorskip("torchmetrics")
    monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    metric = torchmetrics.MetricCollection({"inner": torchmetrics_accuracy()})
    (inner,) = metric.values()
    asked = inner.distributed_available_fn
    assert asked()
    inner.dist_sync_fn = lambda *_, **__: pytest.fail("the other processes were asked")
    metrics = {"all": metric}
    model, data = nn.Identity(), [(torch.eye(3), torch.arange(3))]
    assert validate(model, data, default_loss, metrics)["all.inner"] == 1
    assert inner.distributed_available_fn is asked


def test_a_class_is_no_metric() -> None:
    with pytest.raises(TypeError, match=r"'acc' is the class Accuracy: give one of its objects"):
        check_metrics({"acc": Accuracy})


def test_a_collection_of_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    parts = {
        "accuracy": torchmetrics_accuracy(),
        "f1": torchmetrics.F1Score("multiclass", num_classes=3),
    }
    metrics = {"all": torchmetrics.MetricCollection(parts), "ours": Accuracy()}
    results = validate(nn.Linear(4, 3), [(INPUTS, TARGETS)], default_loss, metrics)
    assert results is not None
    assert list(results) == ["loss", "all.accuracy", "all.f1", "ours"]
    assert set(results) == set(names_of(metrics))
    assert results["all.accuracy"] == pytest.approx(results["ours"])


@pytest.mark.parametrize("labels", ["label", "labels"])
def test_labels_of_a_batch_that_is_a_dict(labels: str) -> None:
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    batch = {"x": torch.ones(2, 3), labels: torch.tensor([1, 1])}
    assert accuracy(predictions_of({"logits": logits}), target_of(batch)) == 0.5
    with pytest.raises(OptcpuError, match="a metric needs a target: the last element of a batch"):
        target_of({"x": torch.ones(2, 3)})


@pytest.mark.parametrize("value", [torch.ones(3), None, "much"])
def test_what_is_no_number_is_told(value: Any) -> None:
    with pytest.raises(TypeError, match=r"metric 'mine' gives .*; one number was expected"):
        validate(
            nn.Linear(4, 3),
            [(INPUTS, TARGETS)],
            default_loss,
            {"mine": lambda output, batch: value},
        )


def test_accuracy_of_nothing_is_no_number() -> None:
    metric = Accuracy()
    metric.update(torch.randn(3, 2), torch.full((3,), -100))
    assert math.isnan(metric.compute())


class NextToken(nn.Module):
    """Knows each token's successor; its own loss is about the labels of the next place, or the same."""

    def __init__(self, *, moves: bool) -> None:
        super().__init__()
        self._moves = moves

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = 5.0 * nn.functional.one_hot((input_ids + 1) % 7, 7).float()
        scores, wanted = (logits[:, :-1], labels[:, 1:]) if self._moves else (logits, labels)
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), wanted.flatten())
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("blank", [False, True])
@pytest.mark.parametrize("moves", [True, False])
def test_accuracy_of_a_language_model_is_about_what_its_loss_is_about(
    moves: bool, blank: bool
) -> None:
    tokens = (torch.arange(10) + torch.tensor([[0], [3]])) % 7
    labels = tokens.clone() if moves else (tokens + 1) % 7
    labels[0, 4] = -100
    batches = [{"input_ids": tokens, "labels": labels}]
    if blank:  # a batch without a label that counts tells nothing
        batches.insert(0, {"input_ids": tokens, "labels": torch.full_like(tokens, -100)})
    results = validate(NextToken(moves=moves), batches, default_loss, check_metrics(["accuracy"]))
    assert results is not None
    assert results["accuracy"] == 1.0
    assert blank or results["loss"] < 0.1


def test_targets_that_are_no_classes_are_compared_in_place() -> None:
    tokens = torch.arange(10)[None] % 7
    labels = torch.where(
        tokens == 3, 255, (tokens + 1) % 7
    )  # left out by the model's own loss, say

    class Model(NextToken):
        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return super().forward(input_ids, torch.where(labels == 255, -100, labels))

    batches = [{"input_ids": tokens, "labels": labels}]
    results = validate(Model(moves=False), batches, default_loss, check_metrics(["accuracy"]))
    assert results is not None
    assert results["accuracy"] == 0.9


def test_labels_that_a_loss_does_not_move_are_compared_in_place() -> None:
    tokens = torch.arange(10)[None] % 7
    batches = [{"input_ids": tokens, "labels": tokens.clone()}]
    results = validate(NextToken(moves=False), batches, default_loss, check_metrics(["accuracy"]))
    assert results is not None
    assert results["accuracy"] == 0.0


def test_data_that_fail_are_told() -> None:
    class Broken(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            if index == 7:
                raise KeyError("broken file 7")
            return INPUTS[index], TARGETS[index]

    batches = DataLoader(Broken(), batch_size=4)
    with pytest.raises(
        OptcpuError, match=r"validation data failed at batch 1 .*KeyError: 'broken file 7'"
    ):
        validate(nn.Linear(4, 3), batches, default_loss, {})


@pytest.mark.parametrize("shape", [(4, 3), (4,), (4, 1)])
def test_accuracy_of_targets_that_are_no_classes(shape: tuple[int, ...]) -> None:
    """Of smoothed labels, or a regression."""
    with pytest.raises(OptcpuError, match="accuracy needs classes"):
        accuracy(torch.randn(4, 3) if shape == (4, 3) else torch.randn(4, 1), torch.rand(shape))


class _Failing:
    """Told of batches, as a metric of torchmetrics is; fails in the method that ``at`` names."""

    def __init__(self, at: str) -> None:
        self.at = at

    def _called(self, method: str) -> float:
        if method == self.at:
            raise IndexError("no such class")
        return 0.0

    def reset(self) -> None:
        self._called("reset")

    def update(self, predictions: Tensor, target: Tensor) -> None:
        self._called("update")

    def compute(self) -> float:
        return self._called("compute")


def _fails_at_four(output: Tensor, batch: Any) -> Tensor:
    if len(output) < 4:
        raise IndexError("no such class")
    return output.sum()


@pytest.mark.parametrize(
    ("metrics", "note"),
    [
        ({"mine": _fails_at_four}, "metric 'mine' failed in the validation, at batch 2 (counted"),
        ({"mine": _Failing("update")}, "metric 'mine' failed in the validation, at batch 0 (coun"),
        ({"mine": _Failing("compute")}, "metric 'mine' failed in the validation"),
    ],
)
def test_metrics_that_fail_are_named(metrics: Any, note: str) -> None:
    batches = list(DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=4))
    with pytest.raises(IndexError, match="no such class") as failure:
        validate(nn.Linear(4, 3), batches, default_loss, metrics)
    (told,) = notes_of(failure.value)
    assert told.startswith(note)


@pytest.mark.parametrize(
    ("inputs", "targets", "error"),
    [
        (torch.randn(2, 5), torch.tensor([0, 1]), "shapes cannot be multiplied"),
        (torch.randn(2, 4), torch.tensor([0, 3]), "the target has class 3"),
    ],
)
def test_what_the_model_or_its_loss_cannot_take_is_of_the_validation(
    inputs: Tensor, targets: Tensor, error: str
) -> None:
    batches = [(INPUTS, TARGETS), (inputs, targets)]
    with pytest.raises((RuntimeError, ValueError), match=error) as failure:
        validate(nn.Linear(4, 3), batches, default_loss, {})
    (told,) = notes_of(failure.value)
    shape = f"float32[2, {inputs.shape[1]}]"
    assert told == (
        "the model or its loss failed in the validation, at batch 1 (counted from 0): "
        f"model({shape})"
    )


def test_what_cannot_be_counted_is_told_with_its_batch() -> None:
    with pytest.raises(IndexError) as failure:
        validate(nn.Linear(4, 3), [(INPUTS, TARGETS)], default_loss, {}, size_of=_fails)
    assert notes_of(failure.value)[0].startswith("size_of failed in the validation, at batch 0")


def _fails(batch: Any) -> int:
    raise IndexError("no such place")
