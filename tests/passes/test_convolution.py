"""The weight gradient of strided 1x1 convolutions, right on every processor; and small images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from captured import assert_parity, operators, run, traced
from torch import Tensor, nn

import optcpu
from passes import SubsampleForWeightGradient, im2col
from passes.convolution import choose_for_small_images

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


X, W = torch.randn(8, 256, 2, 2), torch.randn(256, 256, 3, 3)
conv2d = nn.functional.conv2d


def chosen(function: Callable[..., Tensor], *inputs: Tensor) -> int:
    """How many convolutions of ``function`` may be products; its result must be the same."""
    module = traced(function, *inputs)
    count = choose_for_small_images(module.graph)
    module.graph.lint()
    module.recompile()
    torch.testing.assert_close(module(*inputs), function(*inputs), rtol=1e-4, atol=1e-3)
    assert operators(module.graph).count("optcpu.convolution") == count
    return count


@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": 1, "stride": 2}, {"padding": 2}])
def test_small_images_may_be_products(options: dict[str, int]) -> None:
    assert chosen(lambda x, w: conv2d(x, w, **options), X, W) == 1


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda x, w: conv2d(x, w, torch.ones(256), padding=1), (X, W)),
        (lambda x, w: conv2d(x, w, padding=2, dilation=2), (X, W)),
        (lambda x, w: conv2d(x, w, padding=1, groups=2), (X, W[:, :128])),
        (lambda x, w: nn.functional.conv_transpose2d(x, w, padding=1), (X, W)),
        (lambda x, w: conv2d(x, w, padding=1), (X.double(), W.double())),
        (lambda x, w: conv2d(x, w, padding=1), (torch.randn(8, 256, 16, 16), W)),  # large images
        (lambda x, w: conv2d(x, w, padding=1), (X[:1, :8], W[:8, :8])),  # little to compute
        (lambda x, w: nn.functional.conv1d(x, w, padding=1), (X.flatten(2), W[..., 0])),
    ],
)
def test_convolutions_that_stay(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> None:
    assert chosen(function, *inputs) == 0


class Features(nn.Module):
    """Gives the caller images from within, whose layout must be the eager one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(64, 256, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(256)
        self.second = nn.Conv2d(256, 512, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        inner = torch.relu(self.norm(self.first(x)))
        outer = self.second(inner)
        return inner, outer, outer.relu()


@pytest.mark.parametrize("way", ["native", "product"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_compiled_model_of_small_images_is_the_eager_one(
    way: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    taken: list[str] = []

    def choose(key: str, ways: dict[str, object], preferred: str) -> str:
        if not key.startswith("convolution ["):
            return preferred
        taken.append(way)
        return way

    monkeypatch.setattr(im2col, "choose", choose)
    torch.manual_seed(0)
    model = Features()
    plain = copy.deepcopy(model)
    x = torch.randn(16, 64, 3, 3).to(memory_format=layout)
    optcpu.optimize(model, precision="fp32", fallback=False)
    results, expected = model(x), plain(x)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-4)
        assert result.stride() == reference.stride()
    for outputs in (results, expected):
        sum(output.square().mean() for output in outputs).backward()
    for parameter, reference in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-3, atol=1e-5)
    assert taken == [way] * 4  # each of two operators, and its place in generated code
