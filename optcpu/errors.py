"""The errors and warnings that optcpu raises on purpose."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch


class OptcpuError(RuntimeError):
    """Something that optcpu was asked to do cannot be done; the message names the remedy."""


class CompileError(OptcpuError):
    """A part of the model could not be compiled and ``fallback=False`` forbids running it eagerly."""


class WorkerError(OptcpuError):
    """A measuring process ended without a result; the message carries the end of its output."""


class FallbackWarning(UserWarning):
    """A part of the model runs eagerly; training goes on with the right numbers."""


_NOT_THE_USERS = tuple(
    str(Path(file).parent)
    for file in (__file__, Path(__file__).parents[1] / "passes" / "_", torch.__file__)
)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn about the line of the user's code that led here, however deep in the compiler this is."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
