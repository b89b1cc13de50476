"""``optimize(model)``: compile a model in place for training on a CPU, and undo it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, overload

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import passes as p
from optcpu.checks import check_flag, check_model, checked_share
from optcpu.compiled_call import CompiledCall, Settings, compiled_call
from optcpu.cpu import capabilities
from optcpu.errors import OptcpuError, warn
from optcpu.layout import checked_layout, keep_packed
from optcpu.memory import reuse_memory
from optcpu.optim.storing import restore_weights
from optcpu.pipeline import Pipeline, default_passes, resolve_precision
from optcpu.takeover import resolve_state_dtype, resolve_weights, take_over
from passes.base import Rewrite

Model = TypeVar("Model", bound=nn.Module)
AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


@overload
def optimize(
    model: Model,
    optimizer: None = None,
    *,
    precision: str = "auto",
    passes: Sequence[p.Pass | Rewrite] | None = None,
    fallback: bool = True,
    keep_memory: bool = True,
    dynamic: bool | None = None,
    activation_memory: float = 1.0,
    weights: str = "auto",
    state_dtype: torch.dtype | None = None,
    layout: str = "auto",
) -> Model: ...


@overload
def optimize(
    model: Model,
    optimizer: AnyOptimizer,
    *,
    precision: str = "auto",
    passes: Sequence[p.Pass | Rewrite] | None = None,
    fallback: bool = True,
    keep_memory: bool = True,
    dynamic: bool | None = None,
    activation_memory: float = 1.0,
    weights: str = "auto",
    state_dtype: torch.dtype | None = None,
    layout: str = "auto",
) -> tuple[Model, AnyOptimizer]: ...


def optimize(
    model: Model,
    optimizer: AnyOptimizer | None = None,
    *,
    precision: str = "auto",
    passes: Sequence[p.Pass | Rewrite] | None = None,
    fallback: bool = True,
    keep_memory: bool = True,
    dynamic: bool | None = None,
    activation_memory: float = 1.0,
    weights: str = "auto",
    state_dtype: torch.dtype | None = None,
    layout: str = "auto",
) -> Model | tuple[Model, AnyOptimizer]:
    """Compile ``model`` in place, so that calling it trains fast on this CPU.

    The module stays what it is: its parameters (FP32), ``state_dict()``, hooks, modes, copies and pickles
    are those of the plain model. The first call compiles, which takes seconds to a minute.

    Args:
        model: any module on the CPU with FP32 parameters. What is in a ``DistributedDataParallel`` is
            compiled; wrap after this call if an optimizer is given, so that its weights can be stored.
        optimizer: any optimizer of the model's parameters. ``Adam``, ``AdamW`` and ``SGD`` of PyTorch
            become those of :mod:`optcpu.optim`, the same object with the same options and checkpoints
            (where everything stays FP32, they use PyTorch's own fused kernel);
            those of :mod:`optcpu.optim` (``Lookahead`` around one as well) are taken as they are; others
            keep their own update, and a warning says so.
        precision: ``"bf16"`` computes matrix products, convolutions and attention in BF16,
            ``"fp32"`` everything in FP32, ``"auto"`` is BF16 where the processor has it in hardware.
        passes: the rewrites to run, in order, in place of :func:`optcpu.default_passes`: passes, or
            functions ``(graph) -> count``.
        fallback: whether a part that cannot be compiled runs eagerly, with a warning, or raises.
        keep_memory: keep freed memory in this process, and give large tensors a range of addresses of
            their own (:mod:`optcpu.memory`), which often halves the step time; holds for the whole process.
        dynamic: as in :func:`torch.compile`: None compiles a size anew once when it changes and then for
            all sizes, True for all sizes from the start, False for each size.
        activation_memory: how much of the memory that activations take between forward and backward may
            be used, from 0 to 1: 1 keeps them all, 0 keeps the inputs alone and computes the rest anew,
            at once when the backward begins, which is not where the peak is lowest (at about 0.1 it is).
            Between the two the compiler chooses what is cheapest to compute anew.
        weights: how the optimizer stores weights of two dimensions or more: ``"fp32"``; ``"split"`` is a
            BF16 half to compute with and another half that makes it the exact FP32 weight, 4 bytes in
            all; ``"bf16"`` is the BF16 half alone, rounded stochastically, 2 bytes. ``"auto"`` is
            ``"split"`` in BF16, else ``"fp32"``. However they are stored, reading a weight, and
            ``state_dict()``, gives FP32. Without an optimizer they stay FP32.
        state_dtype: of the optimizer's state, ``torch.bfloat16`` or ``torch.float32``; None is the
            former in BF16, else the latter.
        layout: how weights that the optimizer stores as BF16 are laid out for products with them:
            ``"native"`` keeps a copy in oneDNN's blocked format where that pays, which it does if a
            weight is multiplied several times between two updates; ``"ipex"`` keeps it in the format
            of Intel's extension; ``"none"`` keeps no copy. ``"auto"`` is ``"ipex"`` where the
            extension fits this PyTorch and is measured to be faster, else ``"native"``.

    Returns:
        ``model`` itself, or ``(model, optimizer)`` if an optimizer was given.

    Raises:
        TypeError: ``model`` is no module, ``optimizer`` no optimizer, an entry of ``passes`` no pass,
            ``activation_memory`` no number, or a flag none.
        ValueError: a parameter is not on the CPU, not FP32, or not finite; ``precision``, ``weights``,
            ``state_dtype`` or ``layout`` is unknown; ``activation_memory`` does not lie between 0 and 1.
        OptcpuError: the model was optimized before with other settings, or ``layout`` is ``"ipex"``
            and the extension cannot be used here.
    """
    wrapped, model = model, unwrapped(model)
    check_model(model)
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {_typename(optimizer)}")
    resolved = resolve_precision(precision)
    pipeline = Pipeline.of(default_passes(resolved) if passes is None else passes)
    storage = resolve_weights(weights, resolved)
    state_dtype = resolve_state_dtype(state_dtype, resolved)
    check_flag("fallback", fallback)
    check_flag("keep_memory", keep_memory)
    check_flag("dynamic", dynamic, or_none=True)
    share = checked_share("activation_memory", activation_memory)
    settings = Settings(resolved, pipeline, fallback, dynamic, share, checked_layout(layout))
    present = compiled_call(model)
    if present is not None and present.settings != settings:
        raise OptcpuError(
            f"this {_typename(model)} is optimized already, with other settings "
            f"({settings.difference(present.settings)}): "
            "call optcpu.restore(model) before optimizing it anew"
        )
    if present is None:
        if resolved == "bf16" and not capabilities().bf16:
            warn(
                "this processor has no BF16 arithmetic (AVX512_BF16 or AMX): BF16 is emulated and a "
                "training step will take several times longer than with precision='fp32'"
            )
        if keep_memory:
            reuse_memory()
        model._compiled_call_impl = CompiledCall(model, settings)
    changed = optimizer is not None and take_over(model, optimizer, storage, state_dtype)
    if changed and present is not None:
        present.compile_anew()
    keep_packed(model, settings.layout)
    return wrapped if optimizer is None else (wrapped, optimizer)


def restore(model: Model) -> Model:
    """Undo :func:`optimize`: ``model`` is called as it was before. Returns ``model``.

    Its weights are plain FP32 tensors again, every bit of them kept; an optimizer that was taken over
    goes on updating them. The allocator's policy stays, as it belongs to the process. A model that is
    not optimized is returned as it is.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {_typename(model)}")
    compiled = unwrapped(model)
    present = compiled_call(compiled)
    if present is not None:
        compiled._compiled_call_impl = present.replaced
        restore_weights(compiled)
    return model


def unwrapped(model: Any) -> Any:
    """What computes: ``model``, or the module in it if it is a ``DistributedDataParallel``."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _typename(thing: object) -> str:
    return type(thing).__name__
