"""Attention by its own kernels, and its unfolded backward: parity, counts, near misses, operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from passes import (
    CancelCasts,
    Canonicalize,
    InsertCasts,
    RouteAttention,
    SinkUpcasts,
    UnfoldAttentionBackward,
    native,
    native_attention,
)
from tests.passes.captured import Run, assert_bf16_parity, assert_parity, run

EXACT = (Canonicalize(), UnfoldAttentionBackward())
NAME = "unfold-attention-backward"


class Attention(nn.Module):
    """Multi-head self-attention with an optional mask; ``options`` go to PyTorch's attention."""

    def __init__(self, width: int = 32, heads: int = 4, **options: object) -> None:
        super().__init__()
        self.heads = heads
        self.options = options
        self.inward = nn.Linear(width, 3 * width)
        self.outward = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        split = self.inward(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, **self.options
        )
        return self.outward(mixed.transpose(1, 2).reshape(batch, length, width))


class CrossAttention(nn.Module):
    """Attention of one sequence to another, of another length."""

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(query, memory, memory * 2)


def padding(batch: int, length: int, hidden: int) -> Tensor:
    mask = torch.zeros(batch, 1, 1, length)
    mask[..., length - hidden :] = -torch.inf
    return mask


@pytest.mark.parametrize("causal", [False, True])
def test_parity(causal: bool) -> None:
    x = torch.randn(3, 17, 32, requires_grad=True)
    run = assert_parity(Attention(is_causal=causal), x, passes=EXACT)
    assert run.fired(NAME) == 1


@settings(max_examples=8)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    heads=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([None, 0.3]),
)
def test_parity_of_any_size(batch: int, length: int, heads: int, scale: float | None) -> None:
    torch._dynamo.reset()
    x = torch.randn(batch, length, 32, requires_grad=True)
    assert_parity(Attention(heads=heads, scale=scale), x, passes=EXACT)


@pytest.mark.parametrize("shape", [(3, 1, 1, 11), (1, 1, 11, 11), (3, 4, 11, 11), (11, 11)])
def test_additive_masks_of_any_rank(shape: tuple[int, ...]) -> None:
    x = torch.randn(3, 11, 32, requires_grad=True)
    assert assert_parity(Attention(), x, torch.randn(shape), passes=EXACT).fired(NAME) == 1


def test_padding() -> None:
    x = torch.randn(3, 11, 32, requires_grad=True)
    assert_parity(Attention(), x, padding(3, 11, hidden=4), passes=EXACT)


def test_rows_without_any_visible_key_have_no_gradient() -> None:
    x = torch.randn(2, 5, 32, requires_grad=True)
    model = Attention()
    compiled = torch.compile(model, backend="optcpu", options={"passes": EXACT})
    compiled(x, padding(2, 5, hidden=5)).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_cross_attention() -> None:
    query = torch.randn(2, 3, 7, 8, requires_grad=True)
    memory = torch.randn(2, 3, 13, 8, requires_grad=True)
    assert assert_parity(CrossAttention(), query, memory, passes=EXACT).fired(NAME) == 1


def test_bf16_error_is_that_of_autocast() -> None:
    batches = [(torch.randn(4, 24, 32, requires_grad=True),) for _ in range(4)]
    casts = (Canonicalize(), InsertCasts(), SinkUpcasts(), CancelCasts())
    run = assert_bf16_parity(
        Attention(is_causal=True), batches, (*casts, UnfoldAttentionBackward())
    )
    assert run.fired(NAME) == 1


def test_every_attention_is_counted() -> None:
    x = torch.randn(2, 9, 32, requires_grad=True)
    run = assert_parity(nn.Sequential(Attention(), Attention()), x, passes=EXACT)
    assert run.fired(NAME) == 2


def test_large_scores_are_left_to_flash() -> None:
    x = torch.randn(3, 17, 32, requires_grad=True)
    scores = 4 * 3 * 4 * 17 * 17
    for limit, expected in ((scores, 1), (scores - 1, 0)):
        torch._dynamo.reset()
        passes = (Canonicalize(), UnfoldAttentionBackward(largest_scores=limit))
        assert assert_parity(Attention(), x, passes=passes).fired(NAME) == expected


def test_symbolic_sizes_are_left_to_flash() -> None:
    x = torch.randn(3, 17, 32, requires_grad=True)
    assert assert_parity(Attention(), x, passes=EXACT, dynamic=True).fired(NAME) == 0


def test_nothing_to_do_without_gradients() -> None:
    model = Attention().requires_grad_(False)
    assert assert_parity(model, torch.randn(3, 17, 32), passes=EXACT).fired(NAME) == 0


