"""Saying where a run is, on stderr or through ``logging``."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

logger = logging.getLogger("optcpu.trainer")

_REDRAW_INTERVAL_S = 0.25
_LINE_INTERVAL_S = 30.0


def duration(seconds: float | None) -> str:
    """``"1:02:03"``, ``"2:03"`` or ``"?"``."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Display:
    """A progress bar on a terminal, a line now and then elsewhere, nothing if switched off.

    Messages go to the logger ``optcpu.trainer``, if somebody has set it to INFO; what logging writes to the
    terminal meanwhile comes above the bar. The bar is redrawn at most four times a second, between steps
    and by the thread that trains, so that it costs training next to nothing.

    Args:
        shown: None shows it; a bar if stderr is a terminal, else lines.
        total: steps in the whole run; None if unknown.
        done: steps made before.
    """

    def __init__(self, shown: bool | None, total: int | None, done: int) -> None:
        self._lines = shown is not False and sys.stderr is not None  # as it is for some services
        self._total = total
        self._next = 0.0
        self._done = done
        self._terminal_logs: list[logging.StreamHandler[Any]] = []
        self._bar: Progress | None = None
        if self._lines and sys.stderr.isatty():
            self._bar = Progress(
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
                transient=True,
                auto_refresh=False,
            )
            self._task = self._bar.add_task("first step (compiles)", total=total, completed=done)

    def __enter__(self) -> Display:
        if self._bar is not None:
            terminal = sys.stderr
            self._bar.start()  # puts something else in the place of sys.stderr
            self._bar.refresh()
            for handler in [*logging.getLogger().handlers, *logger.handlers]:
                if isinstance(handler, logging.StreamHandler) and handler.stream is terminal:
                    self._terminal_logs.append(handler)
                    handler.setStream(sys.stderr)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        for handler in self._terminal_logs:
            handler.setStream(sys.stderr)

    def step(
        self,
        step: int,
        epoch: int,
        loss: float,
        estimate: Callable[[], tuple[float | None, float | None]],
    ) -> None:
        """A step is made.

        Args:
            step: optimizer steps made.
            epoch: epochs ended.
            loss: of the step.
            estimate: gives samples a second, and seconds until the end; called where they are shown.
        """
        self._done = step
        now = time.monotonic()
        if now < self._next or not self._lines:
            return
        self._next = now + (_REDRAW_INTERVAL_S if self._bar is not None else _LINE_INTERVAL_S)
        rate, left = estimate()
        speed = "" if rate is None else f"  {rate:,.0f} samples/s"
        text = f"epoch {epoch + 1}  loss {loss:.4f}{speed}  {duration(left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text, refresh=True)
        else:
            total = "" if self._total is None else f"/{self._total}"
            self._say(f"step {step}{total}  {text}")

    def phase(self, text: str) -> None:
        """Something other than a step begins."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=text, refresh=True)
            self._next = 0.0

    def message(self, text: str) -> None:
        """Something that happened now and then, as a line of its own."""
        self._say(text)

    def _say(self, line: str) -> None:
        if logger.isEnabledFor(logging.INFO):
            logger.info(line)
        elif self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        elif self._lines:
            print(line, file=sys.stderr, flush=True)
