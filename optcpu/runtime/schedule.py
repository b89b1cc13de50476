"""How the learning rate goes: warm-up, then constant, cosine or linear."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from optcpu.runtime.options import ScheduleOptions


def factor(step: int, options: ScheduleOptions, total_steps: int | None) -> float:
    """What the learning rate is multiplied by in ``step``; the first is 0.

    It rises to 1 in the last of the warm-up steps, and reaches ``options.final`` in step
    ``total_steps``, the first that is not made. The cosine is that of Loshchilov and Hutter,
    arXiv 1608.03983, without restarts.
    """
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    if options.name == "constant":
        return 1.0
    assert total_steps is not None
    length = max(1, total_steps - options.warmup_steps)
    done = min(1.0, (step - options.warmup_steps) / length)
    falling = 1 - done if options.name == "linear" else (1 + math.cos(math.pi * done)) / 2
    return options.final + (1 - options.final) * falling


def make_schedule(
    optimizer: Optimizer, options: ScheduleOptions, total_steps: int | None
) -> LambdaLR:
    """A scheduler of PyTorch that follows :func:`factor`, one step for each optimizer step.

    Args:
        optimizer: whose groups' learning rates are the highest ones.
        options: which schedule.
        total_steps: optimizer steps in the whole run; None if unknown.

    Raises:
        ValueError: the schedule needs ``total_steps`` or is longer than that.
    """
    if options.name != "constant" and total_steps is None:
        raise ValueError(
            f"schedule {options.name!r} needs to know how many steps there are, and the training "
            "data have no length: give steps instead of epochs"
        )
    if total_steps is not None and options.warmup_steps >= total_steps:
        raise ValueError(
            f"schedule.warmup_steps is {options.warmup_steps}, but there are only {total_steps} "
            "steps: train longer or warm up for less"
        )
    return LambdaLR(optimizer, lambda step: factor(step, options, total_steps))
