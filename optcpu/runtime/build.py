"""The parts of a run: made from settings, or checked where the user gives them as objects."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from optcpu.compiled_call import Settings, compiled_call
from optcpu.cpu import capabilities
from optcpu.errors import OptcpuError, warn
from optcpu.layout import expect_products
from optcpu.optim import Lookahead
from optcpu.optim.convert import why_not
from optcpu.optim.weights import StoredWeight
from optcpu.optimize import optimize
from optcpu.pipeline import Pipeline, resolve_precision
from optcpu.runtime.callbacks import Callback
from optcpu.runtime.data.loaders import is_dataset
from optcpu.runtime.freezing.freezer import DynamicFreezer
from optcpu.runtime.options import FreezingOptions, TrainerOptions
from optcpu.runtime.schedule import make_schedule, too_short
from optcpu.takeover import stored_as, widen_gradients
from passes.base import Pass, Rewrite

# A BF16 sum of more gradients than that loses more by rounding than each of them has lost.
_MOST_BF16_SUMMANDS = 32


def check_model(model: object) -> None:
    """Refuse what the trainer cannot train.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it is a ``DistributedDataParallel``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "model is wrapped in DistributedDataParallel, but the trainer averages gradients itself: give "
            "model.module"
        )


def check_epochs(data: Any, epochs: int | None) -> None:
    """Raise TypeError if the data cannot be gone through so often."""
    if isinstance(data, Iterator) and (epochs or 1) > 1:
        raise TypeError(
            f"{type(data).__name__} can be gone through once only, and epochs is {epochs}: give a list, a "
            "DataLoader or a dataset, or steps in place of epochs"
        )


def check_data_settings(
    options: TrainerOptions, training: Any, validation: Any, **given: Any
) -> None:
    """Refuse settings of how batches are made where the data are batches already.

    Args:
        options: of the run.
        training: the training data.
        validation: the validation data; None if there are none.
        given: such settings that are no options; None where one is not given.

    Raises:
        ValueError: naming them.
    """
    if is_dataset(training):
        return
    of_training = {"workers": "auto", "drop_last": False}  # only; what changes nothing may be said
    ignored = [name for name, usual in of_training.items() if getattr(options, name) != usual]
    if not is_dataset(validation):
        ignored += [name for name in ("batch_size",) if name in options.model_fields_set]
        ignored += [name for name, value in given.items() if value is not None]
    if ignored:
        raise ValueError(
            f"{', '.join(ignored)} would change nothing: the training data are batches already "
            f"({type(training).__name__}). Remedy: leave that out and set it where they are made, or give "
            "a Dataset; a list of samples has to be put into one"
        )


def compile_model(
    model: nn.Module,
    optimizer: Optimizer,
    options: TrainerOptions,
    passes: Sequence[Pass | Rewrite] | None,
    state_dtype: torch.dtype | None,
) -> None:
    """Compile ``model``, with its optimizer, if that is wanted and was not done.

    Raises:
        OptcpuError: it is compiled, or its weights or the optimizer's state are stored, with other settings
            than those that are given.
        ValueError: there are passes, and it is not to be compiled.
    """
    present = compiled_call(model)
    if present is not None:
        _check_compiled(present.settings, options, passes)
    elif passes is not None and not options.compile:
        raise ValueError(
            "passes needs compile: an eager model has none; leave them out, or compile it"
        )
    if present is not None or not options.compile:
        _check_stored(model, optimizer, options, state_dtype)
    elif options.compile:
        optimize(
            model,
            optimizer,
            precision=options.precision,
            passes=passes,
            dynamic=options.dynamic,
            activation_memory=options.activation_memory,
            weights=options.weights,
            state_dtype=state_dtype,
            layout=options.layout,
        )
    if options.accumulation_steps > _MOST_BF16_SUMMANDS:
        widen_gradients(p for p in model.parameters() if isinstance(p, StoredWeight))
    # Where sizes vary, each may come once; what came before must not decide: a resumed run has not seen it.
    expect_products(model, 1 if options.dynamic else options.accumulation_steps)


def _check_compiled(
    present: Settings, options: TrainerOptions, passes: Sequence[Pass | Rewrite] | None
) -> None:
    wanted: dict[str, Any] = {
        "compile": options.compile,
        "precision": resolve_precision(options.precision),
        "dynamic": options.dynamic,
        "activation_memory": options.activation_memory,
        "layout": options.layout,
    }
    there: dict[str, Any] = {"compile": True}
    there |= {name: getattr(present, name) for name in wanted if name not in there}
    differing = [
        f"{name} = {there[name]!r}, not {wanted[name]!r}"
        for name in wanted
        if name in options.model_fields_set and there[name] != wanted[name]
    ]
    if passes is not None and Pipeline.of(passes) != present.pipeline:
        differing.append("other passes")
    if differing:
        raise OptcpuError(
            f"the model is compiled already, with {', '.join(differing)}: call optcpu.restore(model) first"
        )


def _check_stored(
    model: nn.Module, optimizer: Optimizer, options: TrainerOptions, state_dtype: torch.dtype | None
) -> None:
    """Refuse a way of storing that nothing would bring about any more."""
    inner = optimizer.optimizer if isinstance(optimizer, Lookahead) else optimizer
    if options.compile and why_not(inner) is not None:
        return  # what keeps its own update was told so
    there = stored_as(model)
    if options.weights not in ("auto", there):
        raise OptcpuError(
            f"the weights are stored as {there!r}, not {options.weights!r}, and the trainer leaves a model "
            "that is compiled, or is not to be, as it is. Remedy: optcpu.restore(model) before, and "
            "compile=True"
        )
    present = getattr(inner, "state_dtype", torch.float32)
    if state_dtype not in (None, present):
        raise OptcpuError(
            f"the optimizer has its state in {present}, not {state_dtype}, and the trainer leaves one of a "
            "model that is compiled, or is not to be, as it is. Remedy: optcpu.restore(model) before, and "
            "compile=True; or make the optimizer with that state_dtype"
        )


