"""The options of a comparison, checked before anything is started."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from numbers import Real
from typing import Any

_PRECISIONS = ("auto", "bf16", "fp32")


def check_options(
    *,
    steps: int,
    rounds: int,
    round_seconds: float,
    accumulation_steps: int,
    precision: str,
    unit: str,
    units_per_batch: int | None,
    threads: int | None,
    cold: bool,
    progress: bool | None,
    name: str | None,
    variants: Collection[str] | None,
) -> None:
    """Check the options of :func:`optcpu.compare`, as far as they need no model.

    Raises:
        ValueError: one has a wrong type or is out of its range; the message names it.
    """
    _check_count("steps", steps)
    _check_count("rounds", rounds)
    _check_count("accumulation_steps", accumulation_steps)
    if units_per_batch is not None:
        _check_count("units_per_batch", units_per_batch)
    if threads is not None:
        _check_threads(threads)
    _check_seconds("round_seconds", round_seconds)
    if precision not in _PRECISIONS:
        raise ValueError(f"precision must be 'auto', 'bf16' or 'fp32', not {precision!r}.")
    _check_text("unit", unit, "what is counted, such as 'tokens'")
    if name is not None:
        _check_text("name", name, "the title of the table, or None for the class of the model")
    _check_switch("cold", cold)
    if progress is not None:
        _check_switch("progress", progress)
    if variants is not None:
        _check_names(variants)


def _check_count(option: str, value: Any) -> None:
    # True is an int to Python, but nobody means one step by it.
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{option} must be a whole number of at least 1, not {value!r}.")


def _check_threads(value: Any) -> None:
    _check_count("threads", value)
    most = os.cpu_count()
    if most is not None and value > most:
        raise ValueError(
            f"threads must be at most {most}, the hardware threads of this machine, not {value}: "
            "more would only get in each other's way."
        )


def _check_seconds(option: str, value: Any) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(
            f"{option} must be positive and finite, a number of seconds, not {value!r}."
        )


def _check_text(option: str, value: Any, meaning: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{option} must be a text, {meaning}, not {value!r}.")


def _check_switch(option: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{option} must be True or False, not {value!r}.")


def _check_names(value: Any) -> None:
    # Not an iterator, which would be empty when it is read again.
    if not isinstance(value, Collection) or not all(isinstance(name, str) for name in value):
        raise ValueError(
            f"variants must be a list of names, such as ['compiled-bf16', 'optcpu'], not {value!r}."
        )
