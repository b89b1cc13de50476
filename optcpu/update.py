"""The user's optimizer, with the fastest update that PyTorch has for it."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)

_HAVE_FUSED_CPU_KERNEL = (Adam, AdamW, SGD, Adagrad)


def use_fused_update(optimizer: AnyOptimizer) -> AnyOptimizer:
    """Switch PyTorch's own optimizers to their fused CPU kernel, in place.

    The kernel computes the same update in one pass over memory. A group is switched only where the
    user left the implementation open (``fused``, ``foreach`` and ``differentiable`` unset) and every
    parameter is a dense floating-point tensor on the CPU. Subclasses and other optimizers are left
    alone, since they may rely on how the update is made.
    """
    if type(optimizer) not in _HAVE_FUSED_CPU_KERNEL:
        return optimizer
    for group in optimizer.param_groups:
        implementation_is_open = (
            group.get("fused") is None
            and group.get("foreach") is None
            and not group.get("differentiable")
            and not group.get("capturable")
        )
        if implementation_is_open and all(_fits(p) for p in group["params"]):
            group["fused"] = True
    return optimizer


def _fits(parameter: torch.Tensor) -> bool:
    return (
        parameter.device.type == "cpu"
        and parameter.layout == torch.strided
        and parameter.is_floating_point()
    )
