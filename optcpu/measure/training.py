"""One variant's training: first step, learning, timed turns. Runs inside a worker."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from optcpu.measure.accuracy import Accuracy, FirstStep, change_norms, compare_first_steps
from optcpu.measure.batches import signature
from optcpu.measure.breakdown import costs_of
from optcpu.measure.engine import make_engine
from optcpu.measure.payload import Payload
from optcpu.measure.variants import REFERENCE, Variant

SETTINGS_FILE = "settings.json"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What all workers of one comparison share.

    Attributes:
        steps: optimizer steps of the learning check.
        accumulation_steps: batches per optimizer step.
        precision: given to ``optcpu.optimize``.
        seed: every step is seeded with it and its number.
        threads: threads to compute with.
        dropout_off: whether the first step is compared with dropout switched off.
    """

    steps: int
    accumulation_steps: int
    precision: str
    seed: int
    threads: int
    dropout_off: bool


@dataclass(frozen=True)
class Preparation:
    """What a variant showed before the timed turns.

    Attributes:
        first_seconds: of every step that may have compiled: the first forward and backward pass,
            the first whole step, and every later step that met new shapes.
        step_seconds: a steady step while learning.
        losses: the loss of each step.
        change_norms: how far each parameter moved, by name.
        accuracy: errors of the first step; None for the reference.
    """

    first_seconds: list[float]
    step_seconds: float
    losses: list[float]
    change_norms: dict[str, float]
    accuracy: Accuracy | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Training:
    """A variant, ready to train on its batches."""

    def __init__(self, variant: Variant, payload: Payload, settings: Settings) -> None:
        self._variant = variant
        self._settings = settings
        self._batches = payload.batches
        payload.model.train()
        self._engine = make_engine(variant, payload, settings.precision)

    def prepare(self, folder: Path, progress: Progress) -> Preparation:
        """Compile, compare the first step with the reference in ``folder``, and learn."""
        progress("first step")
        started = time.perf_counter()
        step = self._first_step()
        first_seconds = time.perf_counter() - started
        if self._settings.dropout_off:
            progress("first step without dropout")
            del step  # or two sets of gradients would be held at a time
            with self._engine.dropout_off():
                step = self._first_step()

        reference = folder / "reference.pt"
        accuracy: Accuracy | None = None
        if self._variant.name == REFERENCE:
            step.save(reference)
        else:
            accuracy = compare_first_steps(step, FirstStep.load(reference))
        del step
        self._engine.forget_gradients()

        start = folder / f"{self._variant.name}-start.pt"
        torch.save(self._engine.parameters(), start)
        losses, seconds, compiling = self._learn(progress)
        changes = change_norms(
            self._engine.parameters(), torch.load(start, weights_only=True, mmap=True)
        )
        start.unlink()
        self._engine.forget_gradients()  # the others need the memory
        return Preparation(
            first_seconds=[first_seconds, *(seconds[index] for index in compiling)],
            step_seconds=statistics.median(seconds[len(seconds) // 2 :]),
            losses=losses,
            change_norms=changes,
            accuracy=accuracy,
        )

    def _first_step(self) -> FirstStep:
        self._seed(0)
        return self._engine.first_step(0)

    def _learn(self, progress: Progress) -> tuple[list[float], list[float], list[int]]:
        """Losses and seconds of every step, and which steps met new shapes or the first update."""
        losses: list[float] = []
        seconds: list[float] = []
        compiling: list[int] = []
        seen: set[Any] = set()
        for index in range(self._settings.steps):
            progress(f"learning {index + 1}/{self._settings.steps}")
            shapes = {signature(self._batches[i]) for i in self._batches_of(index)}
            if not shapes <= seen:
                compiling.append(index)
                seen |= shapes
            self._seed(index + 1)
            started = time.perf_counter()
            losses.append(self._step(index))
            seconds.append(time.perf_counter() - started)
        return losses, seconds, compiling

    def turn(self, steps: int) -> float:
        """Seconds of ``steps`` steps, after an untimed one that fetches the caches back."""
        gc.collect()
        self._step(0)
        started = time.perf_counter()
        for index in range(steps):
            self._step(index)
        seconds = time.perf_counter() - started
        # Hold as little as possible while the others have their turns.
        self._engine.forget_gradients()
        return seconds

    def profile(self, steps: int) -> list[dict[str, Any]]:
        """What ``steps`` steps consist of, as :func:`optcpu.measure.breakdown.costs_of` tells it."""

        def run() -> None:
            for index in range(steps):
                self._step(index)

        gc.collect()
        self._step(0)
        costs = costs_of(run, steps)
        self._engine.forget_gradients()
        return costs

    def _batches_of(self, index: int) -> list[int]:
        """Which batches step ``index`` trains on."""
        count = self._settings.accumulation_steps
        return [i % len(self._batches) for i in range(index * count, (index + 1) * count)]

    def _step(self, index: int) -> float:
        return self._engine.step(self._batches_of(index))

    def _seed(self, step: int) -> None:
        torch.manual_seed(self._settings.seed + step)
        random.seed(self._settings.seed + step)
