"""The user's optimizer, with the fastest update that PyTorch has for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from optcpu.memory_order import in_one_order, is_dense

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)

_HAVE_FUSED_CPU_KERNEL = (Adam, AdamW, SGD, Adagrad)


def use_fused_update(optimizer: AnyOptimizer) -> AnyOptimizer:
    """Let PyTorch's own optimizers step with their fused CPU kernel, in place.

    The kernel computes the same update in one pass over memory, but not for every tensor: it takes
    neither sparse gradients nor strides that leave gaps. So each group is looked at in front of each
    step and switched for that step alone; ``param_groups`` and ``state_dict()`` stay what they were.
    A group whose implementation the user chose (``fused``, ``foreach``, ``differentiable`` or
    ``capturable`` set) is left alone, as are subclasses and other optimizers, since they may rely on
    how the update is made.
    """
    hooks = optimizer._optimizer_step_pre_hooks.values()
    if type(optimizer) in _HAVE_FUSED_CPU_KERNEL and _switch_on not in hooks:
        optimizer.register_step_pre_hook(_switch_on)
        optimizer.register_step_post_hook(_switch_off)
    return optimizer


def _switch_on(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """In front of a step. A closure computes the gradients first: then it is what is hooked."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        _switch(optimizer)
        return None
    # The optimizer itself stands first among the arguments.
    return (optimizer, _followed_by_switch(closure, optimizer)), {}


def _followed_by_switch(closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
    def closure_and_switch() -> Any:
        result = closure()
        _switch(optimizer)
        return result

    return closure_and_switch


def _switch(optimizer: Optimizer) -> None:
    _switch_off(optimizer)  # a step that raised has left them on
    fitting = [g for g in optimizer.param_groups if _is_open(g) and _fits(optimizer, g)]
    for group in fitting:
        group["fused"] = True
    setattr(optimizer, _SWITCHED, fitting)


def _switch_off(optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> None:
    """Behind a step. PyTorch's kernel does not let autograd know that it writes to the weights."""
    for group in getattr(optimizer, _SWITCHED, ()):
        group["fused"] = None
        increment_version([p for p in group["params"] if p.grad is not None])
    setattr(optimizer, _SWITCHED, [])


_SWITCHED = "_groups_switched_by_optcpu"


def _is_open(group: dict[str, Any]) -> bool:
    unset = group.get("fused") is None and group.get("foreach") is None
    return unset and not group.get("differentiable") and not group.get("capturable")


def _fits(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether the fused kernel computes the same for what the group holds now."""
    updated = [p for p in group["params"] if p.grad is not None]
    if group.get("momentum"):
        # It wants a momentum for all parameters or for none.
        missing = [optimizer.state[p].get("momentum_buffer") is None for p in updated]
        if any(missing) and not all(missing):
            return False
    return all(_is_plain(p, optimizer.state[p].values()) for p in updated)


def _is_plain(parameter: Tensor, state: Iterable[Any]) -> bool:
    """Whether parameter, gradient and state lie in memory in the same order, without gaps."""
    others = [t for t in state if isinstance(t, Tensor) and t.shape == parameter.shape]
    return (
        parameter.device.type == "cpu"
        and parameter.is_floating_point()
        and parameter.layout == torch.strided
        and is_dense(parameter)
        and all(
            t.layout == torch.strided and in_one_order(t, parameter)
            for t in (parameter.grad, *others)
            if t is not None
        )
    )
