"""The update rules as one C++ kernel for all tensors at once, or in PyTorch where there is none."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter
from pathlib import Path

from optcpu.memory_order import in_one_order, is_dense
from optcpu.optim import rules
from optcpu.optim.formats import Stored
from optcpu.optim.rules import Constants, Slot
from passes.build import load


def adam(slots: Sequence[Slot]) -> None:
    """:func:`rules.adam` on each of ``slots``."""
    for slot in _run("adam", slots):
        rules.adam(slot)


def sgd(slots: Sequence[Slot]) -> None:
    """:func:`rules.sgd` on each of ``slots``."""
    for slot in _run("sgd", slots):
        rules.sgd(slot)


def lamb(slots: Sequence[Slot]) -> None:
    """:func:`rules.lamb` on each of ``slots``."""
    for slot in _run("lamb", slots):
        rules.lamb(slot)


def gradient_squares(slots: Sequence[Slot]) -> float:
    """:func:`rules.gradient_squares` of ``slots``."""
    library, fitting, others = library_or_none(), *_sorted(slots)
    if library is None:
        return rules.gradient_squares(slots)
    total: float = library.gradient_squares(_described(fitting), ctypes.c_int64(len(fitting)))
    return total + rules.gradient_squares(others)


@functools.cache
def library_or_none() -> ctypes.CDLL | None:
    """The kernel; None where it cannot be built."""
    library = load(Path(__file__).parent / "kernels" / "update.cpp")
    if library is not None:
        for function in (library.adam, library.sgd, library.lamb):
            function.restype = None
        library.gradient_squares.restype = ctypes.c_double
    return library


def _run(rule: str, slots: Sequence[Slot]) -> Sequence[Slot]:
    """Update by the kernel what fits it; the rest is returned."""
    library = library_or_none()
    if library is None:
        return slots
    fitting, others = _sorted(slots)
    if fitting:
        getattr(library, rule)(_described(fitting), ctypes.c_int64(len(fitting)))
    return others


def _sorted(slots: Sequence[Slot]) -> tuple[list[Slot], list[Slot]]:
    """Those that the kernel can take, and the others."""
    fitting: list[Slot] = []
    others: list[Slot] = []
    for slot in slots:
        (fitting if _is_in_one_order(slot) else others).append(slot)
    return fitting, others


def _is_in_one_order(slot: Slot) -> bool:
    """Whether all tensors of ``slot`` lie in memory in the same order, without gaps."""
    # Gradient and moments have been brought into the order of the weight, if it has one.
    weight, slow = slot.weight.data, slot.slow
    return is_dense(weight) and (slow is None or in_one_order(slow.data, weight))


# The C structures Stored and Parameter: its tensors and size, then its constants; 0q pads as C does.
_STORED, _NO_TENSOR = "PPiI", (0, 0, 0, 0)
_TENSORS = struct.Struct(f"@{_STORED * 6}q")
_NAMES = [field.name for field in fields(Constants)]
_CONSTANTS = struct.Struct(f"@{len(_NAMES) - 1}fi0q")
_values_of = attrgetter(*_NAMES)


def _described(slots: Sequence[Slot]) -> bytes:
    """``slots`` as the kernel reads them; they must outlive it."""
    parts: list[bytes] = []
    last, constants = None, b""
    for slot in slots:
        if slot.constants is not last:
            last = slot.constants
            constants = _CONSTANTS.pack(*_values_of(last))
        parts.append(
            _TENSORS.pack(
                *_stored(slot.weight),
                *_stored(slot.gradient),
                *_stored(slot.first),
                *_stored(slot.second),
                *_stored(slot.maximum),
                *_stored(slot.slow),
                slot.weight.data.numel(),
            )
        )
        parts.append(constants)
    return b"".join(parts)


def _stored(stored: Stored | None) -> tuple[int, int, int, int]:
    if stored is None:
        return _NO_TENSOR
    low = 0 if stored.low is None else stored.low.data_ptr()
    return stored.data.data_ptr(), low, stored.format, stored.seed
