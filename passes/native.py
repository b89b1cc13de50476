"""C++ kernels for products that neither PyTorch's operators nor generated code reach.

Where one cannot be built (:mod:`passes.build`), its Python counterpart does the same more slowly.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from passes.build import load


def weight_gradient_available() -> bool:
    """Whether :func:`weight_gradient` can run here; builds the kernel if need be."""
    return _weight_gradient_library() is not None


def weight_gradient(gradient: Tensor, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``gradient.T @ x`` from BF16 operands, summed in FP32 and rounded once, or not.

    The bits do not depend on the number of threads.

    Args:
        gradient: shape (M, N), BF16.
        x: shape (M, K), BF16.
        dtype: of the result: BF16 or FP32.

    Returns:
        Shape (N, K), ``dtype``.

    Raises:
        RuntimeError: the kernel is not available.
    """
    library = _weight_gradient_library()
    if library is None:
        raise RuntimeError("the weight gradient kernel could not be built on this machine")
    gradient, x = gradient.contiguous(), x.contiguous()
    (batch, out), width = gradient.shape, x.shape[1]
    gradient_panels = _panels(gradient, library.rows_of_tile())
    x_panels = _panels(x, library.columns_of_tile())
    result = torch.empty(out, width, dtype=dtype, device="cpu")
    kernels = {
        torch.bfloat16: library.weight_gradient_bf16,
        torch.float32: library.weight_gradient_fp32,
    }
    kernels[dtype](
        *(ctypes.c_void_p(t.data_ptr()) for t in (gradient, x, result)),
        *(ctypes.c_int64(size) for size in (batch, out, width)),
        *(ctypes.c_void_p(t.data_ptr()) for t in (gradient_panels, x_panels)),
    )
    return result


def _panels(matrix: Tensor, width: int) -> Tensor:
    """Memory for ``matrix`` with an even number of rows, and whole panels of ``width`` columns."""
    rows, columns = matrix.shape
    return matrix.new_empty((rows + rows % 2) * -(-columns // width) * width)


@functools.cache
def _weight_gradient_library() -> ctypes.CDLL | None:
    """The compiled kernel; None where it cannot be built or the processor has no BF16."""
    if not torch.cpu._is_avx512_bf16_supported():
        return None
    library = load(Path(__file__).parent / "kernels" / "weight_gradient.cpp")
    if library is not None:
        library.rows_of_tile.restype = library.columns_of_tile.restype = ctypes.c_int64
        library.weight_gradient_bf16.restype = library.weight_gradient_fp32.restype = None
    return library
