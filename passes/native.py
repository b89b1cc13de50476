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


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """``gradient.T @ x`` in FP32 from BF16 operands, rounded nowhere.

    Args:
        gradient: shape (M, N), BF16.
        x: shape (M, K), BF16.

    Returns:
        Shape (N, K), FP32.

    Raises:
        RuntimeError: the kernel is not available.
    """
    library = _weight_gradient_library()
    if library is None:
        raise RuntimeError("the weight gradient kernel could not be built on this machine")
    gradient, x = gradient.contiguous(), x.contiguous()
    (batch, out), width = gradient.shape, x.shape[1]
    padded = batch + batch % 2
    tile = library.tile_columns()
    transposed = gradient.new_empty(out * padded)
    panels = x.new_empty(-(-width // tile) * tile * padded)
    result = torch.empty(out, width, dtype=torch.float32, device="cpu")
    library.weight_gradient(
        *(ctypes.c_void_p(t.data_ptr()) for t in (gradient, x, result)),
        *(ctypes.c_int64(size) for size in (batch, out, width)),
        *(ctypes.c_void_p(t.data_ptr()) for t in (transposed, panels)),
    )
    return result


@functools.cache
def _weight_gradient_library() -> ctypes.CDLL | None:
    """The compiled kernel; None where it cannot be built or the processor has no BF16."""
    if not torch.cpu._is_avx512_bf16_supported():
        return None
    library = load(Path(__file__).parent / "kernels" / "weight_gradient.cpp")
    if library is not None:
        library.tile_columns.restype = ctypes.c_int64
        library.weight_gradient.restype = None
    return library
