"""C++ kernels for products that neither PyTorch's operators nor generated code reach.

Where one cannot be built (:mod:`passes.build`), PyTorch's libraries do the same more slowly.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from passes.build import load


def has_matrix_unit() -> bool:
    """Whether there is one (AMX), and the system lets this process use it."""
    return bool(torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx())


def matmul_available() -> bool:
    """Whether :func:`matmul` can run here; builds the kernel if need be."""
    return _library() is not None


def matmul(
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``a @ b + bias + residual`` from BF16 matrices, summed in FP32 and rounded once, or not.

    The bits do not depend on the number of threads, nor those of a row on the other rows.

    Args:
        a: shape (M, K), BF16; any strides.
        b: shape (K, N), BF16; any strides.
        bias: shape (N,), FP32 or BF16.
        residual: shape (M, N), BF16.
        relu: whether only the positive part is wanted.
        dtype: of the result: BF16 or FP32.

    Returns:
        Shape (M, N), ``dtype``, row-major.

    Raises:
        RuntimeError: the kernel is not available.
        ValueError: shapes or dtypes do not fit each other.
    """
    library = _library()
    if library is None:
        raise RuntimeError("the kernel for products in BF16 could not be built on this machine")
    (rows, depth), columns = a.shape, b.shape[1]
    _check(a, (rows, depth))
    _check(b, (depth, columns))
    _check(bias, (columns,), (torch.float32, torch.bfloat16))
    _check(residual, (rows, columns))
    result = torch.empty(rows, columns, dtype=dtype, device="cpu")
    if result.numel() == 0:
        return result
    a, b = (one if _is_row_major(one) else _column_major(one) for one in (a, b))
    bias = None if bias is None else bias.float().contiguous()
    residual = None if residual is None else residual.contiguous()
    kernel = {torch.bfloat16: library.matmul_bf16, torch.float32: library.matmul_fp32}[dtype]
    kernel(
        *_described(a),
        *_described(b),
        _address(bias),
        _address(residual),
        ctypes.c_int64(relu),
        _address(result),
        *(ctypes.c_int64(size) for size in (rows, columns, depth)),
    )
    return result


def _check(
    operand: Tensor | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,),
) -> None:
    """The kernel would read whatever lies where the numbers should."""
    if operand is not None and (operand.shape != shape or operand.dtype not in dtypes):
        raise ValueError(
            f"an operand is {operand.dtype} of shape {tuple(operand.shape)}, where shape {shape} and "
            f"{' or '.join(map(str, dtypes))} are expected"
        )


def _is_row_major(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1 or matrix.shape[1] == 1


def _column_major(matrix: Tensor) -> Tensor:
    if matrix.stride(0) == 1 or matrix.shape[0] == 1:
        return matrix
    return matrix.t().contiguous().t()


def _described(matrix: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]:
    """The address, the distance of rows, or of columns if it is column-major, and whether it is."""
    transposed = not _is_row_major(matrix)
    leading = matrix.stride(1 if transposed else 0)
    return _address(matrix), ctypes.c_int64(leading), ctypes.c_int64(transposed)


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernel; None where it cannot be built or the processor has no BF16."""
    if has_matrix_unit() and (library := _load("matmul_amx.cpp")) is not None:
        return library
    return _load("matmul.cpp") if torch.cpu._is_avx512_bf16_supported() else None


def _load(name: str) -> ctypes.CDLL | None:
    library = load(Path(__file__).parent / "kernels" / name)
    if library is not None:
        library.matmul_bf16.restype = library.matmul_fp32.restype = None
    return library
