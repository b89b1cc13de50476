"""The errors and warnings that optcpu raises on purpose."""

from __future__ import annotations


class OptcpuError(RuntimeError):
    """Something that optcpu was asked to do cannot be done; the message names the remedy."""


class CompileError(OptcpuError):
    """A part of the model could not be compiled and ``fallback=False`` forbids running it eagerly."""


class WorkerError(OptcpuError):
    """A measuring process ended without a result; the message carries the end of its output."""


class FallbackWarning(UserWarning):
    """A part of the model runs eagerly; training goes on with the right numbers."""
