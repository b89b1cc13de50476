"""Starting the workers one after the other, and giving them turns: A B C, B C A, C A B, ..."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from optcpu.measure.batches import Batch, whole_passes
from optcpu.measure.payload import PAYLOAD_FILE
from optcpu.measure.process import WorkerProcess
from optcpu.measure.progress import Reporter
from optcpu.measure.training import SETTINGS_FILE, Settings
from optcpu.measure.variants import REFERENCE, Variant

_CALIBRATION_SHARE = 0.3  # of a round's length: the turn that finds out how many steps fill a round
# Memory is scarce where less is available than so many of the largest worker.
_SCARCE = 3.0


@dataclass
class Measured:
    """What one worker told.

    Attributes:
        variant: what it measured.
        preparation: its answer to ``prepare``; None if it failed there.
        rounds_s: seconds per optimizer step, by round.
        peak_mb: most resident memory while it trained, MiB.
        peak_is_of_training: whether the peak of the compilation could be left out of it.
        failed: why it ended early, in one line.
        log: traceback or output, where it failed.
    """

    variant: Variant
    preparation: dict[str, Any] | None = None
    rounds_s: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    peak_is_of_training: bool = True
    failed: str | None = None
    log: str | None = None


class Team:
    """The workers of one comparison and the private folder that they share.

    A context manager; leaving it, by an exception too, ends every worker and removes the folder.

    Attributes:
        measured: what each worker told, by the name of its variant.
        memory_was_scarce: whether workers had to give memory back between their turns.
    """

    def __init__(self, reporter: Reporter, cold: bool) -> None:
        self._reporter = reporter
        self._cold = cold
        self._workers: dict[str, WorkerProcess] = {}
        self.measured: dict[str, Measured] = {}
        self.memory_was_scarce = False

    def __enter__(self) -> Team:
        # A child of a worker may still be writing: that must not hide the result.
        self._folder = tempfile.TemporaryDirectory(
            prefix="optcpu-compare-", ignore_cleanup_errors=True
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers.values():
            worker.close()
        self._folder.cleanup()

    @property
    def payload_file(self) -> Path:
        """Where the job is written to before the first worker starts."""
        return self.folder / PAYLOAD_FILE

    @property
    def folder(self) -> Path:
        """The private folder."""
        return Path(self._folder.name)

    def write(self, settings: Settings) -> None:
        """Give all workers their settings."""
        (self.folder / SETTINGS_FILE).write_text(json.dumps(asdict(settings)))

    def prepare(self, variants: Sequence[Variant]) -> None:
        """Start these workers and have them compile and learn, one after the other.

        Raises:
            WorkerError: if the reference fails; what others lack is noted in ``measured``.
        """
        for variant in variants:
            measured = self.measured[variant.name] = Measured(variant)
            self._reporter.phase(variant.name)
            problem = self._memory_problem()
            if problem:
                measured.failed = problem
                continue
            self._reporter.detail("starting")
            worker = WorkerProcess(variant, self.folder, self._cold)
            self._workers[variant.name] = worker
            measured.preparation = self._ask(worker, {"do": "prepare"})

    def _memory_problem(self) -> str | None:
        """Why no further worker fits beside those that run, or None if one does."""
        available, largest = _available_mb(), self._largest_mb()
        if available > largest:
            return None
        return (
            f"not started: {available:.0f} MB of memory are left and it would need about "
            f"{largest:.0f} MB beside the others; compare fewer variants at a time"
        )

    def _largest_mb(self) -> float:
        """The memory of the largest worker so far."""
        return max(
            (m.preparation["resident_mb"] for m in self.measured.values() if m.preparation),
            default=0.0,
        )

    def take_turns(
        self,
        rounds: int,
        round_seconds: float,
        batches: Sequence[Batch],
        accumulation_steps: int,
    ) -> None:
        """Time every worker that is well, in turn.

        Raises:
            WorkerError: if the reference fails.
        """
        steps: dict[str, int] = {}
        self._reporter.phase("warm-up")
        for name in self._live():
            preparation = self.measured[name].preparation
            assert preparation is not None
            trial = max(1, int(_CALIBRATION_SHARE * round_seconds / preparation["step_seconds"]))
            self._reporter.detail(name)
            answer = self._turn(name, trial, reset_peak=True)
            if answer is not None:
                self.measured[name].peak_is_of_training = answer["peak_is_of_training"]
                wanted = max(1, math.ceil(round_seconds * trial / answer["seconds"]))
                steps[name] = whole_passes(wanted, batches, accumulation_steps)
        for number in range(rounds):
            self._reporter.phase(f"round {number + 1}/{rounds}")
            for name in rotated(self._live(), number):
                self._reporter.detail(name)
                answer = self._turn(name, steps[name], reset_peak=False)
                if answer is not None:
                    self.measured[name].rounds_s.append(answer["seconds"] / steps[name])

    def profile(
        self, name: str, seconds: float, batches: Sequence[Batch], accumulation_steps: int
    ) -> list[dict[str, Any]] | None:
        """What a step of a worker consists of, from about ``seconds`` of them.

        Returns:
            As :func:`optcpu.measure.breakdown.costs_of` tells it; None if the worker fails, whose figures
            stay what they are.
        """
        self._reporter.phase("where the time goes")
        self._reporter.detail(name)
        wanted = max(1, math.ceil(seconds / statistics.median(self.measured[name].rounds_s)))
        steps = whole_passes(wanted, batches, accumulation_steps)
        command = {"do": "profile", "steps": steps, "hand_back": False}
        answer = self._workers[name].ask(command, None)
        return None if answer is None else list(answer["costs"])

    def _live(self) -> list[str]:
        return [name for name, worker in self._workers.items() if worker.failed is None]

    def _turn(self, name: str, steps: int, reset_peak: bool) -> dict[str, Any] | None:
        command = {"do": "turn", "steps": steps, "reset_peak": reset_peak}
        answer = self._ask(self._workers[name], command)
        if answer is not None:
            self.measured[name].peak_mb = max(self.measured[name].peak_mb, answer["peak_mb"])
        return answer

    def _ask(self, worker: WorkerProcess, command: dict[str, Any]) -> dict[str, Any] | None:
        # A tuned worker keeps what it has freed. Where little is left for the others, it gives that
        # back after its turn; the untimed step of its next one fetches it again.
        scarce = _available_mb() < _SCARCE * self._largest_mb()
        self.memory_was_scarce |= scarce
        waiting = self._reporter if command["do"] == "prepare" else None
        answer = worker.ask({**command, "hand_back": scarce}, waiting)
        if answer is None:
            if worker.variant.name == REFERENCE:
                raise worker.error()
            measured = self.measured[worker.variant.name]
            measured.failed, measured.log = worker.failed, worker.log
        return answer


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order of round ``number``: in each round, another one comes first."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def _available_mb() -> float:
    return float(psutil.virtual_memory().available) / 2**20


def median_ratio(base: Sequence[float], other: Sequence[float]) -> float:
    """How many times faster ``other`` is: the median over the rounds of ``base / other``."""
    return statistics.median(b / o for b, o in zip(base, other, strict=True))
