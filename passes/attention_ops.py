"""Attention and its backward as operators that passes rewrite to; see :mod:`passes.ops`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from passes import native_attention
from passes.native_attention import empty_by_rows, empty_results

_LIBRARY = torch.library.Library("optcpu", "FRAGMENT")
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)

_LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scale) "
    "-> (Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(
    "attention_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor output, "
    "Tensor logsumexp, Tensor? mask, bool causal, float scale) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


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


# What the operators do, by their names in ``torch.ops.optcpu``.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "attention": _attention,
    "attention_backward": _attention_backward,
}
for _name, _implementation in IMPLEMENTATIONS.items():
    _LIBRARY.impl(_name, _implementation, "CPU")
torch.library.register_fake("optcpu::attention", _fake_attention, lib=_LIBRARY)
torch.library.register_fake("optcpu::attention_backward", _fake_attention_backward, lib=_LIBRARY)

attention = torch.ops.optcpu.attention.default
attention_backward = torch.ops.optcpu.attention_backward.default
