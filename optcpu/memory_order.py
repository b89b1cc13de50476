"""In which order the numbers of a tensor lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the numbers of ``tensor`` lie in memory without gaps, in whatever order."""
    if tensor.is_contiguous():
        return True
    # Only such an order is kept by a new tensor that is made like it.
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def in_one_order(one: Tensor, other: Tensor) -> bool:
    """Whether two strided tensors of one shape lie in memory in the same order.

    The stride of a dimension of size 1 says nothing: a convolution of one channel, or of one place, gets
    gradients whose strides differ from those of its weight there alone.
    """
    strides, others = one.stride(), other.stride()
    return strides == others or all(
        stride == another
        for size, stride, another in zip(one.shape, strides, others, strict=True)
        if size != 1
    )
