"""The kernels for attention against the definition in FP64, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from passes import attention_ops, native_attention

BF16 = torch.bfloat16
SCALE = 0.2

needs_kernel = pytest.mark.skipif(
    not native_attention.available(), reason="the kernels do not run here"
)


def tensor(batch: int, heads: int, length: int, width: int, layout: str = "rows") -> Tensor:
    """Random numbers in one of the layouts that models have."""
    if layout == "parts":  # of one product for queries, keys and values
        whole = torch.randn(batch, length, 3 * heads * width).to(BF16)
        return (
            whole[..., heads * width : 2 * heads * width]
            .view(batch, length, heads, width)
            .transpose(1, 2)
        )
    if layout == "columns":
        return torch.randn(batch, heads, width, length).to(BF16).transpose(2, 3)
    if layout == "repeated":
        return torch.randn(batch, 1, length, width).to(BF16).expand(batch, heads, length, width)
    return torch.randn(batch, heads, length, width).to(BF16)


def definition(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, gradient: Tensor
) -> tuple[Tensor, ...]:
    """Output, log-sum-exp and the three gradients in FP64."""
    query, key, value = (t.detach().double().requires_grad_() for t in (query, key, value))
    scores = _scores(query, key, mask, causal)
    output = torch.softmax(scores, -1).nan_to_num(0.0) @ value
    output.backward(gradient.double())  # type: ignore[no-untyped-call]
    gradients = [t.grad for t in (query, key, value) if t.grad is not None]
    return output.detach(), scores.detach().logsumexp(-1), *gradients


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    scores = SCALE * query @ key.transpose(2, 3)
    if mask is not None:
        scores = scores + mask.double()
    if causal:
        visible = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    return scores


def magnitudes(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, gradient: Tensor
) -> tuple[Tensor, ...]:
    """What :func:`definition` would give if nothing cancelled: rounding errors are a part of these."""
    query, key, value, gradient = (t.double() for t in (query, key, value, gradient))
    p = torch.softmax(_scores(query, key, mask, causal), -1).nan_to_num(0.0)
    output = p @ value.abs()
    d_p = gradient.abs() @ value.abs().transpose(2, 3)
    d_scores = SCALE * p * (d_p + (gradient.abs() * output).sum(-1, keepdim=True))
    d_query, d_key = d_scores @ key.abs(), d_scores.transpose(2, 3) @ query.abs()
    return (
        output,
        torch.ones_like(output[..., 0]),
        d_query,
        d_key,
        p.transpose(2, 3) @ gradient.abs(),
    )


def computed(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, gradient: Tensor
) -> tuple[Tensor, ...]:
    output, logsumexp = native_attention.attention(query, key, value, mask, causal, SCALE)
    gradients = native_attention.attention_backward(
        gradient, query, key, value, output, logsumexp, mask, causal, SCALE
    )
    return output, logsumexp, *gradients


def assert_close(results: tuple[Tensor, ...], *given: Any) -> None:
    """BF16 has 8 bits, and what is rounded to it is rounded to nearest, at most twice in a row."""
    for name, result, reference, magnitude in zip(
        ("output", "logsumexp", "query", "key", "value"),
        results,
        definition(*given),
        magnitudes(*given),
        strict=True,
    ):
        assert result.shape == reference.shape
        seen = torch.isfinite(reference)  # no log-sum-exp where no key is seen
        assert torch.equal(torch.isfinite(result), seen), name
        rounding = 2**-20 if name == "logsumexp" else 2**-8
        assert (result - reference)[seen].norm() <= rounding * magnitude.norm(), name


LAYOUTS = st.sampled_from(["rows", "parts", "columns", "repeated"])


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    queries=st.integers(1, 80) | st.sampled_from([127, 128, 129, 300]),
    keys=st.integers(1, 80) | st.sampled_from([255, 256, 257, 600]),
    width=st.sampled_from([16, 32, 48, 64, 80, 128, 256]),
    causal=st.booleans(),
    mask=st.sampled_from([None, "keys", "scores", "heads", "narrow", "one"]),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS, LAYOUTS),
)
def test_any_shape(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    width: int,
    causal: bool,
    mask: str | None,
    layouts: tuple[str, str, str, str],
) -> None:
    lengths = (queries, keys, keys, queries)
    query, key, value, gradient = (
        tensor(batch, heads, length, width, layout)
        for length, layout in zip(lengths, layouts, strict=True)
    )
    masks = {
        None: None,
        "keys": torch.randn(batch, 1, 1, keys),
        "scores": torch.randn(batch, 1, queries, keys),
        "heads": torch.randn(heads, keys, queries).transpose(1, 2),
        "narrow": torch.randn(queries, keys).to(BF16),
        "one": torch.randn(1, 1, queries, 1),
    }
    given = (query, key, value, masks[mask], causal, gradient)
    assert_close(computed(*given), *given)


@needs_kernel
@pytest.mark.parametrize("layout", ["rows", "parts", "repeated"])
def test_results_are_laid_out_as_those_of_pytorch(layout: str) -> None:
    query, key = tensor(2, 3, 20, 32, layout), tensor(2, 3, 7, 32, layout)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    ours = native_attention.attention(query, key, key, None, False, SCALE)
    given = (query, query, key, key, *ours)
    gradients = native_attention.attention_backward(*given, None, False, SCALE)
    with FakeTensorMode() as mode:  # which decides what generated code expects
        query, key = mode.from_tensor(query), mode.from_tensor(key)
        theirs = flash(query, key, key)
        expected = backward(query, query, key, key, *theirs, 0.0, False)
    for result, reference in zip((*ours, *gradients), (*theirs, *expected), strict=True):
        assert result.stride() == reference.stride()
        assert result.dtype == reference.dtype


@needs_kernel
def test_padding() -> None:
    query, key, value, gradient = (tensor(2, 2, 5, 16) for _ in range(4))
    mask = torch.zeros(2, 1, 1, 5)
    mask[..., 2:] = -math.inf
    given = (query, key, value, mask, False, gradient)
    results = computed(*given)
    assert_close(results, *given)
    for of_keys in results[3:]:
        assert (of_keys[:, :, 2:] == 0).all()


@needs_kernel
def test_queries_that_see_no_key() -> None:
    query, key, value, gradient = (tensor(2, 2, 5, 16) for _ in range(4))
    mask = torch.full((2, 1, 1, 5), -math.inf)
    output, logsumexp, *gradients = computed(query, key, value, mask, False, gradient)
    assert (logsumexp == -math.inf).all()
    assert all((result == 0).all() for result in (output, *gradients))


@needs_kernel
def test_the_least_number_as_a_mask() -> None:
    """Models mask with it; a query that sees no key weighs all of them alike, as PyTorch has it."""
    query, key, value = (tensor(2, 2, 5, 16) for _ in range(3))
    mask = torch.full((2, 1, 5, 5), torch.finfo(torch.float32).min)
    mask[0] = mask[0].triu(1)  # of the second sequence all is padding
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    expected = flash(query, key, value, attn_mask=mask, scale=SCALE)
    results = native_attention.attention(query, key, value, mask, False, SCALE)
    torch.testing.assert_close(results, expected, rtol=1e-2, atol=1e-2)
    average = value[1].float().mean(1, keepdim=True).expand_as(value[1])
    torch.testing.assert_close(results[0][1].float(), average, rtol=1e-2, atol=1e-2)


@needs_kernel
def test_no_keys_at_all() -> None:
    query, key = tensor(1, 2, 3, 16), tensor(1, 2, 0, 16)
    output, logsumexp, d_query, d_key, _ = computed(query, key, key, None, False, query)
    assert (output == 0).all()
    assert (logsumexp == -math.inf).all()
    assert (d_query == 0).all()
    assert d_key.shape == key.shape


@needs_kernel
@pytest.mark.parametrize("which", range(4))
def test_strides_of_a_single_row_mean_nothing(which: int) -> None:
    tensors = [tensor(3, 4, 1, 64) for _ in range(4)]
    row = torch.randn(4, 3, 64).to(BF16)  # strides (64, 192, 1, 1), as of a transposed row
    tensors[which] = row.unsqueeze(-1).permute(1, 0, 3, 2)
    mask = torch.zeros(())
    query, key, value, gradient = tensors
    result = computed(query, key, value, mask, False, gradient)
    assert torch.equal(result[0], value)
    assert_close(result, query, key, value, mask, False, gradient)


@needs_kernel
def test_the_kernels_are_found_while_a_graph_is_compiled() -> None:
    native_attention._library.cache_clear()
    with FakeTensorMode():
        assert native_attention.available()


@needs_kernel
def test_what_fails_in_a_kernel_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    call, query = native_attention._call, tensor(1, 2, 3, 16)

    def without_memory(library: Any, kernel: str, head: Any, *others: Any) -> str | None:
        batch, heads, queries, _, *rest = head
        return call(library, kernel, (batch, heads, queries, 2**44, *rest), *others)

    monkeypatch.setattr(native_attention, "_call", without_memory)  # no memory has so many keys
    with pytest.raises(RuntimeError, match=r"attention in BF16 failed: .*memory"):
        native_attention.attention(query, query, query, None, False, SCALE)


@needs_kernel
def test_large_scores() -> None:
    query, key, value, gradient = (tensor(1, 1, 40, 16) for _ in range(4))
    given = (query * 300, key, value, None, False, gradient)
    output, logsumexp, *gradients = computed(*given)
    expected = definition(*given)
    assert torch.allclose(logsumexp.double(), expected[1], rtol=1e-5)
    assert torch.allclose(output.double(), expected[0], rtol=1e-2, atol=1e-2)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@needs_kernel
@pytest.mark.parametrize("place", ["query", "key", "value", "gradient"])
def test_what_is_no_number_shows(place: str) -> None:
    tensors = {name: tensor(1, 2, 70, 32) for name in ("query", "key", "value", "gradient")}
    tensors[place][0, 1, 3, 5] = math.nan
    query, key, value, gradient = tensors.values()
    output, _, *gradients = computed(query, key, value, None, False, gradient)
    assert any(torch.isnan(result[0, 1]).any() for result in (output, *gradients))
    assert not any(torch.isnan(result[0, 0]).any() for result in (output, *gradients))


@needs_kernel
def test_bits_do_not_depend_on_threads() -> None:
    query, key, value, gradient = (tensor(2, 3, 130, 64) for _ in range(4))
    given = (query, key, value, None, True, gradient)
    several, threads = computed(*given), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = computed(*given)
    finally:
        torch.set_num_threads(threads)
    alone = computed(*(t[1:, 2:] if isinstance(t, Tensor) else t for t in given))  # type: ignore[arg-type]
    for a, b, c in zip(several, one, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[1:, 2:], c)


@needs_kernel
@pytest.mark.parametrize(
    "tensors",
    [
        (tensor(1, 2, 3, 24), tensor(1, 2, 3, 24), tensor(1, 2, 3, 24)),  # no multiple of 16
        (tensor(1, 2, 3, 272), tensor(1, 2, 3, 272), tensor(1, 2, 3, 272)),
        (tensor(1, 2, 3, 16), tensor(1, 1, 3, 16), tensor(1, 1, 3, 16)),  # grouped heads
        (tensor(1, 2, 3, 16), tensor(1, 2, 4, 16), tensor(1, 2, 3, 16)),
        (tensor(1, 2, 3, 16).float(), tensor(1, 2, 3, 16), tensor(1, 2, 3, 16)),
    ],
)
def test_what_does_not_fit_is_refused(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="query, key and value must be BF16"):
        native_attention.attention(*tensors, None, False, SCALE)


@needs_kernel
def test_a_log_sum_exp_that_does_not_fit_is_refused() -> None:
    query = tensor(1, 2, 3, 16)
    with pytest.raises(ValueError, match="the log-sum-exp is"):
        native_attention.attention_backward(
            query, query, query, query, query, query[..., 0], None, False, SCALE
        )


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no compiler"))
    native_attention._library.cache_clear()
    yield
    native_attention._library.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_operators_are_those_of_pytorch() -> None:
    assert not native_attention.available()
    query, key, value, gradient = (tensor(1, 2, 9, 16) for _ in range(4))
    with pytest.raises(RuntimeError, match="cannot be built or run"):
        native_attention.attention(query, key, value, None, False, SCALE)
    mask = torch.randn(1, 1, 9, 9)
    results = attention_ops.attention(query, key, value, mask, False, SCALE)
    gradients = attention_ops.attention_backward(
        gradient, query, key, value, *results, mask, False, SCALE
    )
    assert_close((*results, *gradients), query, key, value, mask, False, gradient)


@needs_kernel
def test_operators() -> None:
    query, key, value = (tensor(1, 2, 9, 16) for _ in range(3))
    mask = torch.randn(1, 1, 9, 9)
    results = attention_ops.attention(query, key, value, mask, True, SCALE)
    given = (query, query, key, value, *results, mask, True, SCALE)
    torch.library.opcheck(attention_ops.attention, (query, key, value, mask, True, SCALE))
    torch.library.opcheck(attention_ops.attention_backward, given)
