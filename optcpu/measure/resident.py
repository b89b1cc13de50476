"""The resident memory of this process."""

from __future__ import annotations

from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # man 5 proc: resets the peak resident set size (VmHWM) to the current one


def resident_mb() -> float:
    """Memory of this process that is resident now, MiB."""
    return float(psutil.Process().memory_info().rss) / 2**20


def reset_peak() -> bool:
    """Forget the peak so far. Returns whether the system lets a process do that (Linux does)."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def peak_mb() -> float:
    """The most memory that was resident since the last reset, or since the start, MiB.

    Where the system keeps no such figure, what is resident now.
    """
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    info = psutil.Process().memory_info()
    return float(getattr(info, "peak_wset", info.rss)) / 2**20
