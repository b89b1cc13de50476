"""Where the random generators stand, in a form that a checkpoint can hold."""

from __future__ import annotations

import _random
import ctypes
import random
import sys
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """The state of Python's, NumPy's global and PyTorch's CPU generator; see :func:`set_rng_state`."""
    return {
        "python": _python.get(),
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


# A Mersenne twister in memory: 624 words and the position. Reading those takes a microsecond, where asking
# Python or NumPy for their state takes longer than a small layer, at each step of training; most programs
# never draw from either.
_MT19937_BYTES = 625 * 4


class _PythonGlobal:
    """The state of Python's global generator, read anew only where it has changed."""

    def __init__(self) -> None:
        self._generator: random.Random = random.getstate.__self__  # type: ignore[attr-defined]
        self._state = random.getstate()
        self._words = b""
        self._address = self._find()

    def get(self) -> tuple[Any, ...]:
        if self._address is None:
            return random.getstate()
        words = ctypes.string_at(self._address, _MT19937_BYTES)
        # A normal number that is kept for later belongs to the state as well.
        if words != self._words or self._generator.gauss_next != self._state[2]:  # type: ignore[attr-defined]
            self._state, self._words = random.getstate(), words
        return self._state

    def _find(self) -> int | None:
        """Where position and words lie; None where this Python has them elsewhere than CPython does."""
        header = object.__basicsize__
        if sys.implementation.name != "cpython" or not hasattr(self._generator, "gauss_next"):
            return None
        if _random.Random.__basicsize__ < header + _MT19937_BYTES:
            return None
        *words, position = self._state[1]
        expected = np.array([position, *words], dtype=np.uint32).tobytes()
        address = id(self._generator) + header
        return address if ctypes.string_at(address, _MT19937_BYTES) == expected else None


class _NumpyGlobal:
    """The state of NumPy's global generator, read anew only where it has changed.

    At most one normal number is kept for later, which comes to be by a draw and is looked at each time
    while it is there. (Only ``numpy.random.set_state`` can put one beside the same words;
    :func:`set_rng_state` sees to that.)
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


_python, _numpy = _PythonGlobal(), _NumpyGlobal()


def _set(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    _numpy.load_state_dict(state["numpy"])
    torch.set_rng_state(state["torch"])
