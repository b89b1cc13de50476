"""The optimizer of a run: made from settings, or checked where the user gives it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optcpu.compiled_call import compiled_call
from optcpu.optim import SGD, Adam, AdamW, Lamb, Lookahead
from optcpu.optim.base import StoredOptimizer
from optcpu.pipeline import resolve_precision
from optcpu.runtime.options import OptimizerOptions, TrainerOptions
from optcpu.takeover import resolve_state_dtype

_KINDS: dict[str, type[Optimizer]] = {"adamw": AdamW, "adam": Adam, "sgd": SGD, "lamb": Lamb}


def make_optimizer(
    trained: Iterable[nn.Parameter], options: OptimizerOptions, state_dtype: torch.dtype
) -> Optimizer:
    """An optimizer of all those parameters that need a gradient, with its state in ``state_dtype``.

    Raises:
        ValueError: no parameter needs one.
    """
    parameters = [p for p in trained if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model has requires_grad: there is nothing to train")
    kind = _KINDS[options.name]
    given: dict[str, Any] = {
        "lr": options.lr,
        "weight_decay": options.weight_decay,
        "betas": options.betas,
        "momentum": options.momentum,
        "state_dtype": state_dtype,
    }
    taken = inspect.signature(kind).parameters
    chosen = {name: value for name, value in given.items() if name in taken and value is not None}
    optimizer = kind(parameters, **chosen)
    if options.lookahead is None:
        return optimizer
    return Lookahead(optimizer, **options.lookahead.model_dump())


def optimizer_settings(given: Any, lr: float | None) -> dict[str, Any]:
    """The settings that stand for ``given``: a name, settings, or None.

    Raises:
        TypeError: it is something else.
        ValueError: they have another learning rate than ``lr``.
    """
    if given is None:
        settings: dict[str, Any] = {}
    elif isinstance(given, str):
        settings = {"name": given}
    elif isinstance(given, OptimizerOptions):
        settings = given.model_dump(exclude_unset=True)
    elif isinstance(given, Mapping):
        settings = dict(given)
    else:
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer, its settings or its name, not "
            f"{given.__name__ if isinstance(given, type) else type(given).__name__}"
        )
    if lr is None:
        return settings
    if settings.get("lr", lr) != lr and not isinstance(given, OptimizerOptions):
        raise ValueError(f"lr is {lr}, and optimizer.lr is {settings['lr']}: give one of them")
    return {**settings, "lr": lr}


def load_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """``optimizer.load_state_dict(saved)``, but the state keeps the dtypes that it had.

    PyTorch brings all but a ``"step"`` to the dtype of the parameter: momentum in FP64 or BF16, counters
    and masks would go on as something else. What an optimizer brings to other dtypes itself stays so.
    """
    optimizer.load_state_dict(saved)
    inner = optimizer.optimizer if isinstance(optimizer, Lookahead) else optimizer
    state, groups = saved.get("state"), saved.get("param_groups")
    if isinstance(inner, StoredOptimizer) or not isinstance(state, dict) or groups is None:
        return  # which have formats of their own
    parameters = [p for group in inner.param_groups for p in group["params"]]
    places = [place for group in groups for place in group["params"]]
    for place, parameter in zip(places, parameters, strict=False):
        if place in state and parameter in inner.state:
            inner.state[parameter] = _in_its_dtype(
                inner.state[parameter], state[place], parameter.dtype
            )


def _in_its_dtype(loaded: Any, saved: Any, brought_to: torch.dtype) -> Any:
    """``loaded``, with tensors as ``saved`` where they were brought to another dtype.

    So are containers other than dicts: PyTorch makes them anew from their items alone.
    """
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor):
        is_as_it_was = loaded.dtype == saved.dtype or loaded.dtype != brought_to
        return loaded if is_as_it_was else saved.clone()
    if isinstance(loaded, dict) and isinstance(saved, dict):
        for name in loaded.keys() & saved.keys():
            loaded[name] = _in_its_dtype(loaded[name], saved[name], brought_to)
        return loaded
    return copy.deepcopy(saved) if isinstance(saved, Iterable) else loaded


def check_local_steps(optimizer: Optimizer, local_steps: int | None) -> None:
    """Raise ValueError if the optimizer is a Lookahead of another number of steps."""
    if local_steps is not None and isinstance(optimizer, Lookahead) and optimizer.k != local_steps:
        raise ValueError(
            f"local_steps is {local_steps}, and k of the Lookahead is {optimizer.k}: processes average "
            "their weights when the slow ones move; give both the same number"
        )


def check_optimizer(
    optimizer: Optimizer,
    trained: Iterable[nn.Parameter],
    saved: bool,
    local_steps: int | None = None,
) -> None:
    """Refuse an optimizer of other parameters than those trained.

    Args:
        optimizer: the user's.
        trained: parameters of model and loss.
        saved: whether checkpoints are written.
        local_steps: that each process makes by itself; None if there are none.

    Raises:
        ValueError: it has none of them, no learning rate, others that checkpoints would not have, a step
            that wants to compute the loss again, or is a :class:`optcpu.Lookahead` of another number of
            steps.
    """
    check_local_steps(optimizer, local_steps)
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} computes the loss anew within a step, which the trainer does not "
            "offer: take an optimizer whose step needs no closure, or write the loop yourself"
        )
    if not all("lr" in group for group in optimizer.param_groups):
        raise ValueError(
            f"a group of the {type(optimizer).__name__} has no 'lr', which schedules set and logs tell: "
            "give each group one (group['lr'] = 1.0), also where the optimizer looks at another name"
        )
    known = {id(parameter) for parameter in trained}
    updated = [p for group in optimizer.param_groups for p in group["params"]]
    others = [p for p in updated if id(p) not in known]
    if len(others) == len(updated):
        raise ValueError(
            "the optimizer has none of the model's parameters: make it with model.parameters(), after the "
            "model is as it will be trained"
        )
    if others and saved:
        raise ValueError(
            f"{len(others)} of the optimizer's parameters belong neither to the model nor to a loss that "
            "is a module, so that checkpoints would not have them: make them part of one of the two"
        )


def own_state_dtype(
    model: nn.Module, options: TrainerOptions, state_dtype: torch.dtype | None
) -> torch.dtype:
    """Of an optimizer that the trainer makes: ``state_dtype``, or what :func:`optcpu.optimize` would take.

    Raises:
        ValueError: ``state_dtype`` is none of ``torch.bfloat16``, ``torch.float32`` and None.
    """
    present = compiled_call(model)
    if present is not None:
        return resolve_state_dtype(state_dtype, present.settings.precision)
    precision = resolve_precision(options.precision) if options.compile else "fp32"
    return resolve_state_dtype(state_dtype, precision)
