"""The update rules as one C++ kernel for all tensors at once, or in PyTorch where there is none."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from optcpu.optim import rules
from optcpu.optim.formats import Stored
from optcpu.optim.rules import Slot
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
    strides = slot.weight.data.stride()
    return is_dense(slot.weight.data) and all(
        stored.data.stride() == strides for stored in _tensors_of(slot) if stored is not None
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether the numbers of ``tensor`` lie in memory without gaps, in whatever order."""
    if tensor.is_contiguous():
        return True
    # Only such an order is kept by a new tensor that is made like it.
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


_TENSORS = ("weight", "gradient", "first", "second", "maximum", "slow")
_CONSTANTS = (
    "gradient_scale",
    "coupled_decay",
    "shrink",
    "update_decay",
    "beta1",
    "beta2",
    "rest1",
    "rest2",
    "epsilon",
    "lr",
    "step_size",
    "root_scale",
    "ratio_limit",
    "slow_step",
)
# The C structures Stored and Parameter; 0q pads as C does.
_STORED = "PPiI"
_PARAMETER = struct.Struct(f"@{_STORED * len(_TENSORS)}q{len(_CONSTANTS)}fi0q")
_NO_TENSOR = (0, 0, 0, 0)
_tensors_of, _constants_of = attrgetter(*_TENSORS), attrgetter(*_CONSTANTS)


def _described(slots: Sequence[Slot]) -> bytes:
    """``slots`` as the kernel reads them; they must outlive it."""
    return b"".join(
        _PARAMETER.pack(
            *chain.from_iterable(map(_stored, _tensors_of(slot))),
            slot.weight.data.numel(),
            *_constants_of(slot),
            slot.nesterov,
        )
        for slot in slots
    )


def _stored(stored: Stored | None) -> tuple[int, int, int, int]:
    if stored is None:
        return _NO_TENSOR
    low = 0 if stored.low is None else stored.low.data_ptr()
    return stored.data.data_ptr(), low, stored.format, stored.seed
