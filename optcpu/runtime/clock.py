"""Where the time of a run goes, and how long it will take."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PHASES = ("data", "step", "compile", "validation", "checkpoint")

_RECENT = 50


def seconds_compiling() -> float:
    """How long this process has been compiling so far, whatever asked PyTorch for it."""
    return float(torch._dynamo.utils.calculate_time_spent()["total_wall_time"])


class Clock:
    """Seconds spent in each phase of a run.

    A step that compiled something counts as ``"compile"``, so that it does not spoil the estimate; of a
    validation the compiling alone does, as there may be only one. What callbacks do behind a step counts
    with it, and ``"data"`` is what a step waited for its batches.

    Attributes:
        seconds: spent in each phase, over all sessions of the run.
        counts: how often each phase was there.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.counts = dict.fromkeys(PHASES, 0)
        self._recent: dict[str, deque[float]] = {phase: deque(maxlen=_RECENT) for phase in PHASES}

    def add(self, phase: str, seconds: float, *, is_typical: bool = True) -> None:
        """Count one more of ``phase``, which says something of those to come if it ``is_typical``."""
        self.seconds[phase] += seconds
        self.counts[phase] += 1
        if is_typical:
            self._recent[phase].append(seconds)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Count the block as one more of ``phase``, unless it raises."""
        started = time.perf_counter()
        yield
        self.add(phase, time.perf_counter() - started)

    def typical(self, phase: str) -> float | None:
        """Median seconds of the recent ones, but the mean of data, which come in bursts.

        None before the first.
        """
        recent = self._recent[phase]
        if not recent:
            return None
        return statistics.fmean(recent) if phase == "data" else statistics.median(recent)

    def step_with_data(self) -> float | None:
        """Seconds from one step to the next; None while no step was measured."""
        step = self.typical("step")
        return None if step is None else step + (self.typical("data") or 0.0)

    def remaining(self, steps: int, validations: float, checkpoints: float) -> float | None:
        """Seconds that so many more of each will take; None while no step was measured.

        What has not been there yet counts as nothing, and nothing more is expected to compile.
        """
        step = self.step_with_data()
        if step is None:
            return None
        validation, checkpoint = self.typical("validation"), self.typical("checkpoint")
        return steps * step + validations * (validation or 0) + checkpoints * (checkpoint or 0)

    def state_dict(self) -> dict[str, Any]:
        """Sums, counts, and the typical seconds of each phase, so that a resumed run can estimate."""
        return {
            "seconds": dict(self.seconds),
            "counts": dict(self.counts),
            "typical": {phase: self.typical(phase) for phase in PHASES},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.seconds |= state["seconds"]  # which may be of a version that had fewer phases
        self.counts |= state["counts"]
        for phase, typical in state["typical"].items():
            self._recent[phase] = deque([] if typical is None else [typical], maxlen=_RECENT)
