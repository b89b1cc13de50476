"""The parts of a run that its settings name: optimizer, threads, length."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from optcpu.cpu import capabilities
from optcpu.optim import SGD, Adam, AdamW, Lamb, Lookahead
from optcpu.runtime.options import OptimizerOptions, TrainerOptions

_KINDS: dict[str, type[Optimizer]] = {"adamw": AdamW, "adam": Adam, "sgd": SGD, "lamb": Lamb}


def make_optimizer(trained: Iterable[nn.Parameter], options: OptimizerOptions) -> Optimizer:
    """An optimizer of all those parameters that need a gradient; its state is FP32 for now.

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
        "state_dtype": torch.float32,  # optimize() decides
    }
    taken = inspect.signature(kind).parameters
    chosen = {name: value for name, value in given.items() if name in taken and value is not None}
    optimizer = kind(parameters, **chosen)
    if options.lookahead is None:
        return optimizer
    return Lookahead(optimizer, **options.lookahead.model_dump())


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


def steps_per_epoch(batches: int | None, accumulation_steps: int) -> int | None:
    """Optimizer steps in one epoch, the incomplete last one included; None if unknown."""
    return None if batches is None else math.ceil(batches / accumulation_steps)
