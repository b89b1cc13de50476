"""What ``optcpu train`` can train: a model, its data and its loss, built in or the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from optcpu import data
from optcpu.factories import call_factory, describe, find_factory, nearest
from optcpu.measure.batches import Batch, Loss
from optcpu.models import digits_cnn, gpt2_small, mlp
from optcpu.runtime.data.datasets import SyntheticDataset
from optcpu.runtime.data.tokens import TokenDataset
from optcpu.runtime.validation import Metric

_HELD_OUT = 10  # every tenth sample is for validation where the data come in one piece


@dataclass(frozen=True)
class Job:
    """What is trained, but not how.

    Attributes:
        model: freshly initialised.
        train_data: a dataset, a ``DataLoader`` or batches, as :class:`optcpu.Trainer` takes them.
        validation_data: likewise; None validates nothing.
        loss: ``loss(output, batch)``; None takes the one that belongs to the output.
        metrics: of validation.
    """

    model: nn.Module
    train_data: Any
    validation_data: Any = None
    loss: Loss | None = None
    metrics: Mapping[str, Metric] | Sequence[str] = ()


def job(name: str, seed: int | None = 0) -> Job:
    """A built-in job, or the user's own.

    Args:
        name: one of :data:`BUILT_IN`, or ``"package.module:factory"``. The factory is called with
            ``seed`` if it has such a parameter, and returns a :class:`Job`, or ``(model, train_data)``,
            ``(model, train_data, validation_data)`` or ``(model, train_data, validation_data, loss)``.
        seed: of the weights; None leaves the global generator as it is.

    Raises:
        ValueError: no such job, module or attribute.
        TypeError: the factory cannot be called or returns something else.
        OptcpuError: a library that the job's data needs is missing.
    """
    if seed is not None:
        torch.manual_seed(seed)
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if ":" not in name:
        raise ValueError(
            f"no job is called {name!r}{nearest(name, BUILT_IN)}; known are {', '.join(BUILT_IN)}, and "
            "your own as package.module:factory"
        )
    _, factory = find_factory(name)
    result = call_factory(factory, name, {} if seed is None else {"seed": seed})
    if isinstance(result, Job):
        return result
    if isinstance(result, tuple) and 2 <= len(result) <= 4 and isinstance(result[0], nn.Module):
        return Job(*result)
    raise TypeError(
        f"{name} must return a Job, (model, train_data), (model, train_data, validation_data) or "
        f"(model, train_data, validation_data, loss); it returned {describe(result)}"
    )


def _digits_cnn() -> Job:
    digits = data.digits()
    return Job(
        digits_cnn(),
        TensorDataset(*digits.train),
        TensorDataset(*digits.test),
        metrics=["accuracy"],
    )


def _mlp() -> Job:
    digits = data.digits(side=28)
    (images, labels), (test_images, test_labels) = digits.train, digits.test
    return Job(
        mlp(),
        TensorDataset(images.flatten(1), labels),
        TensorDataset(test_images.flatten(1), test_labels),
        metrics=["accuracy"],
    )


def _gpt2_small() -> Job:
    corpus = data.code_corpus()
    samples = TokenDataset(corpus.tokens, 64, vocab_size=corpus.vocab_size)
    return Job(
        gpt2_small(vocab_size=data.GPT2_VOCAB_SIZE),
        *_held_out(samples, len(samples)),
        loss=next_token_loss,
    )


def _synthetic() -> Job:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    samples = SyntheticDataset(20_000, 64, 10)
    return Job(model, *_held_out(samples, len(samples)), metrics=["accuracy"])


def _held_out(samples: Dataset[Any], size: int) -> tuple[Dataset[Any], Dataset[Any]]:
    """The samples for training and those for validation."""
    training = [index for index in range(size) if index % _HELD_OUT]
    return Subset(samples, training), Subset(samples, range(0, size, _HELD_OUT))


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross entropy of ``[batch, time, vocabulary]`` logits against the last tensor."""
    return F.cross_entropy(logits.flatten(0, 1), batch[-1].flatten())


BUILT_IN: dict[str, Callable[[], Job]] = {
    "digits-cnn": _digits_cnn,
    "mlp": _mlp,
    "gpt2-small": _gpt2_small,
    "synthetic": _synthetic,
}
