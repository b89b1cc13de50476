"""A comparison as JSON and as CSV, a suite as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optcpu import files

if TYPE_CHECKING:
    from optcpu.measure.result import Comparison
    from optcpu.measure.suite import Suite


def to_json(result: Comparison | Suite, path: str | Path | None) -> str:
    """The result as JSON; NaN and infinities, which JSON does not have, become null.

    ``path`` as in :meth:`Comparison.to_json`.
    """
    target = None if path is None else files.path_for(path, "to_json", "JSON", ".json")
    text = json.dumps(_finite(result.to_dict()), indent=2, allow_nan=False) + "\n"
    if target is not None:
        files.write(target, text.encode(), "to_json")
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value


def to_csv(comparison: Comparison, path: str | Path | None) -> str:
    """The rows as CSV; figures per round or step and tracebacks are left to the JSON.

    ``path`` as in :meth:`Comparison.to_csv`.
    """
    target = None if path is None else files.path_for(path, "to_csv", "CSV", ".csv")
    left_out = ("step_ms_spread", "rounds_ms", "losses", "failure_log", "notes")
    names = [field.name for field in fields(comparison.rows[0]) if field.name not in left_out]
    extra = ["step_ms_fastest", "step_ms_slowest", "notes"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names + extra)
    for row in comparison.rows:
        spread = row.step_ms_spread or (None, None)
        writer.writerow([*(getattr(row, name) for name in names), *spread, "; ".join(row.notes)])
    text = buffer.getvalue()
    if target is not None:
        files.write(target, text.encode(), "to_csv")
    return text
