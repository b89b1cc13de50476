"""The weight gradient of strided 1x1 convolutions, right on every processor."""

from __future__ import annotations

import pytest
import torch
from captured import assert_parity, run
from torch import nn

import optcpu
from passes import SubsampleForWeightGradient

PASSES = [SubsampleForWeightGradient()]


def images(channels: int, *, needs_gradient: bool = True, size: int = 9) -> torch.Tensor:
    return torch.randn(2, channels, size, size, requires_grad=needs_gradient)


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [2, 3, (1, 2)])
def test_parity(stride: int | tuple[int, int], bias: bool, needs_gradient: bool) -> None:
    model = nn.Conv2d(3, 5, 1, stride=stride, bias=bias)
    result = assert_parity(model, images(3, needs_gradient=needs_gradient), passes=PASSES)
    assert result.fired("subsample-for-weight-gradient") == 1


@pytest.mark.parametrize(
    ("model", "shape"),
    [(nn.Conv1d(3, 5, 1, stride=2), (2, 3, 9)), (nn.Conv3d(3, 5, 1, stride=2), (2, 3, 5, 6, 7))],
)
def test_other_dimensions(model: nn.Module, shape: tuple[int, ...]) -> None:
    result = assert_parity(model, torch.randn(shape, requires_grad=True), passes=PASSES)
    assert result.fired("subsample-for-weight-gradient") == 1


@pytest.mark.parametrize(
    ("model", "channels"),
    [
        (nn.Conv2d(3, 5, 1), 3),  # visits every pixel
        (nn.Conv2d(3, 5, 3, stride=2), 3),
        (nn.Conv2d(3, 5, 1, stride=2, padding=1), 3),
        (nn.Conv2d(8, 5, 1, stride=2), 8),  # fills a vector
        (nn.Conv2d(4, 4, 1, stride=2, groups=2), 4),
        (nn.ConvTranspose2d(3, 5, 1, stride=2), 3),
        (nn.Conv2d(3, 5, 1, stride=2).requires_grad_(False), 3),
    ],
)
def test_near_miss(model: nn.Module, channels: int) -> None:
    result = run(model, images(channels), passes=PASSES)
    assert result.fired("subsample-for-weight-gradient") == 0


def test_golden_sequence() -> None:
    result = run(nn.Conv2d(3, 5, 1, stride=2), images(3), passes=PASSES)
    slices = ["aten.slice.Tensor", "aten.slice.Tensor"]
    both = ["aten.convolution_backward", "aten.convolution_backward"]
    assert operators_of(result.operators("backward")) == [*slices, *both]


def operators_of(names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(("aten.slice", "aten.conv"))]


@pytest.mark.parametrize("channels", [1, 3, 4, 7, 8, 9])
def test_generated_code_computes_what_eager_computes(channels: int) -> None:
    """Generated code lays the images out channels-last, which is where the wrong kernel is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 8, 1, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3))
    x = torch.randn(8, channels, 14, 14)
    model(x).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    optcpu.optimize(model, precision="fp32", fallback=False)
    model(x).square().mean().backward()
    for parameter, reference in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, reference, rtol=1e-4, atol=1e-6)
