"""The norm of a gradient, and a step with a gradient that is scaled down to one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as global_hooks

from optcpu.optim import native
from optcpu.optim.base import StoredOptimizer
from optcpu.optim.formats import Format, Stored
from optcpu.optim.lookahead import Lookahead
from optcpu.optim.rules import Constants, Slot
from optcpu.takeover import widen_for_others


def total_norm(gradients: Sequence[Tensor]) -> float:
    """The norm of all gradients together, as ``torch.nn.utils.get_total_norm`` gives it.

    But that of BF16 tensors is not rounded to BF16, and takes a third of the time.

    Args:
        gradients: dense or sparse, of any dtype; sparse ones are coalesced.
    """
    numbers = [_numbers(gradient.detach()) for gradient in gradients]
    narrow = [one for one in numbers if _is_narrow(one)]
    others = [one for one in numbers if not _is_narrow(one)]
    norm = torch.nn.utils.get_total_norm(others).item() if others or not narrow else 0.0
    if not narrow:
        return norm
    constants, stored = Constants(), [Stored(Format.NEAREST, one) for one in narrow]
    squares = native.gradient_squares([Slot(constants, one, one) for one in stored])
    return math.hypot(norm, math.sqrt(squares))


def clip_factor(limit: float, norm: float, gradients: Sequence[Tensor]) -> float:
    """What ``clip_grad_norm_`` multiplies gradients by, where it is less than 1, computed as there."""
    double = any(g.dtype in (torch.float64, torch.complex128) for g in gradients)
    total = torch.tensor(norm, dtype=torch.float64 if double else torch.float32)
    return (limit / (total + 1e-6)).item()


def scaled_step(optimizer: Optimizer, gradients: Sequence[Tensor], factor: float) -> None:
    """``optimizer.step()`` with gradients that are multiplied by ``factor`` first.

    PyTorch takes as long for that in BF16 as for an update; an optimizer that can does so while it updates,
    unless hooks are to see the gradients before.

    Args:
        optimizer: of their parameters.
        gradients: all that it has.
        factor: by which to multiply them.
    """
    inner = optimizer.optimizer if type(optimizer) is Lookahead else optimizer
    if _scales(inner) and any(map(_is_narrow, gradients)) and not _are_watched(optimizer, inner):
        with inner.scaling_gradients(factor):
            optimizer.step()
        return
    torch._foreach_mul_([_numbers(gradient) for gradient in gradients], factor)
    optimizer.step()


def _scales(optimizer: Optimizer) -> TypeGuard[StoredOptimizer]:
    """Whether it can scale gradients; a class of the user's may do anything with them."""
    return isinstance(optimizer, StoredOptimizer) and type(optimizer).__module__.startswith(
        "optcpu.optim"
    )


def _are_watched(*optimizers: Optimizer) -> bool:
    """Whether something looks at the gradients around a step: a DynamicFreezer, or a user's hook."""
    hooks: list[Any] = [
        *global_hooks._global_optimizer_pre_hooks.values(),
        *global_hooks._global_optimizer_post_hooks.values(),
    ]
    for optimizer in optimizers:
        hooks += optimizer._optimizer_step_pre_hooks.values()  # type: ignore[attr-defined]
        hooks += optimizer._optimizer_step_post_hooks.values()  # type: ignore[attr-defined]
    return any(hook is not widen_for_others for hook in hooks)


def _is_narrow(gradient: Tensor) -> bool:
    """Whether the update's kernel is the one to go through it."""
    is_dense = gradient.layout == torch.strided and gradient.is_contiguous()
    return gradient.dtype == torch.bfloat16 and is_dense and gradient.device.type == "cpu"


def _numbers(gradient: Tensor) -> Tensor:
    """The numbers of ``gradient``, each once: those that are stored, if it is sparse."""
    if not gradient.is_sparse:
        return gradient
    if not gradient.is_coalesced():
        gradient.copy_(gradient.coalesce())
    return gradient._values()