def test_operators() -> None:
    x = torch.randn(2, 6, 32, requires_grad=True)
    run = assert_parity(Attention(is_causal=True), x, passes=EXACT)
    backward = run.operators("backward")
    assert [name for name in backward if "attention" in name] == []
    interesting = ("aten.bmm", "aten.exp", "aten.where.self", "aten.sum.dim_IntList")
    begin, end = backward.index("aten.bmm"), len(backward) - backward[::-1].index("aten.bmm")
    assert [name for name in backward[begin:end] if name in interesting] == [
        "aten.bmm",  # scores
        "aten.where.self",  # causal mask
        "aten.where.self",  # rows without visible keys
        "aten.exp",  # probabilities
        "aten.bmm",  # gradient of the values
        "aten.bmm",  # gradient of the probabilities
        "aten.sum.dim_IntList",
        "aten.bmm",  # gradient of the queries
        "aten.bmm",  # gradient of the keys
    ]


CASTS = (Canonicalize(), InsertCasts(), SinkUpcasts(), CancelCasts())
ROUTED = (*CASTS, RouteAttention(needs_matrix_unit=False), UnfoldAttentionBackward())
ROUTE = "route-attention"

needs_kernel = pytest.mark.skipif(
    not native_attention.available(), reason="the kernels for attention do not run here"
)


def routed(model: nn.Module, *inputs: Tensor, dynamic: bool | None = None) -> Run:
    torch._dynamo.reset()
    return run(model, *inputs, passes=ROUTED, dynamic=dynamic)


@needs_kernel
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [24, 130])
def test_routed_error_is_that_of_autocast(causal: bool, length: int) -> None:
    batches = [(torch.randn(4, length, 64, requires_grad=True),) for _ in range(4)]
    result = assert_bf16_parity(Attention(width=64, is_causal=causal), batches, ROUTED)
    assert result.fired(ROUTE) == 2  # forward and backward
    assert result.fired(NAME) == 0


@needs_kernel
@pytest.mark.parametrize("shape", [(3, 1, 1, 11), (1, 1, 11, 11), (3, 4, 11, 11), (11, 11)])
def test_routed_masks_of_any_rank(shape: tuple[int, ...]) -> None:
    mask = torch.randn(shape)
    batches = [(torch.randn(3, 11, 64, requires_grad=True), mask) for _ in range(4)]
    assert assert_bf16_parity(Attention(width=64), batches, ROUTED).fired(ROUTE) == 2


@needs_kernel
def test_routed_cross_attention_with_a_scale() -> None:
    class Scaled(nn.Module):
        def forward(self, query: Tensor, memory: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(query, memory, memory * 2, scale=-0.1)

    batches = [
        (
            torch.randn(2, 3, 17, 16, requires_grad=True),
            torch.randn(2, 3, 13, 16, requires_grad=True),
        )
        for _ in range(4)
    ]
    assert assert_bf16_parity(Scaled(), batches, ROUTED).fired(ROUTE) == 2


@needs_kernel
def test_routed_symbolic_sizes() -> None:
    x = torch.randn(3, 17, 64, requires_grad=True)
    assert routed(Attention(width=64), x, dynamic=True).fired(ROUTE) == 2


@needs_kernel
def test_inference_is_routed() -> None:
    model = Attention(width=64).requires_grad_(False)
    assert routed(model, torch.randn(3, 17, 64)).fired(ROUTE) == 1


@needs_kernel
def test_every_attention_is_routed() -> None:
    x = torch.randn(2, 9, 64, requires_grad=True)
    model = nn.Sequential(Attention(width=64), Attention(width=64))
    assert routed(model, x).fired(ROUTE) == 4


@needs_kernel
@pytest.mark.parametrize(
    "model",
    [
        Attention(width=32, heads=4),  # 8 numbers a head
        Attention(width=64, dropout_p=0.1),
    ],
)
def test_left_to_other_kernels(model: nn.Module) -> None:
    x = torch.randn(3, 17, model.inward.in_features, requires_grad=True)  # type: ignore[union-attr]
    assert routed(model, x).fired(ROUTE) == 0


@needs_kernel
def test_fewer_heads_than_threads_are_left_to_other_kernels() -> None:
    x = torch.randn(1, 17, 64, requires_grad=True)
    assert routed(Attention(width=64, heads=1), x).fired(ROUTE) == 0


def test_fp32_is_not_routed() -> None:
    x = torch.randn(2, 9, 64, requires_grad=True)
    passes = (Canonicalize(), RouteAttention(needs_matrix_unit=False))
    assert assert_parity(Attention(width=64), x, passes=passes).fired(ROUTE) == 0


def test_nothing_is_routed_without_a_matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has_matrix_unit", lambda: False)
    x = torch.randn(2, 9, 64, requires_grad=True)
    result = run(Attention(width=64), x, passes=(*CASTS, RouteAttention()))
    assert result.fired(ROUTE) == 0


@needs_kernel
def test_routed_operators() -> None:
    x = torch.randn(2, 6, 64, requires_grad=True)
    result = routed(Attention(width=64, is_causal=True), x)
    forward, backward = result.operators("forward"), result.operators("backward")
    assert [name for name in forward if "attention" in name] == ["optcpu.attention"]
    assert [name for name in backward if "attention" in name] == ["optcpu.attention_backward"]
    assert "aten.bmm" not in backward
