"""How the learning rate goes: warm-up, then constant, cosine or linear."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, LRScheduler, OneCycleLR

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


_LEFT = "_rates_left_by_schedule"  # where an optimizer has them, by group


class Schedule(LambdaLR):
    """A scheduler that follows :func:`factor`, one step for each optimizer step.

    As long as the factor stays the same, the learning rates are left as they are, so that a callback may
    set them. A run that goes on with another learning rate or length follows the new ones at once. A group
    that is added to the optimizer follows the factor from the next step on, from its own learning rate.

    Args:
        optimizer: whose groups' learning rates are the highest ones.
        options: which schedule.
        total_steps: optimizer steps in the whole run; None if unknown.
    """

    def __init__(
        self, optimizer: Optimizer, options: ScheduleOptions, total_steps: int | None
    ) -> None:
        self._options, self._total_steps = options, total_steps
        self._begin_with_what_is_set(optimizer)
        super().__init__(optimizer, self._factor_of)

    def _begin_with_what_is_set(self, optimizer: Optimizer) -> None:
        """Take each group's rate for its highest, and not what a scheduler before has begun with.

        But where that one was a schedule, too, and its last rate is still set: then a run goes on.
        """
        is_flat = self._options.name == "constant" and self._options.warmup_steps == 0
        left = getattr(optimizer, _LEFT, [])
        for place, group in enumerate(optimizer.param_groups):
            goes_on = place < len(left) and group["lr"] == left[place]
            if is_flat or not goes_on:
                group["initial_lr"] = group["lr"]

    def _note_what_is_left(self) -> None:
        setattr(self.optimizer, _LEFT, [group["lr"] for group in self.optimizer.param_groups])

    def _factor_of(self, step: int) -> float:
        return factor(step, self._options, self._total_steps)

    def end_at(self, total_steps: int | None) -> None:
        """Follow another length of the run from now on."""
        self._take_in_new_groups()
        before, self._total_steps = self._factor_of(self.last_epoch), total_steps
        if self._factor_of(self.last_epoch) != before:
            self._follow()

    def step(self, epoch: int | None = None) -> None:
        """Follow the factor to the next step; where it stays the same, that is a matter of counting."""
        self._take_in_new_groups()
        here = self.last_epoch
        if epoch is None and here >= 0 and self._factor_of(here) == self._factor_of(here + 1):
            self.last_epoch += 1
            self._step_count += 1
        else:
            super().step(epoch)
            self._note_what_is_left()

    def _take_in_new_groups(self) -> None:
        groups = self.optimizer.param_groups
        for group in groups[len(self.base_lrs) :]:
            self.base_lrs.append(group.setdefault("initial_lr", group["lr"]))
            self.lr_lambdas.append(self._factor_of)

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rate of each group, which a callback may have set."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group."""
        step = self.last_epoch
        if step > 0 and self._factor_of(step) == self._factor_of(step - 1):
            return [group["lr"] for group in self.optimizer.param_groups]
        return [base * self._factor_of(step) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and what the learning rates have followed."""
        self._take_in_new_groups()
        return {
            "step": self.last_epoch,
            "base_lrs": [float(base) for base in self.base_lrs],
            "factor": self._factor_of(self.last_epoch),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, once the optimizer has its state."""
        self.last_epoch = state_dict["step"]
        self._step_count = self.last_epoch + 1
        if {**state_dict, **self.state_dict()} != state_dict:
            self._follow()
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _follow(self) -> None:
        """Set the learning rates to those of the step that comes next."""
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self._factor_of(self.last_epoch)
        self._note_what_is_left()
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def make_schedule(
    optimizer: Optimizer, options: ScheduleOptions, total_steps: int | None
) -> Schedule:
    """The scheduler that ``options`` describe.

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
    return Schedule(optimizer, options, total_steps)


def too_short(scheduler: LRScheduler, steps: int | None) -> str | None:
    """How a scheduler of PyTorch ends before the run, in words; None if it does not.

    Args:
        scheduler: of the run.
        steps: that the run has still to make; None if unknown.
    """
    for one in scheduler._schedulers if isinstance(scheduler, ChainedScheduler) else [scheduler]:
        if not isinstance(one, OneCycleLR):
            continue
        left = one.total_steps - one.last_epoch
        if steps is None:
            return (
                f"OneCycleLR has {left} optimizer steps to its end, and the run has an unknown number of "
                "them, as the data have no length: give steps in place of epochs"
            )
        if steps > left:
            return f"OneCycleLR has {left} optimizer steps to its end, and the run has {steps}"
    return None
