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
        "torch": torch.default_generator.get_state(),
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


# A Mersenne twister in memory: 624 words, and the position of the next one to draw, beside one end of them.
# Asking Python or NumPy for the state takes longer than a small layer, at each step of training, and most
# programs never draw from either. So only the position and the eight words beside it are looked at: a draw
# moves the position, and another seed, or as many draws as there are words, changes every word.
_MT19937_BYTES = 625 * 4
_MARK_BYTES = 9 * 4
_Mark = ctypes.c_char * _MARK_BYTES


class _PythonGlobal:
    """The state of Python's global generator, read anew only where it has changed."""

    def __init__(self) -> None:
        self._generator: random.Random = random.getstate.__self__  # type: ignore[attr-defined]
        self._state = random.getstate()
        self._seen = b""
        self._mark = self._find()

    def get(self) -> tuple[Any, ...]:
        if self._mark is None:
            return random.getstate()
        seen = self._mark.raw
        # A normal number that is kept for later belongs to the state as well.
        if seen != self._seen or self._generator.gauss_next != self._state[2]:  # type: ignore[attr-defined]
            self._state, self._seen = random.getstate(), seen
        return self._state

    def _find(self) -> ctypes.Array[ctypes.c_char] | None:
        """Position and first words; None where this Python has them elsewhere than CPython does."""
        header = object.__basicsize__
        if sys.implementation.name != "cpython" or not hasattr(self._generator, "gauss_next"):
            return None
        if _random.Random.__basicsize__ < header + _MT19937_BYTES:
            return None
        *words, position = self._state[1]
        expected = np.array([position, *words], dtype=np.uint32).tobytes()
        address = id(self._generator) + header
        if ctypes.string_at(address, _MT19937_BYTES) != expected:
            return None
        return _Mark.from_address(address)


class _NumpyGlobal:
    """The state of NumPy's global generator, read anew only where it has changed.

    At most one normal number is kept for later, which comes to be by a draw and is looked at each time
    while it is there. (Only ``numpy.random.set_state`` can put one beside the same words;
    :func:`set_rng_state` sees to that.)
    """

    def __init__(self) -> None:
        self._generator: Any = None
        self._state: dict[str, Any] | None = None
        self._seen = b""
        self._mark: ctypes.Array[ctypes.c_char] | None = None

    def state_dict(self) -> dict[str, Any]:
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if generator is not self._generator:
            self._generator, self._state = generator, None
            self._mark = self._find(generator)
        seen = None if self._mark is None else self._mark.raw
        if self._state is None or seen is None or seen != self._seen or self._state["has_gauss"]:
            self._state, self._seen = np.random.get_state(legacy=False), seen or b""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = None
        np.random.set_state(state)

    @staticmethod
    def _find(generator: Any) -> ctypes.Array[ctypes.c_char] | None:
        """Last words and position; None of another kind of generator."""
        if not isinstance(generator, np.random.MT19937):
            return None
        end = generator.ctypes.state_address + _MT19937_BYTES
        return _Mark.from_address(end - _MARK_BYTES)


_python, _numpy = _PythonGlobal(), _NumpyGlobal()


def _set(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    _numpy.load_state_dict(state["numpy"])
    torch.set_rng_state(state["torch"])
