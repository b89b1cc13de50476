from __future__ import annotations

import inspect
import math
import os
from typing import Any

import numpy as np
import pytest

from optcpu.compare import compare
from optcpu.measure.options import check_options

# What compare() itself gives to the checks that need no model.
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(compare).parameters.items()
    if parameter.default is not parameter.empty and name not in ("loss", "optimizer")
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 1, "rounds": 1, "accumulation_steps": 1, "units_per_batch": 1, "threads": 1},
        {"round_seconds": 1, "threads": os.cpu_count()},
        {"round_seconds": np.float32(0.5), "cold": False, "progress": True},
        {"variants": ("optcpu",), "unit": "tokens", "name": "a model", "precision": "bf16"},
        {"variants": {"optcpu": 1}.keys(), "progress": False},
    ],
)
def test_what_makes_sense_is_taken(options: dict[str, Any]) -> None:
    check_options(**DEFAULTS | options)


COUNTS = ("steps", "rounds", "accumulation_steps", "units_per_batch", "threads")
NOT_A_COUNT = (0, -1, 1.5, 2.0, True, "3", [3], math.nan)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        *(
            (name, value, "a whole number of at least 1")
            for name in COUNTS
            for value in NOT_A_COUNT
        ),
        *(
            ("round_seconds", value, "positive and finite, a number of seconds")
            for value in (0, -1.0, math.inf, math.nan, True, "1", None, 1j, [1.0])
        ),
        *(
            ("precision", v, "'auto', 'bf16' or 'fp32'")
            for v in ("fp16", "BF16", 3, None, ["bf16"])
        ),
        *(("unit", value, "a text") for value in ("", " ", 3, None)),
        *(("name", value, "a text") for value in ("", 3, b"name")),
        *(("cold", value, "True or False") for value in (None, 1, "no")),
        *(("progress", value, "True or False") for value in (0, "no")),
        *(("variants", value, "a list of names") for value in (3, ["optcpu", 3], [["optcpu"]])),
        *((name, None, "a whole number") for name in ("steps", "rounds", "accumulation_steps")),
    ],
)
def test_what_makes_none_is_named_with_what_is_expected(
    option: str, value: Any, expected: str
) -> None:
    with pytest.raises(ValueError, match=f"^{option} must be {expected}") as caught:
        check_options(**DEFAULTS | {option: value})
    assert repr(value) in str(caught.value)


def test_names_that_can_be_read_only_once_are_refused() -> None:
    with pytest.raises(ValueError, match="variants must be a list of names"):
        check_options(**DEFAULTS | {"variants": iter(["optcpu"])})


def test_more_threads_than_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    check_options(**DEFAULTS | {"threads": 4})
    with pytest.raises(ValueError, match=r"at most 4, the hardware threads of this machine, not 5"):
        check_options(**DEFAULTS | {"threads": 5})
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    check_options(**DEFAULTS | {"threads": 5})
