"""Take over an optimizer of PyTorch: the same object, with optcpu's storage and update."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.optim import Optimizer

from optcpu.optim.adam import Adam, AdamW
from optcpu.optim.base import StoredOptimizer, fits
from optcpu.optim.sgd import SGD

_COUNTERPARTS: dict[type[Optimizer], type[StoredOptimizer]] = {
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
    torch.optim.SGD: SGD,
}


def convert(optimizer: Optimizer, state_dtype: torch.dtype, seed: int = 0) -> str | None:
    """Make ``optimizer`` one of :mod:`optcpu.optim`, in place.

    Hyper-parameters, groups, state, hooks and attached schedulers stay what they are.

    Args:
        optimizer: of PyTorch: ``Adam``, ``AdamW`` or ``SGD``; one of :mod:`optcpu.optim` is left alone.
        state_dtype: of its moments from now on, those it has included.
        seed: of the random bits of stochastic rounding.

    Returns:
        None, or why the optimizer was left as it is.
    """
    reason = why_not(optimizer)
    if reason is not None or isinstance(optimizer, StoredOptimizer):
        return reason
    optimizer.__class__ = _COUNTERPARTS[type(optimizer)]
    assert isinstance(optimizer, StoredOptimizer)
    optimizer.keep_state_in(state_dtype, seed)
    optimizer._patch_step_function()
    # PyTorch's fused kernel unscales gradients itself; from now on GradScaler has to.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    _rebind_step(optimizer)
    return None


def why_not(optimizer: Optimizer) -> str | None:
    """Why ``optimizer`` has to be left as it is; None for one that can be converted, or has been."""
    if isinstance(optimizer, StoredOptimizer):
        return None
    if type(optimizer) not in _COUNTERPARTS:
        return "optcpu has no update of its own for it"
    for group in optimizer.param_groups:
        if group["differentiable"]:
            return "differentiable=True needs PyTorch's own update"
        if not all(fits(parameter) for parameter in group["params"]):
            return "it holds parameters that are not FP32 on the CPU"
    return None


def _rebind_step(optimizer: Optimizer) -> None:
    """A scheduler has put its own function in front of the ``step`` that the class had then."""
    present: Any = optimizer.__dict__.pop("step", None)
    if present is None:
        return
    step = type(optimizer).step

    @functools.wraps(step)
    def tracked(*args: Any, **kwargs: Any) -> Any:
        optimizer._opt_called = True  # type: ignore[attr-defined]
        return step(optimizer, *args, **kwargs)

    tracked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = tracked  # type: ignore[method-assign]
