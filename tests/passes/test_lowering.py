"""Fused products are written out as the operators they stand for where they do not pay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from captured import BF16, FP32, operators, traced
from torch import Tensor

from passes import gemm, lower, ops
from passes.lowering import expand_products

SAVES_INPUT = ("gelu", "gelu_tanh", "silu")


def matrices(*shapes: tuple[int, ...], dtype: torch.dtype = FP32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


def expanded(function: Callable[..., object], *inputs: Tensor) -> tuple[object, list[str]]:
    """What ``function`` gives once its fused operator is written out, and the operators left."""
    module = traced(function, *inputs)
    assert expand_products(module.graph) == 1
    module.graph.lint()
    module.recompile()
    return module(*inputs), operators(module.graph)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("activation", ["none", *ops.ACTIVATIONS])
def test_linear(activation: str, with_bias: bool, dtype: torch.dtype) -> None:
    x, weight = matrices((5, 7), (3, 7), dtype=dtype)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.linear_op(x, weight, bias if with_bias else None, activation)

    inputs = (x, weight, torch.randn(3))
    result, _ = expanded(function, *inputs)
    torch.testing.assert_close(result, function(*inputs))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("activation", SAVES_INPUT)
def test_linear_saving_input(activation: str, dtype: torch.dtype) -> None:
    def function(x: Tensor, weight: Tensor, bias: Tensor) -> object:
        return ops.linear_saving_input(x, weight, bias, activation)

    inputs = matrices((5, 7), (3, 7), (3,), dtype=dtype)
    result, _ = expanded(function, *inputs)
    torch.testing.assert_close(result, function(*inputs))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_linear_add(dtype: torch.dtype) -> None:
    inputs = matrices((5, 7), (3, 7), (3,), (5, 3), dtype=dtype)
    result, names = expanded(lambda *args: ops.linear_add(*args), *inputs)
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == BF16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(result, ops.linear_add(*inputs), **tolerance)
    assert names == ["aten.permute", "aten.addmm", "aten.add.Tensor"]


def test_plain_product() -> None:
    inputs = matrices((5, 7), (7, 3))
    result, names = expanded(ops.mm, *inputs)
    torch.testing.assert_close(result, inputs[0] @ inputs[1])
    assert names == ["aten.mm"]


@pytest.mark.parametrize("weight_dtype", [FP32, BF16])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("activation", ["none", *ops.ACTIVATIONS])
@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("needs_bias", [True, False])
def test_linear_backward(
    needs_bias: bool,
    needs_input: bool,
    activation: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> None:
    if weight_dtype == BF16 and dtype == FP32:
        return  # a gradient is never narrower than what it is computed from
    gradient, saved, x, weight = matrices((5, 3), (5, 3), (5, 7), (3, 7), dtype=dtype)

    def function(gradient: Tensor, saved: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
        dx, dw, db = ops.linear_backward(
            gradient,
            None if activation == "none" else saved,
            x,
            weight if needs_input else None,
            activation,
            needs_bias,
            weight_dtype,
        )
        return [*([dx] if needs_input else []), dw, *([db] if needs_bias else [])]

    inputs = (gradient, saved, x, weight)
    result, _ = expanded(function, *inputs)
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == BF16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(result, function(*inputs), **tolerance)


def test_golden_sequences() -> None:
    _, forward = expanded(
        lambda x, w, b: ops.linear_op(x, w, b, "relu"), *matrices((5, 7), (3, 7), (3,))
    )
    assert forward == ["aten.permute", "aten.addmm", "aten.relu"]
    _, backward = expanded(
        lambda g, y, x, w: ops.linear_backward(g, y, x, w, "relu", True, FP32),
        *matrices((5, 3), (5, 3), (5, 7), (3, 7)),
    )
    assert backward == [
        "aten.threshold_backward",
        "aten.mm",
        "aten.permute",
        "aten.mm",
        "aten.sum.dim_IntList",
    ]


_SAVING_INPUT = ["optcpu.linear", "aten.gelu"]
WITH_KERNELS_APART: tuple[tuple[torch.dtype, Callable[..., object], list[str]], ...] = (
    (FP32, lambda x, w, b: ops.linear_saving_input(x, w, b, "gelu"), _SAVING_INPUT),
    (BF16, lambda x, w, b: ops.linear_saving_input(x, w, b, "gelu"), _SAVING_INPUT),
    (FP32, lambda x, w, b: ops.linear_add(x, w, b, x), ["optcpu.linear", "aten.add.Tensor"]),
    (
        FP32,
        lambda x, w, b: ops.linear_backward(x, x, x, w, "relu", True, FP32),
        [
            "aten.threshold_backward",
            "optcpu.mm",
            "aten.permute",
            "optcpu.mm",
            "aten.sum.dim_IntList",
        ],
    ),
    (
        BF16,
        lambda x, w, b: ops.linear_backward(x, x, x, w, "relu", True, FP32),
        [
            "aten.threshold_backward",
            "optcpu.linear_backward",
            "cast",
            "aten.sum.dim_IntList",
            "cast",
        ],
    ),
    (
        BF16,
        lambda x, w, b: ops.linear_backward(x, None, x, None, "none", True, FP32)[1:],
        [
            "optcpu.linear_backward",
            "cast",
            "aten.sum.dim_IntList",
            "cast",
        ],
    ),
)


@pytest.mark.parametrize(("dtype", "function", "parts"), WITH_KERNELS_APART)
def test_what_no_library_fuses_with_a_large_product_is_written_out(
    dtype: torch.dtype, function: Callable[..., object], parts: list[str]
) -> None:
    inputs = matrices((128, 512), (512, 512), (512,), dtype=dtype)
    result, names = expanded(function, *inputs)
    assert names == parts
    tolerance = {"rtol": 2e-2, "atol": 0.5} if dtype == BF16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(result, function(*inputs), **tolerance)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_large_products_stay_calls(dtype: torch.dtype) -> None:
    x, weight, bias = matrices((128, 512), (512, 512), (512,), dtype=dtype)
    assert not gemm.is_small(x.shape[0] * weight.numel(), dtype)
    calls: tuple[tuple[Callable[..., object], list[Tensor]], ...] = (
        (lambda x, w: ops.mm(x, w.t()), [x, weight]),
        (lambda x, w, b: ops.linear_op(x, w, b, "relu"), [x, weight, bias]),
    )
    if dtype == BF16:
        calls += (
            (lambda x, w, b: ops.linear_add(x, w, b, x), [x, weight, bias]),
            (lambda x, w: ops.linear_backward(x, None, x, w, "none", False, FP32), [x, weight]),
        )
    for function, inputs in calls:
        module = traced(function, *inputs)
        before = operators(module.graph)
        assert expand_products(module.graph) == 0
        assert operators(module.graph) == before


@pytest.mark.parametrize(("rows", "fired"), [(5, 1), (4096, 0)])
def test_a_symbolic_size_counts_as_the_one_seen_first(rows: int, fired: int) -> None:
    x, weight = matrices((rows, 128), (128, 128))
    module = traced(lambda x, w: ops.linear_op(x, w, None, "relu"), x, weight, dynamic=(0,))
    assert expand_products(module.graph) == fired
    module.graph.lint()
    module.recompile()
    other = torch.randn(9, 128)
    torch.testing.assert_close(module(other, weight), torch.relu(other @ weight.t()))


def test_lowering_leaves_no_activation_whole() -> None:
    module = traced(lambda x, w: ops.linear_op(x, w, None, "gelu_tanh"), *matrices((5, 7), (3, 7)))
    lower(module.graph)
    names = operators(module.graph)
    assert "aten.gelu" not in names
    assert "aten.sigmoid" in names