def make_scheduler(
    given: Any,
    optimizer: Optimizer,
    options: TrainerOptions,
    total_steps: int | None,
    validates: bool,
) -> LRScheduler:
    """The scheduler of ``optimizer``.

    Args:
        given: the user's, a function that makes one of an optimizer, or None for ``options.schedule``.
        optimizer: whose learning rate it sets.
        options: of the run.
        total_steps: in the whole run; None if unknown.
        validates: whether there are validations.

    Raises:
        TypeError: ``given`` is or makes something else.
        ValueError: it is of another optimizer, waits for validations that never come, or ends before
            the run.
    """
    if given is None:
        return make_schedule(optimizer, options.schedule, total_steps)
    if not isinstance(given, LRScheduler) and not callable(given):
        raise TypeError(
            "scheduler must be one of PyTorch's, a function that makes one of an optimizer, or settings; "
            f"not {type(given).__name__}"
        )
    scheduler = given if isinstance(given, LRScheduler) else given(optimizer)
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(f"scheduler must make a scheduler, not {type(scheduler).__name__}")
    if scheduler.optimizer.param_groups is not optimizer.param_groups:
        raise ValueError("the scheduler is of another optimizer: make it of the one that trains")
    if isinstance(scheduler, ReduceLROnPlateau) and not validates:
        raise ValueError("ReduceLROnPlateau follows the loss of validation: give validation_data")
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode == "max":
        raise ValueError(
            "ReduceLROnPlateau follows the loss of validation, which is to fall: mode='min', not 'max'"
        )
    told = too_short(scheduler, total_steps)
    if told is not None:
        remedy = (
            "give it the total_steps of the run (a step takes accumulation_steps micro-batches)"
        )
        raise ValueError(told if total_steps is None else f"{told}: {remedy}")
    return scheduler


def make_freezer(
    given: Callable[[nn.Module, Optimizer], DynamicFreezer] | None,
    model: nn.Module,
    optimizer: Optimizer,
    options: TrainerOptions,
    total_steps: int | None,
) -> DynamicFreezer | None:
    """The freezer that the user's function makes, or the settings; None without either.

    Raises:
        TypeError: the function makes something else.
        ValueError: both are given.
    """
    if given is None and options.freezing is None:
        return None
    if given is None:
        assert options.freezing is not None
        settings = options.freezing.model_dump()
        if options.freezing.payback and total_steps is None:
            warn(
                "the length of the run is not known, so blocks will be frozen whether that pays back or "
                "not. Remedy: steps instead of epochs, data with a length, or freezing.payback=False"
            )
        total_steps = total_steps if settings.pop("payback") else None
        return DynamicFreezer(model, optimizer, total_steps=total_steps, **settings)
    if options.freezing is not None:
        raise ValueError("give either freezer or freezing, not both of them")
    made = given(model, optimizer)
    if not isinstance(made, DynamicFreezer):
        raise TypeError(f"freezer must make a DynamicFreezer, not {type(made).__name__}")
    return made


def warn_if_it_ends_before_a_freeze(
    freezing: FreezingOptions | None, total_steps: int | None
) -> None:
    """Warn where a run that begins ends before the first decision that could freeze something."""
    if freezing is None:
        return
    # The first window has none before it to be compared with.
    first = (freezing.patience + 1) * freezing.window
    if total_steps is not None and first >= total_steps:
        warn(
            f"freezing has no effect: with window {freezing.window} and patience {freezing.patience} the "
            f"first freeze can come behind step {first}, and the run has {total_steps}. Remedy: a smaller "
            "freezing.window or freezing.patience"
        )


def check_functions(**functions: Any) -> None:
    """Refuse what is given as a function and cannot be called as one.

    Raises:
        TypeError: naming it.
    """
    for name, function in functions.items():
        if isinstance(function, torch.nn.modules.loss._Loss):
            raise TypeError(
                f"{name} is called with the model's output and the whole batch, which "
                f"nn.{type(function).__name__} cannot take: give lambda output, batch: "
                f"criterion(output, batch[-1]), where criterion is that module"
            )
        if getattr(function, "__module__", None) == F.__name__:
            raise TypeError(
                f"{name} is called with the model's output and the whole batch, which "
                f"F.{getattr(function, '__name__', 'such a function')} cannot take: give lambda output, "
                f"batch: F.{getattr(function, '__name__', 'function')}(output, batch[-1])"
            )
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, not {type(function).__name__}")


def checked_callbacks(callbacks: Sequence[Callback]) -> list[Callback]:
    """``callbacks``, if they are some.

    Raises:
        TypeError: one is not.
    """
    if isinstance(callbacks, Callback):
        raise TypeError("callbacks must be a list of them: put it into one")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(
                f"callbacks must be optcpu.runtime.Callback objects, not {type(callback).__name__}"
            )
    return list(callbacks)


def threads_for(options: TrainerOptions, local_processes: int = 1) -> int:
    """How many threads a process shall compute with.

    ``"auto"`` shares the physical cores that this process may run on (its affinity and its cgroup's
    quota) evenly among the processes on this machine; a second hardware thread of a core adds nothing
    to matrix products. ``OMP_NUM_THREADS``, where it is set, is obeyed.
    """
    if isinstance(options.threads, int):
        return options.threads
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return int(wanted)  # torchrun sets it to 1 when the user does not
    return max(1, capabilities().physical_cores // local_processes)
