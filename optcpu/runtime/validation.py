"""The loss and the metrics of a model on data that it is not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from optcpu.errors import OptcpuError, add_note
from optcpu.measure.batches import (
    LEFT_OUT,
    Batch,
    Loss,
    as_batch,
    call_model,
    class_axis,
    describe_call,
    units_in,
)
from optcpu.random_state import random_state_kept
from optcpu.runtime.data.loading import told
from optcpu.runtime.modes import modes_kept


@runtime_checkable
class AccumulatingMetric(Protocol):
    """What torchmetrics' metrics are: told every batch, asked at the end."""

    def update(self, predictions: Tensor, target: Tensor) -> None:
        """Take note of a batch."""

    def compute(self) -> Any:
        """The metric of all batches."""

    def reset(self) -> None:
        """Forget all batches."""


_LABELS = ("labels", "label")
_TAKEN = ("loss", "step", "epoch", "phase")  # the columns of the log
_ASKED = "distributed_available_fn"  # by torchmetrics, whether there are other processes

Metric: TypeAlias = AccumulatingMetric | Callable[[Any, Batch], Any]


class Accuracy:
    """The share of targets that the highest logit meets; those of -100 do not count.

    Logits are ``[batch, classes]`` for targets ``[batch]``; ``[batch, ..., classes]`` or, as in
    segmentation, ``[batch, classes, ...]`` for ``[batch, ...]``, whichever the shape of the target says
    (the latter, as in PyTorch's cross entropy, where both would fit four or more dimensions). Logits of
    the target's own shape, or with one class, are of two classes: positive is class 1.

    Of a causal language model whose loss moves the labels by one (Hugging Face's do), :func:`validate`
    compares the logits of a token with the label of the next one, for every metric but functions.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._hits = self._counted = 0

    def update(self, predictions: Tensor, target: Tensor) -> None:
        """Take note of a batch.

        Raises:
            OptcpuError: no classes can be told from these shapes, or targets.
        """
        chosen = _classes(predictions, target)
        counted = target != LEFT_OUT
        self._hits += int(((chosen == target) & counted).sum())
        self._counted += int(counted.sum())

    def compute(self) -> float:
        """Of all batches; NaN where nothing counted."""
        return self._hits / self._counted if self._counted else math.nan


def _classes(logits: Tensor, target: Tensor) -> Tensor:
    if target.is_floating_point() and not bool(
        ((target == 0) | (target == 1) | (target == LEFT_OUT)).all()
    ):
        raise OptcpuError(
            "accuracy needs classes, and the targets are other numbers (probabilities, or what is "
            "measured): give a function metric(output, batch) instead"
        )
    if logits.shape == target.shape:
        return (logits > 0).to(target.dtype)
    if logits.shape == (*target.shape, 1):
        return (logits.squeeze(-1) > 0).to(target.dtype)
    axis = class_axis(logits, target)
    if axis is None and logits.shape[:-1] == target.shape:
        axis = -1
    if axis is not None:
        return logits.argmax(axis)
    raise OptcpuError(
        f"accuracy cannot compare an output of shape {list(logits.shape)} with a target of shape "
        f"{list(target.shape)}: give logits [batch, classes, ...] and classes [batch, ...], or a function "
        "metric(output, batch)"
    )


BUILT_IN: dict[str, Callable[[], Metric]] = {"accuracy": Accuracy}


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


def target_of(batch: Batch) -> Tensor:
    """The tensor in ``batch`` that a metric compares with: its last element, or its labels."""
    if isinstance(batch, tuple) and len(batch) > 1:
        target = batch[-1]
    elif isinstance(batch, Mapping):
        target = next((batch[name] for name in _LABELS if name in batch), None)
    else:
        target = None
    if not isinstance(target, Tensor):
        raise OptcpuError(
            "a metric needs a target: the last element of a batch that is a tuple, or an entry "
            f"{' or '.join(map(repr, _LABELS))} of one that is a dict; give a function "
            "metric(output, batch) for other batches"
        )
    return target


def validate(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss,
    metrics: Mapping[str, Metric],
    *,
    size_of: Callable[[Batch], int] = units_in,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """``"loss"`` and each metric over all batches; the model's mode and all generators stay as they were.

    The loss, and metrics that are functions, are means weighted by what ``size_of`` says of a batch.

    Args:
        model: in evaluation mode meanwhile, as a loss that is a module.
        batches: :mod:`optcpu.measure.batches` says what they may be.
        loss: of an output and its batch.
        metrics: functions ``(output, batch) -> number``, or metrics or collections of torchmetrics, by
            their names.
        size_of: counts the samples in a batch.
        interrupted: asked after each batch.

    Returns:
        None if it was interrupted.

    Raises:
        OptcpuError: there is no batch, or it cannot be drawn, or has no target for a metric that needs one.
        TypeError: a metric gives something else than a number.
    """
    sums: dict[str, float] = dict.fromkeys(("loss", *_functions(metrics)), 0.0)
    samples = 0
    predicts_next: bool | None = None  # the first batch with a label that counts tells
    accumulating = {n: m for n, m in metrics.items() if isinstance(m, AccumulatingMetric)}
    for metric in accumulating.values():
        metric.reset()
    with torch.no_grad(), random_state_kept(), modes_kept(model, loss) as modules:
        for module in modules:
            module.training = False
        for number, raw in enumerate(_drawn(batches)):
            batch = as_batch(tuple(raw) if isinstance(raw, list) else raw)
            with _noting("size_of", number, batch):
                size = size_of(batch)
            with _noting("the model or its loss", number, batch):
                output = call_model(model, batch)
                sums["loss"] += _number("loss", loss(output, batch)) * size
            for name, function in _functions(metrics).items():
                with _noting(f"metric {name!r}", number):
                    sums[name] += _number(name, function(output, batch)) * size
            if accumulating:
                predictions, target = predictions_of(output), target_of(batch)
                if predicts_next is None:
                    predicts_next = _predicts_next(output, predictions, target)
                if predicts_next:
                    predictions, target = predictions[:, :-1], target[:, 1:]
                for name, metric in accumulating.items():
                    with _noting(f"metric {name!r}", number):
                        metric.update(predictions, target)
            samples += size
            if interrupted():
                return None
    if samples == 0:
        raise OptcpuError("the validation data are empty: give at least one batch")
    results = {name: total / samples for name, total in sums.items()}
    for name, metric in accumulating.items():
        with _noting(f"metric {name!r}"), _of_this_process(metric):
            results |= _results(name, metric.compute())
    return results


@contextmanager
def _noting(what: str, number: int | None = None, batch: Batch | None = None) -> Iterator[None]:
    """Within the block an error gets a note that says ``what`` failed, and at which batch."""
    try:
        yield
    except Exception as error:
        where = "" if number is None else f", at batch {number} (counted from 0)"
        call = "" if batch is None else f": {describe_call(batch)}"
        add_note(error, f"{what} failed in the validation{where}{call}")
        raise


def _drawn(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches; an error of theirs says which one it was."""
    number = 0
    try:
        for batch in batches:
            yield batch
            number += 1
    except OptcpuError:
        raise
    except Exception as error:
        raise OptcpuError(
            f"the validation data failed at batch {number} (counted from 0): {told(error)}"
        ) from error


