"""Where the random generators stand, in a form that a checkpoint can hold."""

from __future__ import annotations

import ctypes
import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """The state of Python's, NumPy's global and PyTorch's CPU generator; see :func:`set_rng_state`."""
    return {
        "python": random.getstate(),
        "numpy": _numpy.state_dict(),
        "torch": torch.get_rng_state(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Let the three generators go on from where they stood when :func:`rng_state` was called.

    Raises:
        ValueError: this is no such state; the generators are left as they were.
    """
    before = rng_state()
    try:
        _set(state)
    except Exception as error:
        _set(before)
        raise ValueError(
            f"this is no state of the random generators ({type(error).__name__}: {error}); it must "
            "come from rng_state(), with NumPy's global generator of the same kind"
        ) from error


class _NumpyGlobal:
    """The state of NumPy's global generator, read anew only where it has changed.

    NumPy takes as long to give it as a small model to make a step, and most programs never draw from it.
    It is a Mersenne twister's words and position, which can be compared in place, and at most one normal
    number kept for later, which comes to be by a draw and is looked at each time while it is there. (Only
    ``numpy.random.set_state`` can put one beside the same words; :func:`set_rng_state` sees to that.)
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None
        self._words = b""

    def state_dict(self) -> dict[str, Any]:
        words = self._read()
        if self._state is None or words is None or words != self._words or self._state["has_gauss"]:
            self._state, self._words = np.random.get_state(legacy=False), words or b""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = None
        np.random.set_state(state)

    def _read(self) -> bytes | None:
        """Words and position; None of another kind of generator."""
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if not isinstance(generator, np.random.MT19937):
            return None
        return ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)


_MT19937_BYTES = 625 * 4  # 624 words and the position
_numpy = _NumpyGlobal()


def _set(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    _numpy.load_state_dict(state["numpy"])
    torch.set_rng_state(state["torch"])
