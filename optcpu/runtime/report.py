"""What is told of each step, and how long the run will still take."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from typing import Any

from optcpu.runtime.display import Display
from optcpu.runtime.events import tell
from optcpu.runtime.freezing import freezer
from optcpu.runtime.freezing.freezer import FreezeEvent
from optcpu.runtime.metrics_log import MetricsLog
from optcpu.runtime.options import LogOptions, TrainerOptions
from optcpu.runtime.position import Position
from optcpu.runtime.run import Run


def open_log(
    options: LogOptions | None, position: Position
) -> contextlib.AbstractContextManager[MetricsLog | None]:
    """The metrics log of a run that is at ``position``, to be closed; None without options.

    Raises:
        OptcpuError: it cannot be written.
    """
    if options is None:
        return contextlib.nullcontext()
    # A row that the end of the run has left in the middle of an interval goes, as that goes on.
    undone = position.unlogged, position.unfinished, position.open_row
    told = ["train"] if undone == (None, None, None) else []
    told += ["validation"] if position.validated == position.step else []
    log = MetricsLog(
        options.folder, tensorboard=options.tensorboard, after_step=position.step, told=told
    )
    return contextlib.closing(log)


class Reporter:
    """Tells the display, the log and the callbacks of each step.

    Args:
        run: what is trained.
        options: how.
        display: what the user sees.
        log: for metrics; None writes none.
        validates: whether the run has data for validation.
        trainer: given to the callbacks.
    """

    def __init__(
        self,
        run: Run,
        options: TrainerOptions,
        display: Display,
        log: MetricsLog | None,
        *,
        validates: bool,
        trainer: Any,
    ) -> None:
        self._run, self._options = run, options
        self._display, self._log = display, log
        self._validates, self._trainer = validates, trainer
        self._interval = 10 if options.log is None else options.log.every_steps
        self._interval_started = time.perf_counter()
        self._interval_samples = 0

    def step(self, loss: float, lr: float, norm: float | None, samples: int, *, made: bool) -> None:
        """Tell of a step.

        Args:
            loss: its mean.
            lr: the learning rate of its update.
            norm: of the gradient; None if that is not known.
            samples: over all processes.
            made: whether weights were updated, or the step was left out.
        """
        run, position = self._run, self._run.position
        row = {"loss": loss, "lr": lr}
        if norm is not None:
            row["grad_norm"] = norm
        self._display.step(position.step, position.epoch, loss, lambda: self._estimate(samples))
        if made:
            position.losses.append(loss)
        self._interval_samples += samples
        position.open_row = row | self._rate()  # before a callback adds what it likes
        if position.step % self._interval == 0:
            self._end_interval()
        tell(run, self._trainer, "on_step_end", row)

    def frozen(self, event: FreezeEvent) -> None:
        """Tell of what was frozen, or was not."""
        if not freezer.logger.isEnabledFor(logging.INFO):  # else that has told it
            self._display.message(str(event))

    def log_what_is_due(self) -> None:
        """Write the row that is not in the log yet, because a callback or the disk was in the way."""
        position = self._run.position
        if self._log is not None and position.unlogged is not None:
            self._log.add("train", position.step, position.epoch, position.unlogged)
        position.unlogged = None

    def end(self) -> None:
        """Write a row about the steps at the end of the run that fill no interval."""
        position = self._run.position
        if self._log is not None and position.open_row is not None:
            self._log.add("train", position.step, position.epoch, self._row(position.open_row))

    def _end_interval(self) -> None:
        position = self._run.position
        assert position.open_row is not None
        position.unlogged, position.open_row = self._row(position.open_row), None
        position.losses = []
        self._interval_started, self._interval_samples = time.perf_counter(), 0

    def _row(self, last: dict[str, float]) -> dict[str, float]:
        """About the interval so far, of which ``last`` tells the last step."""
        losses = self._run.position.losses or [last["loss"]]  # of steps that were made, if any was
        return last | {"loss": math.fsum(losses) / len(losses)} | self._rate()

    def _rate(self) -> dict[str, float]:
        """Of the interval so far; nothing where all of its steps were before this run went on."""
        if not self._interval_samples:
            return {}
        seconds = time.perf_counter() - self._interval_started
        return {"samples_per_second": self._interval_samples / seconds}

    def _estimate(self, samples: int) -> tuple[float | None, float | None]:
        """Samples a second in steps of ``samples``, and the seconds until the end of the run."""
        seconds = self._run.clock.step_with_data()
        return None if seconds is None else samples / seconds, self._seconds_left()

    def _seconds_left(self) -> float | None:
        total = self._run.plan.total
        if total is None:
            return None
        options, position, clock = self._options, self._run.position, self._run.clock
        left = max(0, total - position.step)
        epochs_left = self._epochs_left(left)

        # Where processes make steps by themselves, what is due waits until they meet.
        meetings = (
            left if self._run.world.size == 1 else math.ceil(left / (options.local_steps or 1))
        )

        def times(every: int | None) -> int:
            due = epochs_left if every is None else math.ceil(left / every)
            return max(1, min(meetings, due))  # at the end it is due in any case

        validations = times(options.validate_every) if self._validates else 0
        saves: float = 0
        if options.checkpoints is not None:
            better = position.improved / max(1, clock.counts["validation"])  # and saved for that
            saves = max(times(options.checkpoint_interval), better * validations)
        return clock.remaining(left, validations, saves)

    def _epochs_left(self, steps: int) -> int:
        """How often an epoch, or the run, will end in the next ``steps`` steps."""
        if self._options.epochs is not None:
            return self._options.epochs - self._run.position.epoch
        per_epoch = self._run.plan.per_epoch
        return 1 if not per_epoch else math.ceil(steps / per_epoch)
