"""Convolutions and their gradients as products are PyTorch's, and taken where they are faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optcpu
from passes import im2col, ops

CHANNELS_LAST = torch.channels_last
Operands = tuple[Tensor, Tensor, Tensor, tuple[int, int], tuple[int, int]]


def operands(
    images: int = 2,
    channels: int = 5,
    outputs: int = 7,
    size: tuple[int, int] = (3, 4),
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dtype: torch.dtype = torch.float32,
) -> Operands:
    """A convolution's gradient, input, weight, stride and padding."""
    torch.manual_seed(0)
    x = torch.randn(images, channels, *size).to(dtype, memory_format=CHANNELS_LAST)
    weight = torch.randn(outputs, channels, *kernel).to(dtype, memory_format=CHANNELS_LAST)
    output = nn.functional.conv2d(x, weight, stride=stride, padding=padding)
    gradient = torch.randn_like(output).contiguous(memory_format=CHANNELS_LAST)
    return gradient, x, weight, stride, padding


def backward(given: Operands, operator: Callable[..., Any], *wanted: bool) -> Any:
    gradient, x, weight, stride, padding = given
    geometry = ([*stride], [*padding], [1, 1], False, [0, 0], 1)
    return operator(gradient, x, weight, [weight.shape[0]], *geometry, wanted or (True, True, True))


def assert_alike(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    """In numbers, and in the strides that generated code relies on."""
    scale = float(other.abs().max())
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * scale)
    known = [axis for axis in range(one.dim()) if one.shape[axis] > 1]
    assert [one.stride(axis) for axis in known] == [other.stride(axis) for axis in known]


PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))
# Images, channels, outputs, size, kernel, stride and padding.
CONVOLUTIONS = (
    st.integers(1, 3),
    st.integers(2, 17),
    st.integers(1, 17),
    st.tuples(st.integers(3, 7), st.integers(3, 7)),
    PAIRS,
    PAIRS,
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
)


