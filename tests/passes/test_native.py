"""The C++ kernel gives exact products for any shape, and its absence is no failure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes import native, ops


@pytest.fixture
def fresh_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No kernel built so far, in the process or on disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._weight_gradient_library.cache_clear()
    yield tmp_path
    native._weight_gradient_library.cache_clear()


needs_kernel = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="this processor has no AVX512_BF16"
)


@needs_kernel
@settings(max_examples=60)
@given(
    batch=st.integers(0, 2500),
    out=st.integers(1, 300),
    width=st.integers(1, 600),
    transposed=st.booleans(),
)
def test_products_are_exact_to_fp32(batch: int, out: int, width: int, transposed: bool) -> None:
    gradient = torch.randn(batch, out).bfloat16()
    x = (
        torch.randn(width, batch).bfloat16().t()
        if transposed
        else torch.randn(batch, width).bfloat16()
    )
    result = native.weight_gradient(gradient, x)
    expected = gradient.double().t() @ x.double()
    assert result.dtype == torch.float32
    magnitude = gradient.double().abs().t() @ x.double().abs()
    assert (result - expected).norm() <= 1e-6 * magnitude.norm() + 1e-12
    rounded = native.weight_gradient(gradient, x, torch.bfloat16)
    assert torch.equal(rounded, result.bfloat16())


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [2048, 2080, 2090])  # in whole tiles, whole cache lines, neither
def test_a_result_larger_than_the_caches_is_complete(width: int, dtype: torch.dtype) -> None:
    gradient, x = torch.randn(3, 1100).bfloat16(), torch.randn(3, width).bfloat16()
    result = native.weight_gradient(gradient, x, dtype)
    expected = gradient.float().t() @ x.float()
    torch.testing.assert_close(result.float(), expected, rtol=2**-8, atol=1e-6)


@needs_kernel
def test_the_number_of_threads_changes_no_bit() -> None:
    gradient, x = torch.randn(700, 130).bfloat16(), torch.randn(700, 90).bfloat16()
    expected = native.weight_gradient(gradient, x)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(native.weight_gradient(gradient, x), expected)
    finally:
        torch.set_num_threads(threads)


@needs_kernel
@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_reaches_its_row_and_column_alone(special: float) -> None:
    gradient, x = torch.ones(5, 70).bfloat16(), torch.ones(5, 9).bfloat16()
    gradient[4, 69] = special
    result = native.weight_gradient(gradient, x)
    assert torch.equal(result[:69], torch.full((69, 9), 5.0))
    torch.testing.assert_close(result[69], torch.full((9,), special), equal_nan=True)


@needs_kernel
def test_the_kernel_is_built_once(fresh_build: Path) -> None:
    assert native.weight_gradient_available()
    (library,) = fresh_build.rglob("*.so")
    built = library.stat().st_mtime_ns
    native._weight_gradient_library.cache_clear()  # as a new process begins
    assert native.weight_gradient_available()
    assert library.stat().st_mtime_ns == built


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_without_a_compiler_the_product_is_made_by_pytorch(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert not native.weight_gradient_available()
    with pytest.raises(RuntimeError, match="could not be built"):
        native.weight_gradient(torch.randn(2, 2).bfloat16(), torch.randn(2, 2).bfloat16())
    gradient, x = torch.randn(256, 256).bfloat16(), torch.randn(256, 256).bfloat16()
    weight_gradient = ops.linear_backward(gradient, None, x, None, "none", False, torch.float32)[1]
    expected = gradient.double().t() @ x.double()
    assert weight_gradient.dtype == torch.float32
    assert (weight_gradient - expected).norm() < 4e-3 * expected.norm()


@needs_kernel
def test_a_cache_that_cannot_be_written_does_no_harm(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fresh_build / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh_build / "file"))
    assert native.weight_gradient_available()
