"""Attention by kernels of our own, or its backward as batched products where there are none.

PyTorch's flash backward for CPU works through small tiles one by one and takes about six times as long
as plain batched GEMMs while the matrix of scores still fits into the caches.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from passes import attention_ops, native, native_attention
from passes.base import Pass, Stage
from passes.graph import aten, calls, cast, dtype, emit, likely_size, same_size, value

_FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True, repr=False)
class RouteAttention(Pass):
    """Compute attention in BF16, and its backward, by kernels that keep the scores in the caches.

    Before::

        o, lse = flash(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
        dq, dk, dv = flash_backward(do, q, k, v, o, lse, 0.0, is_causal, attn_mask=mask, scale=scale)

    After::

        o, lse = optcpu.attention(q, k, v, mask, is_causal, scale)
        dq, dk, dv = optcpu.attention_backward(do, q, k, v, o, lse, mask, is_causal, scale)

    Left alone are: dropout, boolean masks, grouped heads, widths of heads that are not multiples of 16
    up to 256, and fewer heads in a batch than there are threads, each of which takes whole heads.
    Fires once for each operator.

    Args:
        needs_matrix_unit: do nothing where there is none (AMX): without one PyTorch's libraries are faster.
    """

    needs_matrix_unit: bool = True
    stage: ClassVar[Stage] = "split"

    def __call__(self, graph: fx.Graph) -> int:
        if self.needs_matrix_unit and not native.has_matrix_unit():
            return 0
        fired = 0
        for node in calls(graph, _FLASH, _FLASH_BACKWARD):
            if _has_own_kernel(node):
                _route(node)
                fired += 1
        return fired


def _has_own_kernel(node: fx.Node) -> bool:
    is_forward = node.target is _FLASH
    query, key, val = node.args[:3] if is_forward else node.args[1:4]
    dropout = node.args[3 if is_forward else 6] if len(node.args) > 3 else 0
    if dropout != 0 or dtype(node.kwargs.get("attn_mask")) == torch.bool:
        return False
    if any(dtype(tensor) != torch.bfloat16 for tensor in (query, key, val)):
        return False
    batch, heads, _, width = value(query).shape
    if not same_size(heads, value(key).shape[1]) or value(val).shape[3] != width:
        return False
    has_heads_for_all = likely_size(batch) * likely_size(heads) >= torch.get_num_threads()
    fits = isinstance(width, int) and width in native_attention.WIDTHS
    return fits and has_heads_for_all and native_attention.available()


def _route(node: fx.Node) -> None:
    is_forward = node.target is _FLASH
    tensors = node.args[: 3 if is_forward else 6]
    causal = node.args[4:5] if is_forward else node.args[7:8]
    scale = node.kwargs.get("scale")
    if scale is None:
        scale = 1 / math.sqrt(value(tensors[-1] if is_forward else tensors[1]).shape[-1])
    target = attention_ops.attention if is_forward else attention_ops.attention_backward
    mask = node.kwargs.get("attn_mask")
    with node.graph.inserting_before(node):
        routed = emit(node, target, *tensors, mask, bool(causal and causal[0]), scale)
    node.replace_all_uses_with(routed)
    node.graph.erase_node(node)


@dataclass(frozen=True, repr=False)
class UnfoldAttentionBackward(Pass):
    """Write the flash backward out as batched products where the scores are small.

    Before::

        dq, dk, dv = flash_backward(do, q, k, v, o, lse, 0.0, is_causal)

    After (P is recomputed from the saved log-sum-exp, so nothing more is kept from the forward)::

        P = exp(scale * q k^T + mask - lse);  dv = P^T do;  dP = do v^T
        dS = scale * P * (dP - rowsum(do * o));  dq = dS k;  dk = dS^T q

    Left alone are: dropout, boolean masks, grouped heads, symbolic sizes, and score matrices over
    ``largest_scores`` bytes. Fires once for each attention.

    Source: FlashAttention (arXiv 2205.14135), appendix B.2.

    Args:
        largest_scores: size limit of batch x heads x queries x keys FP32 scores, in bytes.
    """

    largest_scores: int = 64 * 2**20
    stage: ClassVar[Stage] = "split"

    def __call__(self, graph: fx.Graph) -> int:
        fired = 0
        for node in calls(graph, _FLASH_BACKWARD):
            if self._fits(node):
                _unfold(node)
                fired += 1
        graph.eliminate_dead_code()
        return fired

    def _fits(self, node: fx.Node) -> bool:
        query, key = value(node.args[1]), value(node.args[2])
        dropout = node.args[6]
        mask = node.kwargs.get("attn_mask")
        sizes = (*query.shape, *key.shape)
        if dropout != 0 or dtype(mask) == torch.bool or not all(isinstance(s, int) for s in sizes):
            return False
        batch, heads, queries, _ = query.shape
        scores = 4 * batch * heads * queries * key.shape[2]
        return bool(key.shape[1] == heads and scores <= self.largest_scores)


def _unfold(node: fx.Node) -> None:
    graph = node.graph
    gradient, query, key, val, output, logsumexp = node.args[:6]
    causal = bool(node.args[7])
    width = value(query).shape[-1]
    scale = node.kwargs.get("scale")
    scale = 1 / math.sqrt(width) if scale is None else scale

    def call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return emit(node, target, *args, **kwargs)

    with graph.inserting_before(node):
        batches = [_batch(node, tensor) for tensor in (gradient, query, key, val, output)]
        d_out, q, k, v, out = batches
        narrow = dtype(q) or torch.float32
        scores = call(
            aten.mul.Tensor, _fp32(node, call(aten.bmm.default, q, _turned(node, k))), scale
        )
        scores = _masked(node, scores, causal)
        rows = list(value(logsumexp).shape)
        lse = call(aten.clone.default, logsumexp, memory_format=torch.contiguous_format)
        lse = call(aten.view.default, lse, [rows[0] * rows[1], rows[2], 1])
        # A row whose keys are all masked has no probability at all, rather than exp(inf - inf).
        empty = call(aten.eq.Scalar, lse, -math.inf)
        zero = call(aten.full.default, [], 0.0, dtype=torch.float32, device=torch.device("cpu"))
        lse = call(aten.where.self, empty, zero, lse)
        probabilities = call(aten.exp.default, call(aten.sub.Tensor, scores, lse))
        p = cast(node, probabilities, narrow)
        d_value = call(aten.bmm.default, _turned(node, p), d_out)
        d_p = _fp32(node, call(aten.bmm.default, d_out, _turned(node, v)))
        both = call(aten.mul.Tensor, _fp32(node, d_out), _fp32(node, out))
        row_sums = call(aten.sum.dim_IntList, both, [-1], True)
        d_scores = call(aten.mul.Tensor, probabilities, call(aten.sub.Tensor, d_p, row_sums))
        d_s = cast(node, call(aten.mul.Tensor, d_scores, scale), narrow)
        d_query = call(aten.bmm.default, d_s, k)
        d_key = call(aten.bmm.default, _turned(node, d_s), q)
        results = {0: d_query, 1: d_key, 2: d_value}
        shapes = {i: list(value(tensor).shape) for i, tensor in enumerate((query, key, val))}
        whole = {i: call(aten.view.default, r, shapes[i]) for i, r in results.items()}
    for item in list(node.users):
        assert item.target is operator.getitem
        item.replace_all_uses_with(whole[item.args[1]])  # type: ignore[index]
        graph.erase_node(item)
    graph.erase_node(node)


def _batch(node: fx.Node, tensor: Any) -> fx.Node:
    """``(batch, heads, length, width)`` as a contiguous ``(batch * heads, length, width)``."""
    batch, heads, length, width = value(tensor).shape
    if not value(tensor).is_contiguous():
        tensor = emit(node, aten.clone.default, tensor, memory_format=torch.contiguous_format)
    return emit(node, aten.view.default, tensor, [batch * heads, length, width])


def _turned(node: fx.Node, tensor: fx.Node) -> fx.Node:
    return emit(node, aten.permute.default, tensor, [0, 2, 1])


def _fp32(node: fx.Node, tensor: fx.Node) -> fx.Node:
    return cast(node, tensor, torch.float32)


def _masked(node: fx.Node, scores: fx.Node, causal: bool) -> fx.Node:
    """The scores with what may not be seen at minus infinity."""
    query, key = value(node.args[1]), value(node.args[2])
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if causal:
        rows = _positions(node, queries, [queries, 1])
        columns = _positions(node, keys, [1, keys])
        visible = emit(node, aten.le.Tensor, columns, rows)
        hidden = emit(
            node, aten.full.default, [], -math.inf, dtype=torch.float32, device=torch.device("cpu")
        )
        scores = emit(node, aten.where.self, visible, scores, hidden)
    mask = node.kwargs.get("attn_mask")
    if isinstance(mask, fx.Node):
        rank = value(mask).dim()
        shape = [1] * (4 - rank) + list(value(mask).shape)
        mask = emit(node, aten.reshape.default, mask, shape)
        mask = emit(node, aten.expand.default, mask, [batch, heads, queries, keys])
        split = emit(node, aten.view.default, scores, [batch, heads, queries, keys])
        split = emit(node, aten.add.Tensor, split, _fp32(node, mask))
        scores = emit(node, aten.view.default, split, [batch * heads, queries, keys])
    return scores


def _positions(node: fx.Node, length: int, shape: list[int]) -> fx.Node:
    positions = emit(
        node,
        torch.ops.prims.iota.default,
        length,
        start=0,
        step=1,
        dtype=torch.int64,
        device=torch.device("cpu"),
        requires_grad=False,
    )
    return emit(node, aten.view.default, positions, shape)
