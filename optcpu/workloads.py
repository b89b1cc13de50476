"""What can be trained from the command line: a model, real batches for it, and its loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optcpu import data
from optcpu.factories import call_factory, describe, find_factory, nearest
from optcpu.measure.batches import Batch, Loss, as_batches, units_in
from optcpu.models import (
    Encoder,
    LstmLanguageModel,
    digits_cnn,
    gpt2_small,
    mlp,
    resnet18,
    small_cnn,
    vit_tiny,
)

_BATCH_COUNT = 16  # few enough that the default 50 steps are several passes, and learning shows
_GPT2_LENGTH = 64
_ENCODER_LENGTH = 512
_LSTM_LENGTH = 64


@dataclass(frozen=True)
class Workload:
    """A training job.

    Attributes:
        name: What it is called in tables and file names.
        model: With freshly initialised weights, in training mode.
        batches: Different ones, to be used in turn; :mod:`optcpu.measure.batches` says what a
            batch may be.
        loss: ``loss(output, batch) -> scalar tensor``; None leaves the choice to
            :func:`optcpu.compare`.
        unit: What throughput counts, in the plural: ``"samples"``, ``"tokens"``.
        units_per_batch: How many of them one batch holds.
        description: One line for people.
    """

    name: str
    model: nn.Module
    batches: Sequence[Batch]
    loss: Loss | None
    unit: str
    units_per_batch: int
    description: str


def workload(name: str, *, batch_size: int | None = None, seed: int = 0) -> Workload:
    """A built-in job, or the user's own.

    Args:
        name: One of :data:`BUILT_IN`, or ``"package.module:factory"``. The factory is called with
            ``batch_size`` and ``seed`` if it has parameters of these names, and returns one of

            - a :class:`Workload`;
            - ``(model, batch)`` or ``(model, batch, loss)``, where a list of batches will also do;
            - the bare model, if its module also has a function ``batch``, which is called in the
              same way and returns a batch or a list of batches.
        batch_size: Samples in a batch; None takes the job's own.
        seed: Of the weights and of the order of the data. The global generator is left alone.

    Raises:
        ValueError: No such job, module or attribute; a batch size that is not positive, or one
            that the user's factory cannot take.
        TypeError: The factory cannot be called or returns something else.
        OptcpuError: A library that the job's data needs is missing.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in BUILT_IN:
            return BUILT_IN[name](batch_size, seed)
        if ":" in name:
            return _own(name, batch_size, seed)
    raise ValueError(
        f"no workload is called {name!r}{nearest(name, BUILT_IN)}; "
        f"known are {', '.join(BUILT_IN)}, and your own as package.module:factory"
    )


def _mlp(batch_size: int | None, seed: int) -> Workload:
    batch_size = batch_size or 128
    pieces, files = data.source_windows(width=784, classes=1000)
    batches = data.batches(pieces, files, batch_size, count=_BATCH_COUNT, seed=seed)
    return Workload(
        name="mlp",
        model=mlp(),
        batches=[(piece.float() / 255, file) for piece, file in batches],
        loss=classification_loss,
        unit="samples",
        units_per_batch=batch_size,
        description=(
            "51M-parameter MLP 784-4608-4608-4608-1000 that tells from 784 bytes of source "
            f"which of {int(files.max()) + 1} files of the Python standard library they are from"
        ),
    )


def _gpt2_small(batch_size: int | None, seed: int) -> Workload:
    batch_size = batch_size or 4
    corpus = data.code_corpus()
    tokens = "byte-pair" if corpus.tokenizer == "bpe" else "byte"
    return Workload(
        name="gpt2-small",
        # The logits have the width of the real model, also where the tokens are bytes.
        model=gpt2_small(vocab_size=data.GPT2_VOCAB_SIZE),
        batches=data.token_batches(
            corpus.tokens, batch_size, _GPT2_LENGTH, count=_BATCH_COUNT, seed=seed
        ),
        loss=next_token_loss,
        unit="tokens",
        units_per_batch=batch_size * _GPT2_LENGTH,
        description=(
            f"GPT-2 small (124M parameters) on {_GPT2_LENGTH}-token pieces of the Python "
            f"standard library, {tokens} tokens"
        ),
    )


def _encoder(batch_size: int | None, seed: int) -> Workload:
    batch_size = batch_size or 1
    pieces, files = data.source_windows(width=_ENCODER_LENGTH, classes=1000)
    batches = data.batches(pieces, files, batch_size, count=_BATCH_COUNT, seed=seed)
    classes = int(files.max()) + 1
    return Workload(
        name="encoder",
        model=Encoder(classes, length=_ENCODER_LENGTH),
        batches=[(piece.long(), file) for piece, file in batches],
        loss=classification_loss,
        unit="tokens",
        units_per_batch=batch_size * _ENCODER_LENGTH,
        description=(
            f"86M-parameter transformer encoder that tells from {_ENCODER_LENGTH} bytes of source which "
            f"of {classes} files of the Python standard library they are from"
        ),
    )