def _predicts_next(output: Any, logits: Tensor, target: Tensor) -> bool | None:
    """Whether the logits of a token are about the token behind it, as in causal language models.

    Those of Hugging Face take labels that are the inputs, and move them within the model. What its own
    loss is that of tells; None where no label counts.
    """
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(own, Tensor) or own.numel() != 1 or target.is_floating_point():
        return False
    if target.dim() != 2 or logits.dim() != 3 or logits.shape[:2] != target.shape:
        return False
    try:
        in_place, moved = (
            abs(float(cross_entropy(scores.flatten(0, 1).float(), labels.flatten()) - own))
            for scores, labels in ((logits, target), (logits[:, :-1], target[:, 1:]))
        )
    except (IndexError, RuntimeError):  # the target is no class, but to the model's own loss
        return False
    return None if math.isnan(in_place + moved) else moved < in_place


@contextmanager
def _of_this_process(metric: AccumulatingMetric) -> Iterator[None]:
    """Within the block torchmetrics do not add up what all processes have, as each has seen all data."""
    parts = list(metric.modules()) if isinstance(metric, nn.Module) else []
    asking = [(one, vars(one)[_ASKED]) for one in parts if _ASKED in vars(one)]
    for one, _ in asking:
        setattr(one, _ASKED, lambda: False)
    try:
        yield
    finally:
        for one, ask in asking:
            setattr(one, _ASKED, ask)


def _results(name: str, computed: Any) -> dict[str, float]:
    """Numbers by name; those of a collection have its own name before theirs."""
    if isinstance(computed, Mapping):
        return {f"{name}.{part}": _number(f"{name}.{part}", one) for part, one in computed.items()}
    return {name: _number(name, computed)}


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        what = (
            f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        )
        raise TypeError(
            f"metric {name!r} gives {what}; one number was expected, say the mean over the batch"
        ) from error


def _functions(metrics: Mapping[str, Metric]) -> dict[str, Callable[[Any, Batch], Any]]:
    return {n: m for n, m in metrics.items() if not isinstance(m, AccumulatingMetric)}


def check_metrics(metrics: Mapping[str, Metric] | Iterable[str]) -> dict[str, Metric]:
    """Metrics by their names, built-in ones given by name alone.

    Raises:
        ValueError: a name is not known, or taken.
        TypeError: a metric cannot be called.
    """
    if isinstance(metrics, (str, AccumulatingMetric)):
        raise TypeError(
            f"metrics must be a list of names or a mapping {{name: metric}}, not {metrics!r}: put it into "
            "one of them"
        )
    if not isinstance(metrics, Mapping):
        unknown = [name for name in metrics if name not in BUILT_IN]
        if unknown:
            raise ValueError(
                f"there is no metric {unknown[0]!r}; known by name are {', '.join(BUILT_IN)}, others "
                "are given as {name: function}"
            )
        return {name: BUILT_IN[name]() for name in metrics}
    for name, metric in metrics.items():
        if name in _TAKEN:
            raise ValueError(f"a metric must not be called {name!r}, which is there anyway")
        if isinstance(metric, type) and isinstance(metric, AccumulatingMetric):
            raise TypeError(
                f"metric {name!r} is the class {metric.__name__}: give one of its objects, as in "
                f"{metric.__name__}(...)"
            )
        if not callable(metric) and not isinstance(metric, AccumulatingMetric):
            raise TypeError(
                f"metric {name!r} must be a function (output, batch) or a torchmetrics metric, not "
                f"{type(metric).__name__}"
            )
    return dict(metrics)


def names_of(metrics: Mapping[str, Metric]) -> list[str]:
    """What the results of :func:`validate` are called."""
    names = ["loss"]
    for name, metric in metrics.items():
        parts = list(metric) if isinstance(metric, nn.ModuleDict) else []  # a MetricCollection
        names += [f"{name}.{part}" for part in parts] or [name]
    return names
