"""Attention and its backward on BF16 as C++ kernels, which PyTorch's own do not reach at usual lengths.

PyTorch's backward works through small tiles one by one, and batched products write all scores to memory.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
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
        RuntimeError: the kernels are not available, or cannot have the memory that they need.
        ValueError: shapes or dtypes do not fit each other.
    """
    _check(query, key, value)
    output, logsumexp = empty_results(query)
    _run("attention", (query, key, value), (output,), mask, logsumexp, causal, scale)
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
        RuntimeError: the kernels are not available, or cannot have the memory that they need.
        ValueError: shapes or dtypes do not fit each other.
    """
    _check(query, key, value, gradient, output)
    if logsumexp.shape != query.shape[:3] or logsumexp.dtype != torch.float32:
        raise ValueError(
            f"the log-sum-exp is {logsumexp.dtype} of shape {tuple(logsumexp.shape)}, where FP32 of shape "
            f"{tuple(query.shape[:3])} is expected"
        )
    gradients = empty_by_rows(query), empty_by_rows(key), empty_by_rows(value)
    given = (query, key, value, output, gradient)
    _run("attention_backward", given, gradients, mask, logsumexp, causal, scale)
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


def _run(
    kernel: str,
    given: Sequence[Tensor],
    results: Sequence[Tensor],
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
    given = [tensor if _has_rows(tensor) else tensor.contiguous() for tensor in given]
    (batch, heads, queries, width), keys = given[0].shape, given[1].shape[2]
    if mask is not None:
        mask = mask.float().expand(batch, heads, queries, keys)
    problem = _call(
        library,
        kernel,
        (batch, heads, queries, keys, width, causal, scale),
        _NO_TABLE if mask is None else (mask.data_ptr(), *mask.stride()),
        (logsumexp.data_ptr(), *logsumexp.stride(), 0),
        [_described(tensor) for tensor in (*given, *results)],
    )
    if problem is not None:
        raise RuntimeError(f"a kernel for attention in BF16 failed: {problem}")


def _has_rows(tensor: Tensor) -> bool:
    """Whether rows are contiguous, one behind the other."""
    return tensor.stride(3) == 1 and (tensor.stride(2) >= tensor.shape[3] or tensor.shape[2] == 1)


def _described(tensor: Tensor) -> tuple[int, ...]:
    batch, heads, rows, _ = tensor.stride()
    # Between rows of which there is but one any number may stand.
    return tensor.data_ptr(), batch, heads, rows if tensor.shape[2] > 1 else tensor.shape[3]


# What a kernel reads (the struct Call in its source): sizes, whether causal, and the scale; of mask and
# log-sum-exp the address and strides; of tensors the address and the distances of batches, heads and rows.
_HEAD, _TABLE, _TENSOR = "6qd", "5q", "4q"
_NO_TABLE = (0, 0, 0, 0, 0)


def _call(
    library: ctypes.CDLL,
    kernel: str,
    head: Sequence[float],
    mask: Sequence[int],
    logsumexp: Sequence[int],
    tensors: Sequence[Sequence[int]],
) -> str | None:
    """Why it could not be done; None if it was."""
    layout = _HEAD + 2 * _TABLE + len(tensors) * _TENSOR
    numbers = itertools.chain(head, mask, logsumexp, *tensors)
    problem: bytes | None = getattr(library, kernel)(struct.pack(layout, *numbers))
    return None if problem is None else problem.decode(errors="replace")


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be built, or run for want of BF16 or of oneDNN."""
    if not torch.cpu._is_avx512_bf16_supported() or not torch.backends.mkldnn.is_available():
        return None
    library = load(Path(__file__).parent / "kernels" / "attention.cpp")
    if library is None:
        return None
    library.attention.restype = library.attention_backward.restype = ctypes.c_char_p
    # One query, and no tensor: those are fakes while a graph is compiled.
    width = WIDTHS[0]
    row, output, logsumexp = (ctypes.create_string_buffer(4 * width) for _ in range(3))
    given, result = ((ctypes.addressof(room), width, width, width) for room in (row, output))
    table = (ctypes.addressof(logsumexp), 0, 0, 0, 0)
    sizes = (1, 1, 1, 1, width, False, 1.0)
    problem = _call(library, "attention", sizes, _NO_TABLE, table, [given, given, given, result])
    return library if problem is None else None
