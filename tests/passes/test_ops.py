"""The fused operators against the plain ones they stand for, and their fake shapes against real ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes import ops
from passes.gemm import kernels

DTYPES = (torch.float32, torch.bfloat16)
SIZES = st.tuples(st.integers(0, 50), st.integers(1, 50), st.integers(1, 50))


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 2e-2, "atol": 8e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}


def reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    result = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    if activation == "none":
        return result
    rule = ops.ACTIVATIONS[activation]
    return rule.forward(result, **dict(rule.arguments))  # type: ignore[operator]


@settings(max_examples=60)
@given(
    sizes=SIZES,
    activation=st.sampled_from(["none", *ops.ACTIVATIONS]),
    dtype=st.sampled_from(DTYPES),
    bias_dtype=st.sampled_from([None, "same", "fp32"]),
)
def test_linear(
    sizes: tuple[int, int, int], activation: str, dtype: torch.dtype, bias_dtype: str | None
) -> None:
    m, k, n = sizes
    x, weight = torch.randn(m, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)
    bias = None if bias_dtype is None else torch.randn(n)
    if bias is not None and bias_dtype == "same":
        bias = bias.to(dtype)
    result = ops.linear_op(x, weight, bias, activation)
    assert result.dtype == dtype
    expected = reference(x, weight, bias, activation)
    torch.testing.assert_close(result.double(), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"])
def test_large_linear_is_fused(activation: str, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(128, 256), torch.randn(256, 256) / 16, torch.randn(256)
    x, weight = x.to(dtype), weight.to(dtype)
    result = ops.linear_op(x, weight, bias, activation)
    expected = reference(x, weight, bias, activation)
    torch.testing.assert_close(result.double(), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_linear_saving_input_returns_what_the_backward_needs(
    activation: str, dtype: torch.dtype
) -> None:
    x, weight, bias = torch.randn(9, 7).to(dtype), torch.randn(5, 7).to(dtype), torch.randn(5)
    result, before = ops.linear_saving_input(x, weight, bias, activation)
    linear = reference(x, weight, bias, "none")
    torch.testing.assert_close(before.double(), linear, **tolerance(dtype))
    expected = reference(x, weight, bias, activation)
    torch.testing.assert_close(result.double(), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_add(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(9, 7).to(dtype), torch.randn(5, 7).to(dtype), torch.randn(5)
    residual = torch.randn(9, 5).to(dtype)
    untouched = residual.clone()
    result = ops.linear_add(x, weight, bias.to(dtype), residual)
    expected = reference(x, weight, bias, "none") + residual.double()
    torch.testing.assert_close(result.double(), expected, **tolerance(dtype))
    assert torch.equal(residual, untouched)


@pytest.mark.parametrize(
    ("dtype", "kernel"), [(dtype, kernel) for dtype in DTYPES for kernel in kernels(dtype)]
)
@pytest.mark.parametrize("bias_dtype", [None, "same", "fp32"])
def test_every_kernel_serves_every_linear(
    dtype: torch.dtype, kernel: str, bias_dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "fastest", lambda a, b, following, runs: kernel)
    x, weight, residual = (torch.randn(s).to(dtype) for s in ((32, 24), (16, 24), (32, 16)))
    bias = None if bias_dtype is None else torch.randn(16)
    if bias is not None and bias_dtype == "same":
        bias = bias.to(dtype)
    expected = reference(x, weight, bias, "none")
    activated, before = ops.linear_saving_input(x, weight, bias, "relu")
    for result, wanted in (
        (ops.linear_op(x, weight, bias, "relu"), expected.relu()),
        (activated, expected.relu()),
        (before, expected),
        (ops.linear_add(x, weight, bias, residual), expected + residual.double()),
    ):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), wanted, **tolerance(dtype))


@settings(max_examples=60)
@given(
    sizes=SIZES,
    activation=st.sampled_from(["none", *ops.ACTIVATIONS]),
    dtype=st.sampled_from(DTYPES),
    needs=st.tuples(st.booleans(), st.booleans()),
    wide_weight=st.booleans(),
)
def test_linear_backward(
    sizes: tuple[int, int, int],
    activation: str,
    dtype: torch.dtype,
    needs: tuple[bool, bool],
    wide_weight: bool,
) -> None:
    m, k, n = sizes
    needs_x, needs_bias = needs
    x, weight = torch.randn(m, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)
    gradient = torch.randn(m, n).to(dtype)
    before = (x.float() @ weight.float().t()).to(dtype)
    saved = None
    if activation != "none":
        rule = ops.ACTIVATIONS[activation]
        after = rule.forward(before, **dict(rule.arguments))  # type: ignore[operator]
        saved = before if rule.saves == "input" else after
    weight_dtype = torch.float32 if wide_weight else dtype
    arguments = (
        gradient,
        saved,
        x,
        weight if needs_x else None,
        activation,
        needs_bias,
        weight_dtype,
    )
    dx, dw, db = ops.linear_backward(*arguments)

    leaf = before.double().requires_grad_()
    output = leaf
    if activation != "none":
        output = rule.forward(leaf, **dict(rule.arguments))  # type: ignore[operator]
    (masked,) = torch.autograd.grad(output, leaf, gradient.double())
    wide = (
        {"rtol": 3e-2, "atol": 0.15 * max(m, n) ** 0.5}
        if dtype == torch.bfloat16
        else {
            "rtol": 1e-4,
            "atol": 1e-4,
        }
    )
    torch.testing.assert_close(dw.double(), masked.t() @ x.double(), **wide)
    if needs_x:
        torch.testing.assert_close(dx.double(), masked @ weight.double(), **wide)
    if needs_bias:
        torch.testing.assert_close(db.double(), masked.sum(0), **wide)
    assert dw.dtype == weight_dtype
    assert (dx.numel() == 0) == (not needs_x or m == 0)
    assert db.shape == ((n,) if needs_bias else (0,))


@pytest.mark.parametrize("rows", [4, 300])
def test_fake_results_match_real_ones(rows: int) -> None:
    x, weight, bias = torch.randn(rows, 96), torch.randn(160, 96), torch.randn(160)
    gradient, residual = torch.randn(rows, 160), torch.randn(rows, 160)
    calls = (
        (ops.mm, (x, weight.t())),
        (ops.linear_op, (x, weight, bias, "relu")),
        (ops.linear_saving_input, (x, weight, bias, "gelu")),
        (ops.linear_add, (x, weight, bias, residual)),
        (ops.linear_backward, (gradient, residual, x, weight, "relu", True, torch.float32)),
        (ops.linear_backward, (gradient, None, x, None, "none", False, torch.float32)),
    )
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 3])
def test_image_operators_are_pytorchs_in_any_layout(
    channels: int, layout: torch.memory_format
) -> None:
    x, weight = torch.randn(2, channels, 7, 6), torch.randn(8, channels, 3, 3)
    gradient = torch.randn(2, 8, 5, 4).contiguous(memory_format=layout)
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    aten = torch.ops.aten
    for wanted in ([True, True, True], [False, True, False]):
        arguments = (gradient, x.contiguous(memory_format=layout), weight, [8], *geometry, wanted)
        got = ops.convolution_backward(*arguments)
        expected = aten.convolution_backward(gradient, x, weight, [8], *geometry, wanted)
        for one, other in zip(got, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.library.opcheck(ops.convolution_backward, arguments, test_utils="test_schema")

    pooled, where = torch.nn.functional.max_pool2d(x, 3, 2, 1, return_indices=True)
    where = where.contiguous(memory_format=layout)
    gradient = torch.randn_like(pooled)
    pool = ([3, 3], [2, 2], [1, 1], [1, 1], False)
    arguments = (gradient, x.shape, *pool, where)
    result = ops.max_pool_backward(*arguments)
    expected = aten.max_pool2d_with_indices_backward(gradient, x, *pool, where)
    assert torch.equal(result, expected)
    assert result.is_contiguous(memory_format=layout)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.max_pool_backward, arguments, test_utils=checks)
