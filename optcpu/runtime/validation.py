"""The loss and the metrics of a model on data that it is not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from optcpu.errors import OptcpuError
from optcpu.measure.batches import Batch, Loss, as_batches, call_model, units_in
from optcpu.random_state import random_state_kept


@runtime_checkable
class AccumulatingMetric(Protocol):
    """What torchmetrics' metrics are: told every batch, asked at the end."""

    def update(self, predictions: Tensor, target: Tensor) -> None:
        """Take note of a batch."""

    def compute(self) -> Any:
        """The metric of all batches."""

    def reset(self) -> None:
        """Forget all batches."""


Metric: TypeAlias = AccumulatingMetric | Callable[[Any, Batch], Any]


def accuracy(output: Any, batch: Batch) -> Tensor:
    """The share of targets whose class has the highest logit; targets of -100 do not count.

    Args:
        output: logits ``[..., classes]``, or an object with ``logits``.
        batch: its last element is the target ``[...]``.
    """
    logits = predictions_of(output)
    target: Tensor = batch[-1]
    counted = target != -100
    hits = (logits.argmax(-1) == target) & counted
    return hits.sum() / counted.sum().clamp(min=1)


BUILT_IN: dict[str, Metric] = {"accuracy": accuracy}


def predictions_of(output: Any) -> Tensor:
    """The tensor in ``output`` that a metric compares with the target."""
    logits = (
        output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    )
    if not isinstance(logits, Tensor):
        raise OptcpuError(
            f"a metric needs one tensor or an output with .logits, not {type(output).__name__}: give "
            "a function metric(output, batch) instead"
        )
    return logits


def validate(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss,
    metrics: Mapping[str, Metric],
    *,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """``"loss"`` and each metric over all batches; the model's mode and all generators stay as they were.

    The loss, and metrics that are functions, are means weighted by the number of samples.

    Args:
        model: put into evaluation mode meanwhile.
        batches: :mod:`optcpu.measure.batches` says what they may be.
        loss: of an output and its batch.
        metrics: functions ``(output, batch) -> number``, or metrics of torchmetrics, by their names.
        interrupted: asked after each batch.

    Returns:
        None if it was interrupted.

    Raises:
        OptcpuError: there is no batch.
    """
    sums: dict[str, float] = dict.fromkeys(("loss", *_functions(metrics)), 0.0)
    samples = 0
    accumulating = {n: m for n, m in metrics.items() if isinstance(m, AccumulatingMetric)}
    for metric in accumulating.values():
        metric.reset()
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), random_state_kept():
            for raw in batches:
                (batch,) = as_batches(tuple(raw) if isinstance(raw, list) else raw)
                size = units_in(batch)
                output = call_model(model, batch)
                sums["loss"] += float(loss(output, batch)) * size
                for name, function in _functions(metrics).items():
                    sums[name] += float(function(output, batch)) * size
                for metric in accumulating.values():
                    metric.update(predictions_of(output), batch[-1])
                samples += size
                if interrupted():
                    return None
    finally:
        model.train(was_training)
    if samples == 0:
        raise OptcpuError("the validation data are empty: give at least one batch")
    results = {name: total / samples for name, total in sums.items()}
    return results | {name: float(metric.compute()) for name, metric in accumulating.items()}


def _functions(metrics: Mapping[str, Metric]) -> dict[str, Callable[[Any, Batch], Any]]:
    return {n: m for n, m in metrics.items() if not isinstance(m, AccumulatingMetric)}


def check_metrics(metrics: Mapping[str, Metric] | Iterable[str]) -> dict[str, Metric]:
    """Metrics by their names, built-in ones given by name alone.

    Raises:
        ValueError: a name is not known, or taken.
        TypeError: a metric cannot be called.
    """
    if not isinstance(metrics, Mapping):
        unknown = [name for name in metrics if name not in BUILT_IN]
        if unknown:
            raise ValueError(
                f"there is no metric {unknown[0]!r}; known by name are {', '.join(BUILT_IN)}, others "
                "are given as {name: function}"
            )
        return {name: BUILT_IN[name] for name in metrics}
    for name, metric in metrics.items():
        if name == "loss":
            raise ValueError("a metric must not be called 'loss', which is there anyway")
        if not callable(metric):
            raise TypeError(
                f"metric {name!r} must be a function (output, batch) or a torchmetrics metric, not "
                f"{type(metric).__name__}"
            )
    return dict(metrics)


def is_finite(metrics: Mapping[str, float]) -> bool:
    """Whether all values are numbers."""
    return all(math.isfinite(value) for value in metrics.values())
