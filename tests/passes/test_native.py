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


@pytest.fixture(autouse=True, scope="module", params=["matrix unit", "vector registers"])
def unit(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test runs with the kernel for either."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "vector registers":
            patch.setattr(native, "has_matrix_unit", lambda: False)
        elif not native.has_matrix_unit():
            pytest.skip("this processor has no AMX")
        native._library.cache_clear()
        yield
    native._library.cache_clear()


@pytest.fixture
def fresh_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No kernel built so far, in the process or on disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._library.cache_clear()
    yield tmp_path
    native._library.cache_clear()


needs_kernel = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="this processor has no AVX512_BF16"
)


def matrix(rows: int, columns: int, layout: str) -> torch.Tensor:
    """Random numbers, laid out row by row, column by column, or as a part of something larger."""
    if layout == "columns":
        return torch.randn(columns, rows).bfloat16().t()
    if layout == "part":
        return torch.randn(rows + 2, columns + 3).bfloat16()[1:-1, 2:-1]
    if layout == "every second":
        return torch.randn(rows, 2 * columns).bfloat16()[:, ::2]
    return torch.randn(rows, columns).bfloat16()


LAYOUTS = st.sampled_from(["rows", "columns", "part", "every second"])


@needs_kernel
@settings(max_examples=150)
@given(
    rows=st.integers(0, 300) | st.integers(500, 1600),
    depth=st.integers(0, 200) | st.integers(1000, 2500),
    columns=st.integers(0, 300),
    layouts=st.tuples(LAYOUTS, LAYOUTS),
)
def test_products_are_exact_to_fp32(
    rows: int, depth: int, columns: int, layouts: tuple[str, str]
) -> None:
    a, b = matrix(rows, depth, layouts[0]), matrix(depth, columns, layouts[1])
    result = native.matmul(a, b, dtype=torch.float32)
    assert result.shape == (rows, columns)
    assert result.dtype == torch.float32
    magnitude = a.double().abs() @ b.double().abs()
    assert (result - a.double() @ b.double()).norm() <= 1e-6 * magnitude.norm() + 1e-12
    assert torch.equal(native.matmul(a, b), result.bfloat16())


@needs_kernel
@settings(max_examples=100)
@given(
    sizes=st.tuples(st.integers(1, 20), st.integers(0, 1100), st.integers(1, 140)),
    bias_dtype=st.sampled_from([None, torch.float32, torch.bfloat16]),
    has_residual=st.booleans(),
    relu=st.booleans(),
)
def test_what_follows_the_product_is_rounded_with_it(
    sizes: tuple[int, int, int], bias_dtype: torch.dtype | None, has_residual: bool, relu: bool
) -> None:
    rows, depth, columns = sizes
    a, b = matrix(rows, depth, "rows"), matrix(depth, columns, "columns")
    bias = None if bias_dtype is None else torch.randn(columns, dtype=bias_dtype)
    residual = torch.randn(columns, rows).bfloat16().t() if has_residual else None
    result = native.matmul(a, b, bias=bias, residual=residual, relu=relu)
    expected = native.matmul(a, b, dtype=torch.float32)
    if bias is not None:
        expected = expected + bias
    if residual is not None:
        expected = expected + residual
    assert torch.equal(result, (expected.relu() if relu else expected).bfloat16())


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [2048, 2080, 2090])  # in whole tiles, whole cache lines, neither
def test_a_result_larger_than_the_caches_is_complete(width: int, dtype: torch.dtype) -> None:
    a, b = matrix(1100, 3, "columns"), matrix(3, width, "rows")
    result = native.matmul(a, b, dtype=dtype)
    torch.testing.assert_close(result.float(), a.float() @ b.float(), rtol=2**-8, atol=1e-6)


@needs_kernel
@pytest.mark.parametrize(
    "sizes", [(90, 700, 130), (1600, 1500, 70), (5, 64, 1000), (2100, 200, 70)]
)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_neither_threads_nor_other_rows_change_a_bit(
    sizes: tuple[int, int, int], layout: str
) -> None:
    rows, depth, columns = sizes
    a, b = matrix(rows, depth, layout), matrix(depth, columns, "rows")
    expected = native.matmul(a, b)
    assert torch.equal(native.matmul(a[3:], b), expected[3:])
    threads = torch.get_num_threads()
    try:
        for other in (1, 3, 64):  # which also changes how the rows are shared out
            torch.set_num_threads(other)
            assert torch.equal(native.matmul(a, b), expected)
    finally:
        torch.set_num_threads(threads)


@needs_kernel
@pytest.mark.parametrize("depth", [5, 6])
@pytest.mark.parametrize("layouts", [("rows", "rows"), ("columns", "columns")])
@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_reaches_its_row_and_column_alone(
    special: float, layouts: tuple[str, str], depth: int
) -> None:
    a, b = (
        torch.ones_like(matrix(*sizes))
        for sizes in ((9, depth, layouts[0]), (depth, 70, layouts[1]))
    )
    a[4, depth - 1] = special
    b[0, 69] = special
    result = native.matmul(a, b, relu=math.isnan(special))
    expected = torch.full((9, 70), float(depth))
    expected[4], expected[:, 69] = special, special
    torch.testing.assert_close(result.float(), expected, equal_nan=True)


@needs_kernel
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_nothing_beyond_the_operands_counts(layout: str) -> None:
    """The kernel reads numbers in pairs and rows in tiles: what lies behind them may be anything."""
    around = torch.full((20, 20), math.nan).bfloat16()
    a = around[2:13, 3:10] if layout == "rows" else around.t()[2:13, 3:10]
    b = around.clone()[1:8, 5:18] if layout == "rows" else around.clone().t()[1:8, 5:18]
    a.fill_(1), b.fill_(1)
    assert torch.equal(native.matmul(a, b), torch.full((11, 13), 7.0).bfloat16())


@needs_kernel
@pytest.mark.parametrize(
    "wrong",
    [
        {"b": torch.ones(4, 5).bfloat16()},
        {"a": torch.ones(2, 3)},
        {"b": torch.ones(3, 5)},
        {"bias": torch.ones(4)},
        {"bias": torch.ones(5).double()},
        {"residual": torch.ones(1, 5).bfloat16()},
        {"residual": torch.ones(2, 5)},
    ],
)
def test_operands_that_do_not_fit_are_refused(wrong: dict[str, torch.Tensor]) -> None:
    operands = {"a": torch.ones(2, 3).bfloat16(), "b": torch.ones(3, 5).bfloat16()} | wrong
    with pytest.raises(ValueError, match=r"where shape .* expected"):
        native.matmul(**operands)


def test_the_matrix_unit_comes_first() -> None:
    library = native._library()
    if native.has_matrix_unit():
        assert library is not None
        assert "matmul_amx" in library._name


@needs_kernel
def test_the_kernel_is_built_once(fresh_build: Path) -> None:
    assert native.matmul_available()
    (library,) = fresh_build.rglob("*.so")
    built = library.stat().st_mtime_ns
    native._library.cache_clear()  # as a new process begins
    assert native.matmul_available()
    assert library.stat().st_mtime_ns == built


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_without_a_compiler_the_product_is_made_by_pytorch(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert not native.matmul_available()
    with pytest.raises(RuntimeError, match="could not be built"):
        native.matmul(torch.randn(2, 2).bfloat16(), torch.randn(2, 2).bfloat16())
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
    assert native.matmul_available()
