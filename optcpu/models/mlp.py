"""A multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

REFERENCE_SIZES = (784, 4608, 4608, 4608, 1000)


def mlp(sizes: Sequence[int] = REFERENCE_SIZES) -> nn.Sequential:
    """Linear layers with a ReLU between each two.

    Args:
        sizes: Width of the input, of every hidden layer and of the output. The default is the
            reference model of 50.7 million parameters.

    Returns:
        A model from ``[batch, sizes[0]]`` to logits ``[batch, sizes[-1]]``, both float32.

    Raises:
        ValueError: ``sizes`` has fewer than two entries, or one that is not positive.
    """
    if len(sizes) < 2 or any(size < 1 for size in sizes):
        raise ValueError(
            f"sizes must hold at least an input and an output width, all positive; got {sizes!r}"
        )
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
