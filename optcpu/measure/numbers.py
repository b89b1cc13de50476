"""Numbers as reports show them."""

from __future__ import annotations

import math


def figure(value: float | None) -> str:
    """Three significant digits, without an exponent where that stays short."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    magnitude = abs(value)
    if magnitude >= 1e6 or 0 < magnitude < 1e-3:
        return f"{value:.1e}"
    digits = 0 if magnitude >= 100 else 1 if magnitude >= 10 else 2 if magnitude >= 1 else 3
    return f"{value:.{digits}f}"