def _lstm(batch_size: int | None, seed: int) -> Workload:
    batch_size = batch_size or 32
    corpus = data.code_corpus("bytes")
    return Workload(
        name="lstm",
        model=LstmLanguageModel(corpus.vocab_size),
        batches=data.token_batches(
            corpus.tokens, batch_size, _LSTM_LENGTH, count=_BATCH_COUNT, seed=seed
        ),
        loss=next_token_loss,
        unit="tokens",
        units_per_batch=batch_size * _LSTM_LENGTH,
        description=(
            f"two LSTM layers of 512 on {_LSTM_LENGTH}-byte pieces of the Python standard library"
        ),
    )


@dataclass(frozen=True)
class _OnDigits:
    """Makes workloads of image classifiers, on scikit-learn's digits."""

    name: str
    model: Callable[[], nn.Module]
    batch_size: int
    side: int
    channels: int
    description: str

    def __call__(self, batch_size: int | None, seed: int) -> Workload:
        batch_size = batch_size or self.batch_size
        images, labels = data.digits(self.side).train
        batches = data.batches(images, labels, batch_size, count=_BATCH_COUNT, seed=seed)
        return Workload(
            name=self.name,
            model=self.model(),
            batches=[(images.repeat(1, self.channels, 1, 1), labels) for images, labels in batches],
            loss=classification_loss,
            unit="samples",
            units_per_batch=batch_size,
            description=f"{self.description} on scikit-learn's handwritten digits, "
            f"{self.side}x{self.side} pixels",
        )


_DIGITS_CNN = _OnDigits("digits-cnn", digits_cnn, 256, 8, 1, "small CNN with batch normalisation")
_SMALL_CNN = _OnDigits("small-cnn", small_cnn, 256, 28, 1, "the CNN of PyTorch's MNIST example")
_RESNET18 = _OnDigits("resnet18", resnet18, 32, 64, 3, "ResNet-18")
_VIT_TINY = _OnDigits("vit-tiny", vit_tiny, 8, 224, 3, "vision transformer ViT-tiny/16")


BUILT_IN: dict[str, Callable[[int | None, int], Workload]] = {
    "mlp": _mlp,
    "gpt2-small": _gpt2_small,
    "encoder": _encoder,
    "digits-cnn": _DIGITS_CNN,
    "small-cnn": _SMALL_CNN,
    "resnet18": _RESNET18,
    "vit-tiny": _VIT_TINY,
    "lstm": _lstm,
}


def classification_loss(logits: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean cross entropy of ``[batch, classes]`` logits against the batch's last tensor."""
    return F.cross_entropy(logits, batch[-1])


def next_token_loss(logits: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean cross entropy of ``[batch, time, vocabulary]`` logits against the last tensor."""
    return F.cross_entropy(logits.flatten(0, 1), batch[-1].flatten())


def _own(name: str, batch_size: int | None, seed: int) -> Workload:
    module, factory = find_factory(name)
    given = {"seed": seed} if batch_size is None else {"seed": seed, "batch_size": batch_size}
    takers = [factory]
    result = call_factory(factory, name, given)
    if isinstance(result, nn.Module):
        batch = getattr(module, "batch", None)
        if not callable(batch):
            raise TypeError(
                f"{name} returns a model but no batch to train it on; return (model, batch), or "
                f"add a function batch() to {module.__name__}"
            )
        takers.append(batch)
        result = (result, call_factory(batch, f"{module.__name__}:batch", given))
    if batch_size is not None and not any(map(_takes_batch_size, takers)):
        raise ValueError(
            f"a batch size was asked for, but {name} has no parameter batch_size to take it"
        )
    return _as_workload(result, name)


def _as_workload(result: object, name: str) -> Workload:
    if isinstance(result, Workload):
        return result
    if not (
        isinstance(result, tuple) and len(result) in (2, 3) and isinstance(result[0], nn.Module)
    ):
        raise TypeError(
            f"{name} must return a Workload, (model, batch), (model, batch, loss) or a model; "
            f"it returned {describe(result)}"
        )
    model, batch, loss = (*result, None)[:3]
    if loss is not None and not callable(loss):
        raise TypeError(f"the loss of {name} must be callable, got {describe(loss)}")
    batches = as_batches(batch)
    return Workload(
        name=name,
        model=model,
        batches=batches,
        loss=loss,
        unit="samples",
        units_per_batch=units_in(batches[0]),
        description=f"{type(model).__name__} from {name}",
    )


def _takes_batch_size(factory: Callable[..., Any]) -> bool:
    return "batch_size" in inspect.signature(factory).parameters
