"""What is freed is used again: memory stays in the process instead of being mapped anew in every step.

A training step allocates and frees the same large tensors again and again. By default glibc serves
each of them with a fresh ``mmap`` and unmaps it on free, so every step pays for page faults over all
of its activations and gradients. Two policies together avoid that:

- Tensors from 1 MiB on come from a range of addresses of their own, in huge pages where the system has
  them (``memory.cpp``).
- Everything else comes from glibc's heap, of which nothing is returned: ``M_MMAP_MAX = 0``, no trimming.

The heap alone would do for both, but takes up to twice of the memory: the holes that tensors leave fill
with small objects, and the next step's tensors do not fit.

Both belong to the process: they also hold for what runs beside the model, and memory that was once used is
not returned to the system before the process ends or :func:`hand_back_freed_memory` is called. That is why
they can be declined (``optimize(..., keep_memory=False)``).

Source: ``man 3 mallopt`` (glibc).
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

from passes.build import load

# Parameters of mallopt(3), from glibc's malloc.h; they have no name in Python.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4

_NEVER_TRIM = -1  # the largest int would mean 2 GiB, less than a large model frees in a step
_TOP_PAD_BYTES = 64 * 2**20  # the heap grows in steps of this size, not page by page

_large_tensors: ctypes.CDLL | None = None  # what serves them; set once


def reuse_memory() -> None:
    """Let both policies hold in this process, as far as the system allows. Done once."""
    serve_large_tensors()
    keep_freed_memory()


def hand_back_freed_memory() -> None:
    """Return memory that was freed, but kept for later, to the system (Linux with glibc only)."""
    if not sys.platform.startswith("linux"):
        return
    if _large_tensors is not None:
        _large_tensors.hand_back_large_tensors()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


@functools.cache
def serve_large_tensors() -> bool:
    """Serve tensors from 1 MiB on from a range of addresses of their own. Done once.

    Returns:
        Whether they are. They are not outside of Linux and where there is no C++ compiler; the heap
        serves them there.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = load(Path(__file__).with_suffix(".cpp"))
    if library is None:
        return False
    library.serve_large_tensors.restype = ctypes.c_bool
    if not library.serve_large_tensors():
        return False
    global _large_tensors
    _large_tensors = library
    return True


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
