"""The allocator's policy: keep freed memory in the process instead of handing it back every step.

A training step allocates and frees the same large tensors again and again. By default glibc serves
each of them with a fresh ``mmap`` and unmaps it on free, so every step pays for page faults over all
of its activations and gradients. With ``M_MMAP_MAX = 0`` and trimming off, freed memory stays in the
heap and the next step reuses the same, already mapped pages.

The setting belongs to the process: it also holds for what runs beside the model, and memory that was
once used is not returned to the system before the process ends. That is why it can be declined
(``optimize(..., keep_memory=False)``).

Source: ``man 3 mallopt`` (glibc).
"""

from __future__ import annotations

import ctypes
import functools
import sys

# Parameters of mallopt(3), from glibc's malloc.h; they have no name in Python.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4

_NEVER_TRIM = -1  # the largest int would mean 2 GiB, less than a large model frees in a step
_TOP_PAD_BYTES = 64 * 2**20  # the heap grows in steps of this size, not page by page


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory in this process. Done once; later calls change nothing.

    Returns:
        Whether the policy is in force. It is not where the C library has no ``mallopt`` that
        accepts it (musl, macOS, Windows); nothing is changed there.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    settings = (
        (_M_MMAP_MAX, 0),
        (_M_TRIM_THRESHOLD, _NEVER_TRIM),
        (_M_TOP_PAD, _TOP_PAD_BYTES),
    )
    accepted = [mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(accepted)
