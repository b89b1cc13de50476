"""Attention and its backward as operators that passes rewrite to; see :mod:`passes.ops`."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from passes import native_attention
from passes.native_attention import empty_by_rows, empty_results
from passes.operators import COMPILED_AS_LAID_OUT, define


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """:func:`passes.native_attention.attention`, or PyTorch's where that is not available."""
    if native_attention.available():
        return native_attention.attention(query, key, value, mask, causal, scale)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    results = flash(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    return cast(tuple[Tensor, Tensor], results)


def _attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`passes.native_attention.attention_backward`, or PyTorch's where that is not available."""
    if native_attention.available():
        return native_attention.attention_backward(
            gradient, query, key, value, output, logsumexp, mask, causal, scale
        )
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    given = (gradient, query, key, value, output, logsumexp, 0.0, causal)
    return cast(tuple[Tensor, Tensor, Tensor], flash(*given, attn_mask=mask, scale=scale))


def _fake_attention(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return empty_results(query)


def _fake_attention_backward(
    _gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_by_rows(query), empty_by_rows(key), empty_by_rows(value)


attention = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scale) "
    "-> (Tensor, Tensor)",
    _attention,
    _fake_attention,
    COMPILED_AS_LAID_OUT,
)
attention_backward = define(
    "attention_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor output, "
    "Tensor logsumexp, Tensor? mask, bool causal, float scale) -> (Tensor, Tensor, Tensor)",
    _attention_backward,
    _fake_attention_backward,
    COMPILED_AS_LAID_OUT,
)
