"""Saying what is going on while a comparison runs, on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_LINE_INTERVAL_S = 10.0


class Reporter:
    """A progress bar on a terminal, now and then a line elsewhere, nothing if switched off.

    The bar is redrawn only when something is told, so that drawing costs the timed turns nothing.
    """

    def __init__(self, shown: bool | None, total: int, command: str = "optcpu compare") -> None:
        self._shown = shown is not False
        self._command = command
        self._phase = ""
        self._next_line = 0.0
        self._progress: Progress | None = None
        if self._shown and sys.stderr.isatty():
            self._progress = Progress(
                SpinnerColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
                auto_refresh=False,
            )
            self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Reporter:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def set_total(self, total: int) -> None:
        """The number of phases, where it becomes known later."""
        if self._progress is not None:
            self._progress.update(self._task, total=total)

    def phase(self, text: str) -> None:
        """A phase begins; the one before it is done."""
        if self._progress is not None:
            done = 1 if self._phase else 0
            self._progress.update(self._task, advance=done, description=text, refresh=True)
        elif self._shown:
            print(f"{self._command}: {text}", file=sys.stderr, flush=True)
            self._next_line = time.monotonic() + _LINE_INTERVAL_S
        self._phase = text

    def detail(self, text: str) -> None:
        """How far the phase is."""
        line = f"{self._phase}: {text}"
        if self._progress is not None:
            self._progress.update(self._task, description=line, refresh=True)
        elif self._shown and time.monotonic() >= self._next_line:
            print(f"{self._command}: {line}", file=sys.stderr, flush=True)
            self._next_line = time.monotonic() + _LINE_INTERVAL_S

    def tick(self) -> None:
        """Nothing new; keep the clock running."""
        if self._progress is not None:
            self._progress.refresh()
