"""The errors and warnings that optcpu raises on purpose."""

from __future__ import annotations

import sys
import warnings


class OptcpuError(RuntimeError):
    """Something that optcpu was asked to do cannot be done; the message names the remedy."""


class CompileError(OptcpuError):
    """A part of the model could not be compiled and ``fallback=False`` forbids running it eagerly."""


class WorkerError(OptcpuError):
    """A measuring process ended without a result; the message carries the end of its output."""


class FallbackWarning(UserWarning):
    """A part of the model runs eagerly; training goes on with the right numbers."""


def add_note(error: BaseException, note: str) -> None:
    """Let an error that is not ours tell more: in its traceback, and from the command line.

    As ``error.add_note(note)``, which Python 3.10 has not.
    """
    error.__notes__ = [*notes_of(error), note]  # type: ignore[attr-defined]


def notes_of(error: BaseException) -> list[str]:
    """What was added to ``error``."""
    return getattr(error, "__notes__", [])


_NOT_THE_USERS = {"optcpu", "passes", "torch", "contextlib"}


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn about the line of the user's code that led here, however deep in the compiler this is."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
