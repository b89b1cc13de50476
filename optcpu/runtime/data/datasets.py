"""A classification task of any size that is computed where it is read."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from optcpu.runtime.data.randomness import random_bits, stream_key

_INPUTS, _TEACHER, _NOISE, _NOISE_LABELS, _CALIBRATION = range(5)
_INPUT_STEPS = 64  # the teacher sees inputs in steps of 1/64
_SCORE_SCALE = 1 << 17  # standard deviation of the scores; FP32 is exact up to 2**24
_FEW_DIMENSIONS, _FEW_CLASSES = 8, 128


class SyntheticDataset(Dataset[tuple[Tensor, Tensor]]):
    """Normally distributed inputs, and labels from a fixed random linear teacher.

    Sample ``i`` is a function of ``(seed, i)`` alone, with the same bits in every process, in any order and
    in any batch; nothing is stored and no generator is drawn from. ``size`` changes no sample, so that a
    larger data set has the smaller one at its beginning.

    The label is the largest of ``num_classes`` linear functions of the input, which a linear layer can
    learn. With no more classes than input dimensions they are orthogonal and all classes equally likely,
    otherwise roughly so; in one or two dimensions some may be rare. With ``noise``, that share of labels is
    replaced by labels that are drawn uniformly (the true
    one among them), so that no model reaches more than ``1 - noise * (num_classes - 1) / num_classes``.

    Args:
        size: number of samples.
        input_dim: the shape of an input, or its length.
        num_classes: labels are in ``0..num_classes - 1``.
        seed: any integer; another one is another task.
        noise: share of labels that tell nothing, in 0..1.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is not positive, there is one class only, or ``noise`` is not in 0..1.
    """

    def __init__(
        self,
        size: int,
        input_dim: int | Sequence[int],
        num_classes: int,
        seed: int = 0,
        *,
        noise: float = 0.0,
    ) -> None:
        dimensions = [input_dim] if _is_index(input_dim) else input_dim
        if not isinstance(dimensions, Sequence) or isinstance(dimensions, str) or not dimensions:
            raise TypeError(f"input_dim must be an integer or several of them, got {input_dim!r}")
        self.size = _at_least(1, "size", size)
        self.shape = tuple(_at_least(1, "input_dim", length) for length in dimensions)
        self.num_classes = _at_least(2, "num_classes", num_classes)
        self.seed = operator.index(seed)
        if not 0 <= noise <= 1:
            raise ValueError(f"noise is a share of the labels, in 0..1, got {noise}")
        self.noise = float(noise)
        self._width = math.prod(self.shape)
        self._weights, self._biases = self._teacher()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Input ``[*shape]`` float32 and label ``[]`` int64; a negative index counts from the end.

        Raises:
            IndexError: there is no such sample.
        """
        inputs, labels = self.batch([index])
        return inputs[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The samples of a batch, made together; bit for bit those of :meth:`__getitem__`."""
        inputs, labels = self.batch(indices)
        return list(zip(inputs.unbind(), labels.unbind(), strict=True))

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs ``[n, *shape]`` float32 and labels ``[n]`` int64 of ``n`` samples.

        Raises:
            IndexError: there is no such sample.
        """
        rows = resolved_indices(indices, self.size).astype(np.uint64)
        inputs = torch.from_numpy(_normal(stream_key(self.seed, _INPUTS), rows, self._width))
        labels = (self._scores(inputs) + self._biases).argmax(dim=1)
        if self.noise:
            labels = torch.where(self._is_noisy(rows), self._noisy_labels(rows), labels)
        return inputs.view(len(rows), *self.shape), labels

    def _scores(self, inputs: Tensor) -> Tensor:
        # Integers far below 2**24: FP32 sums of them are exact, so that neither the size of the batch nor
        # the number of threads can change a label.
        return torch.mm(torch.round(inputs * _INPUT_STEPS), self._weights)

    def _teacher(self) -> tuple[Tensor, Tensor]:
        """Weights ``[width, num_classes]`` and biases ``[num_classes]``: integers in float32."""
        columns = np.arange(self.num_classes, dtype=np.uint64)
        normal = _normal(stream_key(self.seed, _TEACHER), columns, self._width).T
        weights = normal.astype(np.float64)
        if self.num_classes <= self._width:
            weights = np.linalg.qr(weights)[0]
        elif self._width > 1:  # on a line, length is all that tells them apart
            weights /= np.linalg.norm(weights, axis=0)
        weights *= _SCORE_SCALE / _INPUT_STEPS
        self._weights = torch.from_numpy(np.rint(weights).astype(np.float32))
        biases = torch.zeros(self.num_classes)
        if (
            self._width < min(self.num_classes, _FEW_DIMENSIONS)
            and self.num_classes <= _FEW_CLASSES
        ):
            rows = np.arange(64 * self.num_classes, dtype=np.uint64)
            inputs = _normal(stream_key(self.seed, _CALIBRATION), rows, self._width)
            biases = _balancing_biases(self._scores(torch.from_numpy(inputs)))
        return self._weights, biases

    def _is_noisy(self, rows: npt.NDArray[np.uint64]) -> Tensor:
        bits = random_bits(stream_key(self.seed, _NOISE), rows)
        return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2**-53 < self.noise)

    def _noisy_labels(self, rows: npt.NDArray[np.uint64]) -> Tensor:
        bits = random_bits(stream_key(self.seed, _NOISE_LABELS), rows)
        return torch.from_numpy((bits % np.uint64(self.num_classes)).astype(np.int64))