@settings(max_examples=80, deadline=None)
@given(
    *CONVOLUTIONS,
    st.sampled_from([0, 1000, 10_000, 2**22]),
)
def test_gradients_are_those_of_pytorch(
    images: int,
    channels: int,
    outputs: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    cached_bytes: int,
) -> None:
    """Whatever the shape: strides that leave the last places out, padding, images of one place.

    And in parts of several images, of one image, of one row of its places.
    """
    given = operands(images, channels, outputs, size, kernel, stride, padding)
    double = tuple(item.double() if isinstance(item, Tensor) else item for item in given)
    of_input, of_weight, _ = backward(double, torch.ops.aten.convolution_backward)  # type: ignore[arg-type]
    torch.testing.assert_close(
        im2col.input_gradient(*given), of_input.float(), rtol=1e-4, atol=1e-4
    )
    with mock.patch.multiple(im2col, _CACHED_BYTES=cached_bytes, _ROWS_TO_WEIGHT=0):
        got = im2col.weight_gradient(*given)
    torch.testing.assert_close(got, of_weight.float(), rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(*CONVOLUTIONS)
def test_outputs_are_those_of_pytorch(
    images: int,
    channels: int,
    outputs: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> None:
    _, *given = operands(images, channels, outputs, size, kernel, stride, padding)
    result = im2col.output(*given)
    assert_alike(result, im2col.native_convolution(*given))
    assert result.is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize(
    ("cached_bytes", "shapes"),
    [
        (40_000, [(3, 4), (2, 4)]),  # of five images, whose windows take 12,800 bytes each
        (7_000, [(1, 2)] * 10),
        (1, [(1, 1)] * 20),
    ],
)
def test_parts_hold_as_many_windows_as_fit(
    cached_bytes: int, shapes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(im2col, "_CACHED_BYTES", cached_bytes)
    windows = torch.empty(5, 4, 5, 4, 4, 10)
    parts = [windows[part] for part in im2col._parts(windows, memory=0)]
    assert [tuple(part.shape[:2]) for part in parts] == shapes
    assert sum(part.numel() for part in parts) == windows.numel()


def test_bf16_is_added_up_in_fp32() -> None:
    given = operands(channels=32, outputs=64, kernel=(3, 3), size=(4, 4), dtype=torch.bfloat16)
    exact = tuple(item.double() if isinstance(item, Tensor) else item for item in given)
    of_input, of_weight, _ = backward(exact, torch.ops.aten.convolution_backward)  # type: ignore[arg-type]
    for result, expected in (
        (im2col.input_gradient(*given), of_input),
        (im2col.weight_gradient(*given), of_weight),
    ):
        assert result.dtype == torch.bfloat16
        error = (result - expected).norm() / expected.norm()
        assert error < 2**-8  # two roundings to eight bits, of the products and of their sum


LARGE: dict[str, Any] = {"images": 8, "channels": 256, "outputs": 256, "size": (2, 2)}
WAYS = ["native", "product for the weight", "products"]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways to take, one after the other; each is taken out as it is taken."""
    names: list[str] = []

    def choose(key: str, ways: Mapping[str, Callable[[], object]], preferred: str) -> str:
        assert preferred == "native"
        return names.pop(0)

    monkeypatch.setattr(im2col, "choose", choose)
    return names


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_give_the_same(way: str, taken: list[str]) -> None:
    given = operands(**LARGE)
    expected = backward(given, torch.ops.aten.convolution_backward)
    taken.append(way)
    for one, other in zip(backward(given, ops.convolution_backward), expected, strict=True):
        assert_alike(one, other)
    assert not taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["native", "product"])
def test_both_ways_give_the_same_output(way: str, dtype: torch.dtype, taken: list[str]) -> None:
    _, *given = operands(**LARGE, dtype=dtype)
    taken.append(way)
    result = ops.convolution(*given)
    assert_alike(result, im2col.native_convolution(*given), 1e-5 if dtype.itemsize == 4 else 1e-2)
    assert not taken


def test_outputs_of_other_layouts_are_left_to_pytorch(taken: list[str]) -> None:
    _, x, weight, *geometry = operands(**LARGE)
    expected = im2col.native_convolution(x, weight, *geometry)
    for other in ((x.contiguous(), weight), (x, weight.contiguous())):
        torch.testing.assert_close(ops.convolution(*other, *geometry), expected)


def test_large_images_have_a_product_for_the_weight_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(key: str, ways: Mapping[str, Callable[[], object]], preferred: str) -> str:
        assert [*ways] == WAYS[:2]
        return WAYS[1]

    monkeypatch.setattr(im2col, "choose", choose)
    given = operands(2, 32, 48, (20, 20))
    expected = backward(given, torch.ops.aten.convolution_backward)
    for one, other in zip(backward(given, ops.convolution_backward), expected, strict=True):
        assert_alike(one, other, tolerance=1e-4)


def test_what_is_not_wanted_is_not_computed(taken: list[str]) -> None:
    given = operands(**LARGE)
    taken.append("product for the weight")
    of_input, of_weight, of_bias = backward(given, ops.convolution_backward, False, True, False)
    assert of_input is None
    assert of_bias is None
    assert_alike(of_weight, im2col.weight_gradient(*given))
    backward(given, ops.convolution_backward, True, False, True)  # nothing to choose


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 8, "outputs": 16},  # small
        {"channels": 3, "outputs": 64, "size": (64, 64)},  # windows are copied in small pieces
        {"dtype": torch.float64},
    ],
)
def test_what_cannot_gain_is_not_measured(change: dict[str, Any], taken: list[str]) -> None:
    backward(operands(**(LARGE | change)), ops.convolution_backward)


def test_other_layouts_are_left_to_pytorch(taken: list[str]) -> None:
    """So are groups, dilation and transposed convolutions."""
    gradient, x, weight, stride, padding = operands(**LARGE)
    backward((gradient, x.contiguous(), weight, stride, padding), ops.convolution_backward)
    for dilation, transposed, groups in ((2, False, 1), (1, False, 2), (1, True, 1)):
        kernel = weight[:, : 256 // groups]
        sizes = [dilation, dilation]
        geometry = ([1, 1], sizes, sizes, transposed, [0, 0], groups)
        like = torch.randn_like(torch.ops.aten.convolution(x, kernel, None, *geometry))
        ops.convolution_backward(like, x, kernel, None, *geometry, [True, True, False])


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_has_the_gradients_of_the_eager_one(way: str, taken: list[str]) -> None:
    def gradients(compiled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 512, 3, 2, 1)
        )
        x = torch.randn(8, 256, 2, 2, requires_grad=True)
        if compiled:
            optcpu.optimize(model, precision="fp32")
        model(x).square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in model.parameters())]  # type: ignore[list-item]

    taken.extend([way] * 4)  # each of two operators, and its place in generated code
    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert not taken


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (2, 5), (1, 4)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(3, 2, 1, 1), (2, 2, 1, 1), (5, 3, 2, 1), (7, 3, 3, 1), (3, 1, 2, 2), (3, 1, 1, 1)],
)
def test_places_that_see_padding_alone_are_zero(
    kernel: int, stride: int, padding: int, dilation: int, size: tuple[int, int], transposed: bool
) -> None:
    """And no others: where PyTorch in FP64 has zeros, what was not a number is zero afterwards."""
    call = nn.functional.conv_transpose2d if transposed else nn.functional.conv2d
    x = torch.rand(1, 1, *size, dtype=torch.float64) + 1
    weight = torch.ones(1, 1, kernel, kernel, dtype=torch.float64, requires_grad=True)
    try:
        y = call(x, weight, stride=stride, padding=padding, dilation=dilation)
    except RuntimeError:
        pytest.skip("the output would be empty")
    (expected,) = torch.autograd.grad(y.sum(), weight)
    gradient = torch.full_like(expected, torch.nan)
    read, written = (y, x) if transposed else (x, y)
    steps = ([stride] * 2, [padding], [dilation, dilation])
    unseen = im2col.places_that_see_padding_alone(
        (kernel, kernel), read.shape[2:], written.shape[2:], *steps
    )
    for axis, place in unseen:
        gradient.select(2 + axis, place).zero_()
    assert torch.equal(gradient == 0, expected == 0)


def test_a_bf16_gradient_does_not_hold_what_lay_in_memory() -> None:
    given = operands(2, 16, 32, size=(1, 1), stride=(2, 2), dtype=torch.bfloat16)
    expected = backward(
        tuple(t.double() if isinstance(t, Tensor) else t for t in given),  # type: ignore[arg-type]
        torch.ops.aten.convolution_backward.default,
    )
    for _ in range(4):
        dirty = [torch.full((32 * 16 * 9,), torch.nan, dtype=torch.bfloat16) for _ in range(4)]
        del dirty
        ours = backward(given, torch.ops.optcpu.convolution_backward.default)
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=2e-2)
