"""The convolutional network of PyTorch's MNIST example, without its dropout."""

from __future__ import annotations

from torch import nn


def small_cnn(classes: int = 10) -> nn.Sequential:
    """Two convolutions, one pooling, two linear layers.

    Args:
        classes: number of classes.

    Returns:
        A model of 1.2 million parameters (ten classes) from ``[batch, 1, 28, 28]`` to logits
        ``[batch, classes]``, both float32.
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 12 * 12, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )
