"""Being asked to stop: by Ctrl-C, by whoever runs the machine, or by the user's program."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

_AT_ONCE_S = 1.0  # within which a signal to a group of processes has reached all of them


class StopRequest:
    """Whether someone wants the run to stop.

    Attributes:
        by: what wants it: a signal's name, as in ``"SIGTERM"``, or what :meth:`ask` was told; None as
            long as nobody does.
    """

    def __init__(self) -> None:
        self.by: str | None = None
        self._since = math.inf
        self._before: dict[int, Any] = {}

    def ask(self, by: str) -> None:
        """Want it; from any thread."""
        self._since = min(self._since, time.monotonic())
        self.by = self.by or by

    @property
    def seconds(self) -> float:
        """For how long someone has wanted it; 0 as long as nobody does."""
        return max(0.0, time.monotonic() - self._since)

    def comes_soon(self) -> bool:
        """Whether someone wants it now or in a moment: others may have met the same signal before."""
        end = time.monotonic() + _AT_ONCE_S
        while self.by is None and time.monotonic() < end:
            # PyTorch raises in whatever runs when a process that loads data has died.
            with contextlib.suppress(RuntimeError):
                time.sleep(0.01)
        return self.by is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block the first SIGINT or SIGTERM is noted, and a second one acts as it did before.

        Python hands signals to the main thread alone; in another one nothing is noted. Where one run is
        inside another, a signal stops both.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            # None is a handler that is not Python's, which cannot be put back.
            self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        try:
            yield
        finally:
            for each, handler in self._before.items():
                signal.signal(each, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)
        before = self._before[number]
        signal.signal(number, before)
        outer = getattr(before, "__self__", None)
        if isinstance(outer, StopRequest):
            outer._note(number, frame)
