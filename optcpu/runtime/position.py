"""How far a training run is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Position:
    """How far a run is.

    Attributes:
        step: optimizer steps made, those that were skipped as bad included.
        epoch: epochs ended.
        samples: that went into those steps, over all processes.
        epoch_ended: whether no step was made since an epoch ended.
        validated: the step after which the last validation was; -1 before the first.
        metrics: what that validation gave.
        best: the best value of the metric that decides which checkpoint is kept.
        improved: how many validations gave a better value than all before them.
        best_of: that metric, and whether less or more of it is better.
        unfinished: what is left to do about the last step, and what is to be told of it; None once
            that is done (:class:`optcpu.runtime.finish.Finisher`).
        unlogged: what the log should tell of the last step, and does not yet.
        untold: the event that callbacks behind one that failed were not told of
            (:func:`optcpu.runtime.events.tell`).
        bad_steps: how many steps in a row were bad.
        regular_save: the step of the last checkpoint that a run without interruption has, too.
        waits: what was due while processes made steps by themselves, and is done when they have met:
            ``"validation"``, ``"checkpoint"``.
        stop_reason: why the run has ended before its time.
        losses: of the steps since the last row of the log.
        open_row: what a row about the last step would tell, where its interval is not over; None else.
    """

    step: int = 0
    epoch: int = 0
    samples: int = 0
    epoch_ended: bool = False
    validated: int = -1
    metrics: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    improved: int = 0
    best_of: str | None = None
    unfinished: dict[str, Any] | None = None
    unlogged: dict[str, float] | None = None
    untold: dict[str, Any] | None = None
    bad_steps: int = 0
    regular_save: int = -1
    waits: list[str] = field(default_factory=list)
    stop_reason: str | None = None
    losses: list[float] = field(default_factory=list)
    open_row: dict[str, float] | None = None
