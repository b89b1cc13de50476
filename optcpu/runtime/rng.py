"""Where the random generators stand, in a form that a checkpoint can hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """The state of Python's, NumPy's global and PyTorch's CPU generator; see :func:`set_rng_state`."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
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


def _set(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
