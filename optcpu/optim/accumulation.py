"""Gradients of several backward passes, added up at the speed of memory.

With gradient accumulation autograd adds each new gradient to the one that is there. In BF16 PyTorch's own
addition is bound by its conversions, and takes more than four times as long as memory does. The update's
kernel has an addition as a special case: gradient descent by a step of -1. Its bits are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, increment_version

from optcpu.memory_order import in_one_order, is_dense
from optcpu.optim import native
from optcpu.optim.formats import Format, Stored
from optcpu.optim.rules import Constants, Slot

_ADD = Constants(step_size=-1.0)
_LEAST_NUMBERS = 2**14  # of a gradient that is worth a call


def add_by_kernel(leaf: Tensor) -> None:
    """Let the kernel add the next gradient that autograd accumulates into ``leaf``, if it can.

    That is the sum of all parts that one backward pass gives, behind all hooks that were there before.
    Left to autograd is what a post-accumulate hook waits for.

    Args:
        leaf: is used in a graph whose backward is to come.
    """
    if leaf.requires_grad and not leaf._post_accumulate_grad_hooks:  # type: ignore[attr-defined]
        _Once(leaf)


class _Once:
    """What autograd calls before it accumulates into ``leaf``, the next time only."""

    def __init__(self, leaf: Tensor) -> None:
        self._leaf = leaf
        # The graph keeps the node and this with it; a leaf that is in none has lost both at once.
        self._handle = get_gradient_edge(leaf).node.register_prehook(self)

    def __call__(self, gradients: tuple[Tensor | None]) -> tuple[None] | None:
        """Add the gradient, and leave nothing for autograd to add; or leave it the gradient."""
        self._handle.remove()
        (gradient,), total = gradients, self._leaf.grad
        if gradient is None or total is None or not _fit(total, gradient):
            return None
        if self._leaf._post_accumulate_grad_hooks or not self._leaf.requires_grad:  # type: ignore[attr-defined]
            return None
        _add(total, gradient)
        return (None,)


def add(total: Tensor, gradient: Tensor) -> None:
    """``total += gradient``, by the kernel if it can."""
    if _fit(total, gradient):
        _add(total, gradient)
    else:
        total += gradient


def _add(total: Tensor, gradient: Tensor) -> None:
    native.sgd([Slot(_ADD, _stored(total), _stored(gradient))])
    increment_version(total)


def _stored(numbers: Tensor) -> Stored:
    return Stored(Format.NEAREST, numbers)


def _fit(total: Tensor, gradient: Tensor) -> bool:
    """Whether the kernel can add them, and it is worth the call."""
    return (
        total.dtype == gradient.dtype == torch.bfloat16
        and type(total) is type(gradient) is Tensor
        and total.layout == gradient.layout == torch.strided
        and total.device.type == gradient.device.type == "cpu"
        and total.shape == gradient.shape
        and total.numel() >= _LEAST_NUMBERS
        and not total.requires_grad
        and not total.is_inference()
        and not torch.is_grad_enabled()  # then it would be differentiated in turn
        and is_dense(total)
        and in_one_order(total, gradient)
        and native.library_or_none() is not None
    )
