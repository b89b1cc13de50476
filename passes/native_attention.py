"""Attention and its backward on BF16 as C++ kernels, which PyTorch's own do not reach at usual lengths.

PyTorch's backward works through small tiles one by one, and batched products write all scores to memory.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from passes.build import load

WIDTHS = range(16, 257, 16)  # of heads, whose rows are read in whole vectors


def available() -> bool:
    """Whether the kernels can run here; builds them if need be."""
    return _library() is not None


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * query @ key.T + mask) @ value`` of each head.

    The bits do not depend on the number of threads, nor those of a head on the other heads.

    Args:
        query: shape (batch, heads, queries, width), BF16; any strides. The width is one of :data:`WIDTHS`.
        key: shape (batch, heads, keys, width), BF16.
        value: of the key's shape, BF16.
        mask: added to the scores, FP32 or BF16; a shape that expands to (batch, heads, queries, keys).
        causal: whether query i sees only the keys up to i.
        scale: of the scores.

    Returns:
        The output, of the query's shape and order in memory, BF16; zero for a query that sees no key. The
        log-sum-exp of the scores, (batch, heads, queries), FP32, in memory as (batch, queries, heads).

    Raises:
        RuntimeError: the kernels are not available.
        ValueError: shapes or dtypes do not fit each other.
    """
    _check(query, key, value)
    output, logsumexp = empty_results(query)
    _run("attention", (query, key, value, output), mask, logsumexp, causal, scale)
    return output, logsumexp


def attention_backward(
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
    """The gradients of query, key and value of :func:`attention`.

    Args:
        gradient: of the output, of its shape, BF16; any strides.
        query, key, value, mask, causal, scale: as in :func:`attention`.
        output, logsumexp: what that returned.

    Returns:
        BF16, of the shapes of query, key and value, in memory as (batch, length, heads, width).

    Raises:
        RuntimeError: the kernels are not available.
        ValueError: shapes or dtypes do not fit each other.
    """
    _check(query, key, value, gradient, output)
    if logsumexp.shape != query.shape[:3] or logsumexp.dtype != torch.float32:
        raise ValueError(
            f"the log-sum-exp is {logsumexp.dtype} of shape {tuple(logsumexp.shape)}, where FP32 of shape "
            f"{tuple(query.shape[:3])} is expected"
        )
    gradients = empty_by_rows(query), empty_by_rows(key), empty_by_rows(value)
    tensors = (query, key, value, output, gradient, *gradients)
    _run("attention_backward", tensors, mask, logsumexp, causal, scale)
    return gradients


def empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for what :func:`attention` returns, laid out as PyTorch does for its flash attention."""
    batch, heads, length, _ = query.shape
    logsumexp = query.new_empty(batch, length, heads, dtype=torch.float32).transpose(1, 2)
    output = torch.empty_like(query)
    return output if output.stride(3) == 1 else empty_by_rows(query), logsumexp


def empty_by_rows(like: Tensor) -> Tensor:
    """Memory for a tensor like (batch, heads, length, width), laid out as (batch, length, heads, width)."""
    batch, heads, length, width = like.shape
    return like.new_empty(batch, length, heads, width).transpose(1, 2)


def _has_rows(tensor: Tensor) -> bool:
    """Whether rows are contiguous, one behind the other."""
    return tensor.stride(3) == 1 and tensor.stride(2) >= tensor.shape[3]


def _check(query: Tensor, key: Tensor, value: Tensor, *like_query: Tensor) -> None:
    """The kernel would read whatever lies where the numbers should."""
    batch, heads, _, width = query.shape
    fits = key.shape == value.shape == (batch, heads, key.shape[2], width) and width in WIDTHS
    fits &= all(tensor.shape == query.shape for tensor in like_query)
    tensors = (query, key, value, *like_query)
    if not fits or any(tensor.dtype != torch.bfloat16 for tensor in tensors):
        given = ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in tensors)
        raise ValueError(
            "query, key and value must be BF16 with as many heads, of one width that is a multiple of "
            f"{WIDTHS.step} up to {WIDTHS[-1]}; they and what goes with them are {given}"
        )


# What a kernel reads (the struct Call in its source): sizes, whether causal, and the scale; of mask and
# log-sum-exp the address and strides; of tensors the address and the distances of batches, heads and rows.
_HEAD, _TABLE, _TENSOR = "6qd", "5q", "4q"
_NO_TABLE = (0, 0, 0, 0, 0)


def _run(
    kernel: str,
    tensors: Sequence[Tensor],
    mask: Tensor | None,
    logsumexp: Tensor,
    causal: bool,
    scale: float,
) -> None:
    """Call ``kernel`` with what it reads and writes: query, key, value, output, and so on."""
    library = _library()
    if library is None:
        raise RuntimeError(
            "the kernels for attention in BF16 cannot be built or run on this machine"
        )
    _call(library, kernel, tensors, mask, logsumexp, causal, scale)


def _call(
    library: ctypes.CDLL,
    kernel: str,
    tensors: Sequence[Tensor],
    mask: Tensor | None,
    logsumexp: Tensor,
    causal: bool,
    scale: float,
) -> bool:
    tensors = [tensor if _has_rows(tensor) else tensor.contiguous() for tensor in tensors]
    (batch, heads, queries, width), keys = tensors[0].shape, tensors[1].shape[2]
    numbers: list[float] = [batch, heads, queries, keys, width, causal, scale]
    if mask is None:
        numbers += _NO_TABLE
    else:
        mask = mask.float().expand(batch, heads, queries, keys)
        numbers += (mask.data_ptr(), *mask.stride())
    numbers += (logsumexp.data_ptr(), *logsumexp.stride(), 0)
    for tensor in tensors:
        numbers += (tensor.data_ptr(), *tensor.stride()[:3])
    layout = _HEAD + 2 * _TABLE + len(tensors) * _TENSOR
    return bool(getattr(library, kernel)(struct.pack(layout, *numbers)))


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be built, or run for want of BF16 or of oneDNN."""
    if not torch.cpu._is_avx512_bf16_supported() or not torch.backends.mkldnn.is_available():
        return None
    library = load(Path(__file__).parent / "kernels" / "attention.cpp")
    one = torch.zeros(1, 1, 1, WIDTHS[0], dtype=torch.bfloat16)
    runs = library is not None and _call(
        library, "attention", (one, one, one, one.clone()), None, torch.zeros(1, 1, 1), False, 1.0
    )
    return library if runs else None
