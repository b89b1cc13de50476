"""What is set for optimizer and scheduler: a run that goes on keeps to the checkpoint's, and says so."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from optcpu.errors import warn
from optcpu.optim.lookahead import Lookahead
from optcpu.runtime.schedule import Schedule

_MOVED_BY_OURS = {"params", "lr", "initial_lr"}
_MOVED_BY_OTHERS = {"params", "lr", "max_lr", "min_lr"}  # and by OneCycleLR and CyclicLR:
_MOVED_BY_OTHERS |= {"betas", "momentum", "max_momentum", "base_momentum"}
# What a scheduler of PyTorch counts or follows, in its own state.
_MOVED_IN_SCHEDULER = {"last_epoch", "base_lrs", "best", "num_bad_epochs", "cooldown_counter"}
_MOVED_IN_SCHEDULER |= {"T_cur", "T_i"}


# What optimizers do not move themselves, as others may with further entries of their groups.
_SETTINGS = frozenset(
    [
        "weight_decay",
        "eps",
        "betas",
        "amsgrad",
        "maximize",
        "momentum",
        "dampening",
        "nesterov",
        "alpha",
        "centered",
        "rho",
        "lr_decay",
        "momentum_decay",
        "lambd",
        "etas",
        "step_sizes",
        "decoupled_weight_decay",
        "beta2_decay",
        "ns_steps",
        "adjust_lr_fn",
        "initial_lr",
    ]
)


@dataclass(frozen=True)
class Settings:
    """What a user has set, as far as plain values tell.

    Attributes:
        groups: of each group of the optimizer's parameters. The trainer's own schedule follows a new
            learning rate at once.
        schedule: of the scheduler; the trainer's own follows new ones.
    """

    groups: list[dict[str, Any]]
    schedule: dict[str, Any]

    @classmethod
    def given(cls, optimizer: Optimizer, scheduler: LRScheduler) -> Settings:
        """What is set before a run begins, or goes on: all that the two have."""
        return cls(_groups(optimizer, scheduler, None), _schedule(scheduler))

    @classmethod
    def within(cls, optimizer: Optimizer, scheduler: LRScheduler) -> Settings:
        """What is set in the midst of a run: only what it has not moved, as far as is known."""
        return cls(_groups(optimizer, scheduler, _SETTINGS), _schedule(scheduler))

    def following(self, saved: Settings) -> Settings:
        """These, but as ``saved`` where that has them; a warning tells of those that differ."""
        remedy = "change them in a callback's on_train_begin: trainer.optimizer.param_groups"
        if any("alpha" in group and "pullback" in group for group in self.groups):  # a Lookahead's
            remedy += ", or trainer.optimizer.k and .alpha"
        _tell_changes("optimizer", self.groups, saved.groups, remedy)
        remedy = "take another folder for checkpoints"
        _tell_changes("scheduler", [self.schedule], [saved.schedule], remedy)
        theirs = [*saved.groups, *({} for _ in self.groups)]  # groups may have been added since
        groups = [ours | theirs[place] for place, ours in enumerate(self.groups)]
        return Settings(groups, self.schedule | saved.schedule)


def _groups(
    optimizer: Optimizer, scheduler: LRScheduler, known: frozenset[str] | None
) -> list[dict[str, Any]]:
    moved = _MOVED_BY_OURS if isinstance(scheduler, Schedule) else _MOVED_BY_OTHERS
    around: dict[str, Any] = {}
    if isinstance(optimizer, Lookahead):
        around = {name: getattr(optimizer, name) for name in ("k", "alpha", "pullback")}
    return [
        {
            name: copy.copy(value)
            for name, value in group.items()
            if name not in moved and (known is None or name in known) and _is_plain(value)
        }
        | around
        for group in optimizer.param_groups
    ]


def _schedule(scheduler: LRScheduler) -> dict[str, Any]:
    if isinstance(scheduler, Schedule):
        return {}
    return {
        name: copy.copy(setting)
        for name, setting in scheduler.state_dict().items()
        if not name.startswith("_")
        and name not in _MOVED_IN_SCHEDULER
        and setting is not None
        and _is_plain(setting)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _tell_changes(
    part: str, given: list[dict[str, Any]], saved: list[dict[str, Any]], remedy: str
) -> None:
    """Warn where a run that goes on keeps to other settings of a ``part`` than the user has now given."""
    changes = {
        f"{name} {theirs[name]!r} instead of {value!r}": None
        for ours, theirs in zip(given, saved, strict=False)  # groups may have been added since
        for name, value in ours.items()
        if name in theirs and not _equal(theirs[name], value)
    }
    if changes:
        warn(
            f"the run goes on with the checkpoint's settings of the {part}: {', '.join(changes)}. "
            f"Remedy: give those, or {remedy}"
        )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
