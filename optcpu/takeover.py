"""Taking over a user's optimizer: its update, its state, and how the weights are stored."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from optcpu.errors import OptcpuError, warn
from optcpu.optim.base import StoredOptimizer
from optcpu.optim.convert import convert, why_not
from optcpu.optim.formats import Format
from optcpu.optim.in_backward import is_updated_in_backward
from optcpu.optim.lookahead import Lookahead
from optcpu.optim.storing import store_weights
from optcpu.optim.weights import StoredWeight
from optcpu.pipeline import Precision
from optcpu.update import use_fused_update

Weights = Literal["fp32", "split", "bf16"]

_FORMATS: dict[Weights, Format] = {"split": Format.SPLIT, "bf16": Format.STOCHASTIC}


def resolve_weights(weights: str, precision: Precision) -> Weights:
    """How weights are stored: ``"auto"`` splits them where products are computed in BF16.

    Raises:
        ValueError: ``weights`` is none of ``"auto"``, ``"fp32"``, ``"split"`` and ``"bf16"``.
    """
    if weights == "auto":
        return "split" if precision == "bf16" else "fp32"
    if weights in ("fp32", "split", "bf16"):
        return weights  # type: ignore[return-value]
    raise ValueError(f"weights must be 'auto', 'fp32', 'split' or 'bf16', not {weights!r}")


def resolve_state_dtype(state_dtype: torch.dtype | None, precision: Precision) -> torch.dtype:
    """The dtype of an optimizer's state: None is BF16 where products are computed in BF16.

    Raises:
        ValueError: ``state_dtype`` is none of ``torch.bfloat16``, ``torch.float32`` and None.
    """
    if state_dtype is None:
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if state_dtype in (torch.bfloat16, torch.float32):
        return state_dtype
    raise ValueError(
        f"state_dtype must be torch.bfloat16, torch.float32 or None, not {state_dtype!r}"
    )


def take_over(
    model: nn.Module, optimizer: Optimizer, weights: Weights, state_dtype: torch.dtype
) -> bool:
    """Let ``optimizer`` update ``model`` with optcpu's storage and kernel, in place.

    An optimizer that optcpu has no update for keeps its own, and the user is told. Where everything
    stays FP32, PyTorch's optimizers are switched to their own fused kernel, if they have one.

    Returns:
        Whether a weight of ``model`` is stored in another way than before.

    Raises:
        OptcpuError: the weights are stored in yet another way, or in one that ``optimizer`` cannot update.
    """
    inner = optimizer.optimizer if isinstance(optimizer, Lookahead) else optimizer
    _check_storage(model, inner, weights)
    if weights == "fp32" and state_dtype == torch.float32:
        if not isinstance(inner, StoredOptimizer):
            use_fused_update(inner)  # PyTorch's own kernel has nothing left to gain
        return False
    if not isinstance(inner, StoredOptimizer):
        reason = convert(inner, state_dtype)
        if reason is not None:
            use_fused_update(inner)
            warn(
                f"{type(inner).__name__} keeps its own update and FP32 state, and the weights stay "
                f"FP32: {reason}"
            )
            return False
    if weights == "fp32":
        return False
    _watch_optimizers()
    plain = _plain_weights(model)
    updated = [p for group in inner.param_groups for p in group["params"]]
    left = store_weights(model, updated, _FORMATS[weights])
    if left:
        warn(
            f"{len(left)} weights stay FP32 ({left[0]} is the first), since something else (a graph, "
            "through a loss that is kept, say, or another parameter) refers to their memory: call "
            "optcpu.optimize before the model is run or wrapped"
        )
    return _plain_weights(model) != plain


def _check_storage(model: nn.Module, optimizer: Optimizer, weights: Weights) -> None:
    remedy = "call optcpu.restore(model) before optimizing it anew"
    plain_alone = why_not(optimizer) is not None
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, StoredWeight):
            continue
        present = next(k for k, v in _FORMATS.items() if v == parameter.stored().format)
        if present != weights:
            raise OptcpuError(
                f"weight {name!r} is stored as {present!r}, not {weights!r}: {remedy}"
            )
        if plain_alone and id(parameter) in updated:
            raise OptcpuError(
                f"weight {name!r} is stored as {present!r} for another optimizer, and "
                f"{type(optimizer).__name__} updates plain weights alone: {remedy}"
            )


def stored_as(model: nn.Module) -> Weights:
    """How the weights of ``model`` are stored."""
    formats = {p.stored().format for p in model.parameters() if isinstance(p, StoredWeight)}
    return next((name for name, format in _FORMATS.items() if format in formats), "fp32")


def _plain_weights(model: nn.Module) -> int:
    return sum(not isinstance(parameter, StoredWeight) for parameter in model.parameters())


def meet_ddp(model: nn.Module, weights: Iterable[StoredWeight]) -> None:
    """Let ``weights`` have FP32 gradients if ``DistributedDataParallel`` calls ``model``.

    That class averages gradients of a parameter's own dtype alone.

    Raises:
        OptcpuError: parameters are updated before their gradients would be averaged.
    """
    if DistributedDataParallel._get_active_ddp_module() is None:
        return
    if any(map(is_updated_in_backward, model.parameters())):
        raise OptcpuError(
            "update_in_backward() uses gradients before DistributedDataParallel has averaged them: call "
            "optimizer.update_in_step()"
        )
    widen_gradients(weights)


def widen_gradients(weights: Iterable[StoredWeight]) -> None:
    """Let those weights have FP32 gradients from now on, where they have BF16 ones."""
    for weight in weights:
        weight.widen_gradient()


@functools.cache
def _watch_optimizers() -> None:
    """Let optimizers that are made later, of weights stored for another one, find FP32 gradients."""
    register_optimizer_step_pre_hook(widen_for_others)


def widen_for_others(optimizer: Optimizer, args: Any, options: Any) -> None:
    """What is called before each step of any optimizer: others find FP32 gradients."""
    if isinstance(optimizer, (StoredOptimizer, Lookahead)):
        return  # the one around which Lookahead is comes here as well
    updated = (p for group in optimizer.param_groups for p in group["params"])
    widen_gradients(p for p in updated if isinstance(p, StoredWeight))


@contextmanager
def gradients_set_aside(
    weights: Iterable[StoredWeight],
) -> Iterator[list[tuple[StoredWeight, Tensor]]]:
    """Within the block those weights have no gradient that have one of another dtype.

    Dynamo does not trace what reads such a weight: in the middle of an accumulation a batch of another
    shape would not be compiled.

    Yields:
        Those weights with their gradients.
    """
    aside: list[tuple[StoredWeight, Tensor]] = []
    for weight in weights:
        gradient = weight.grad
        if gradient is not None and gradient.dtype != weight.dtype:
            aside.append((weight, gradient))
            weight.grad = None
    try:
        yield aside
    finally:
        for weight, gradient in aside:
            weight.grad = gradient
