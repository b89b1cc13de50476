from __future__ import annotations

import math

import pytest

from optcpu.measure.numbers import figure


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (1234.5, "1234"),
        (96.04, "96.0"),
        (5.678, "5.68"),
        (0.3456, "0.346"),
        (0.0, "0.000"),
        (1e-5, "1.0e-05"),
        (12345678.0, "1.2e+07"),
        (math.nan, "nan"),
    ],
)
def test_figures(value: float | None, text: str) -> None:
    assert figure(value) == text
