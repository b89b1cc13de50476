"""ResNet-18 (He et al., 2016)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu

_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # channels, stride of the first block


def resnet18(classes: int = 10) -> nn.Sequential:
    """ResNet-18 as for ImageNet.

    Args:
        classes: number of classes.

    Returns:
        A model of 11.2 million parameters (ten classes) from ``[batch, 3, height, width]`` to logits
        ``[batch, classes]``, both float32.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    channels = 64
    for width, stride in _STAGES:
        layers += [ResidualBlock(channels, width, stride), ResidualBlock(width, width, 1)]
        channels = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


class ResidualBlock(nn.Module):
    """Two convolutions with batch normalisation, and a way round them.

    Maps ``[batch, inputs, height, width]`` to ``[batch, outputs, height / stride, width / stride]``.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, 3, stride)
        self.second = _convolution(outputs, outputs, 3, 1)
        alike = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if alike else _convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.second(relu(self.first(x)))
        return relu(branch + self.shortcut(x))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )
