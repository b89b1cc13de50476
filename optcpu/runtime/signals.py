"""Being asked to stop: by Ctrl-C, or by whoever runs the machine."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """Whether SIGINT or SIGTERM has come.

    Attributes:
        signal: its name, as in ``"SIGTERM"``; None as long as none has come.
    """

    def __init__(self) -> None:
        self.signal: str | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block the first signal is noted, and a second one acts as it did before.

        Python hands signals to the main thread alone; in another one nothing is noted.
        """
        self.signal = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, frame: FrameType | None) -> None:
            self.signal = signal.Signals(number).name
            signal.signal(number, before[signal.Signals(number)])

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
