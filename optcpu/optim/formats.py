"""How numbers are stored: FP32, BF16 rounded in two ways, and FP32 split into two halves.

A BF16 number is the upper half of an FP32 number. Rounded to nearest, it cannot follow a sum whose
terms are smaller than half its last bit: with ``beta2 = 0.999`` a second moment would never decay.
Rounded up or down at random, with the probability that makes the mean right, it follows on average
(stochastic rounding; Gupta et al. 2015, arXiv 1502.02551). Split storage keeps the lower half as well, in
another tensor: the upper halves are a BF16 weight to compute with, and both together the exact FP32
weight, in 4 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from passes.halves import joined


class Format(IntEnum):
    """What the numbers of a tensor are; the values are those of ``kernels/numbers.h``."""

    FLOAT = 0  # FP32
    SPLIT = 1  # FP32 as BF16 (rounded to nearest, ties up) and the int16 difference
    STOCHASTIC = 2  # BF16, rounded stochastically
    NEAREST = 3  # BF16, rounded to nearest, ties to even


@dataclass(slots=True)
class Stored:
    """A tensor of numbers in some format.

    Attributes:
        format: what they are.
        data: FP32 or BF16, by format.
        low: the lower halves, int16, of the same shape and strides, for ``Format.SPLIT`` alone.
        seed: of the random bits that :meth:`write` rounds by; below 2**32.
    """

    format: Format
    data: Tensor
    low: Tensor | None = None
    seed: int = 0

    def read(self) -> Tensor:
        """The numbers as FP32: a new tensor, but for ``Format.FLOAT`` the stored one."""
        if self.low is not None:
            return joined(self.data, self.low)
        return self.data.float()

    def write(self, numbers: Tensor) -> None:
        """Store FP32 ``numbers``."""
        if self.format == Format.SPLIT:
            assert self.low is not None
            high, low = split(numbers)
            self.data.copy_(high)
            self.low.copy_(low)
        elif self.format == Format.STOCHASTIC:
            self.data.copy_(round_stochastically(numbers, self.seed))
        else:
            self.data.copy_(numbers)


def split(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """FP32 ``numbers`` as BF16 upper halves and int16 rests, which together keep every bit.

    :func:`passes.halves.joined` puts them together.
    The upper half is rounded to nearest; ties go up, where BF16's own rule is to even, since the rest
    would otherwise need one value more than 16 bits hold. All that are no numbers become one such.
    """
    bits = _bits(numbers)  # whose sums may wrap around: the join does, too
    high = bits + 0x8000 >> 16
    low = bits - (high << 16)
    return high.short().view(torch.bfloat16), low.short()


def round_stochastically(numbers: Tensor, seed: int) -> Tensor:
    """FP32 ``numbers`` as BF16, up or down at random so that the mean is right.

    The random bits are a function of ``seed`` and each number's place in memory.
    """
    bits = _bits(numbers) + _random_bits(numbers, seed)
    return (bits >> 16).short().view(torch.bfloat16)


def _bits(numbers: Tensor) -> Tensor:
    """Of FP32 ``numbers``, with one NaN for all: the largest would become zero where they are rounded."""
    return torch.where(numbers.isnan(), torch.nan, numbers).view(torch.int32)


def _random_bits(like: Tensor, seed: int) -> Tensor:
    """Sixteen random bits for each number; the same as in ``kernels/numbers.h``."""
    dense = torch.empty_like(like)
    places = torch.arange(dense.numel()).as_strided(dense.shape, dense.stride())
    x = (places // 2 ^ seed) & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    x = x ^ x >> 16
    return (x >> 16 * (places % 2) & 0xFFFF).int()  # a pair of numbers shares one draw


def mixed(*numbers: int) -> int:
    """A seed below 2**32 that depends on all of ``numbers``; SplitMix64's finaliser after each."""
    x = 0
    for number in numbers:
        x = (x + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        x ^= x >> 31
    return x & 0xFFFFFFFF