def resolved_indices(indices: Sequence[int], size: int) -> npt.NDArray[np.int64]:
    """``indices`` into something of ``size`` entries as int64 ``[n]``, negative ones from the end.

    Raises:
        IndexError: one is out of range.
        TypeError: one is no integer.
    """
    rows = np.fromiter((operator.index(index) for index in indices), dtype=np.int64)
    wrong = (rows < -size) | (rows >= size)
    if wrong.any():
        raise IndexError(f"index {rows[wrong][0]} is out of range for a data set of {size} samples")
    return np.where(rows < 0, rows + size, rows)


def _normal(key: int, rows: npt.NDArray[np.uint64], width: int) -> npt.NDArray[np.float32]:
    """Rows of an endless random matrix, ``[len(rows), width]``, normally distributed.

    64 random bits give four values, each the normal quantile of 16 bits.
    """
    blocks = -(-width // 4)
    counters = (rows * np.uint64(blocks))[:, None] + np.arange(blocks, dtype=np.uint64)
    bits = random_bits(key, counters).astype("<u8", copy=False).view("<u2")
    values: npt.NDArray[np.float32] = _quantiles()[bits[:, :width]]
    return values


@functools.cache
def _quantiles() -> npt.NDArray[np.float32]:
    """The normal distribution in 65536 equally likely values, scaled to variance 1."""
    middles = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    values = torch.special.ndtri(middles)
    table: npt.NDArray[np.float32] = (values / values.square().mean().sqrt()).float().numpy()
    return table


def _balancing_biases(scores: Tensor) -> Tensor:
    """Integers ``[classes]`` that make all classes win equally often when added to ``scores``.

    Args:
        scores: ``[n, classes]`` float32.

    The dual of semi-discrete optimal transport (Aurenhammer, Hoffmann, Aronov, "Minkowski-type theorems
    and least-squares clustering", 1998), by gradient ascent with steps that grow shorter.
    """
    count, classes = scores.shape
    biases = torch.zeros(classes)
    for number in range(300):
        wins = torch.bincount((scores + biases).argmax(dim=1), minlength=classes)
        excess = wins * classes / count - 1
        step = _SCORE_SCALE * 0.3 / (1 + number / 5)
        biases -= torch.round(step * excess.clamp(-1, 1))
    return biases


def _is_index(value: Any) -> bool:
    return hasattr(value, "__index__")


def _at_least(least: int, name: str, value: Any) -> int:
    if isinstance(value, bool) or not _is_index(value):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if operator.index(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return operator.index(value)
