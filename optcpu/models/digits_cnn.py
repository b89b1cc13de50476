"""A small convolutional network for 8x8 images."""

from __future__ import annotations

from torch import nn


def digits_cnn(classes: int = 10) -> nn.Sequential:
    """Three convolutions with batch normalisation, one pooling, one linear layer.

    Args:
        classes: Number of classes.

    Returns:
        A model of 94 thousand parameters (ten classes) from ``[batch, 1, 8, 8]`` to logits
        ``[batch, classes]``, both float32.
    """
    return nn.Sequential(
        *_convolution(1, 32),
        *_convolution(32, 64),
        nn.MaxPool2d(2),
        *_convolution(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, classes),
    )


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    # The bias is left out: batch normalisation would take it away again.
    return (
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
