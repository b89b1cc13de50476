"""The C++ kernel gives exact products for any shape, and its absence is no failure."""

from __future__ import annotations

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
    batch=st.integers(1, 1100),
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
    assert (result - expected).norm() <= 1e-6 * expected.norm() + 1e-12


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
