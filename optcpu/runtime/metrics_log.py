"""Metrics of a run in files: CSV, JSON lines, TensorBoard."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optcpu.errors import OptcpuError, warn
from optcpu.files import remedy_for_folder, replace

COLUMNS = ("step", "epoch", "phase", "name", "value")


class MetricsLog:
    """Writes each row of metrics as soon as it is there.

    ``metrics.jsonl`` has one object a row, ``{"step": 10, "epoch": 0, "phase": "train", "loss": …}``;
    numbers that are not finite are strings, since JSON has none. ``metrics.csv`` has one line for each
    number, so that its columns are always the same: step, epoch, phase, name, value.

    Args:
        folder: made if it is not there.
        tensorboard: write event files for TensorBoard into it, too.
        after_step: rows of later steps, which a run left that was killed after its last checkpoint, are
            taken out, since these steps are made again; at 0, the files of an earlier run are renamed.
        told: phases whose row of ``after_step`` will not come again.

    Raises:
        OptcpuError: the folder cannot be written, or TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool = False,
        after_step: int = 0,
        told: Collection[str] = ("train", "validation"),
    ) -> None:
        self._jsonl, self._csv = folder / "metrics.jsonl", folder / "metrics.csv"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if after_step == 0:
                self._set_aside_earlier_run()
            self._keep_rows_until(after_step, told)
        except OSError as error:
            raise _cannot_write(folder, error) from error
        self._writer = _tensorboard_writer(folder, after_step) if tensorboard else None

    def _set_aside_earlier_run(self) -> None:
        """``metrics.csv`` becomes ``metrics-1.csv``, or the next number that is free."""
        if not _rows(self._jsonl):
            return
        numbers = itertools.count(1)
        places = ([f.with_stem(f"{f.stem}-{n}") for f in (self._jsonl, self._csv)] for n in numbers)
        free = next(place for place in places if not any(path.exists() for path in place))
        for file, place in zip((self._jsonl, self._csv), free, strict=True):
            if file.exists():
                file.rename(place)

    def _keep_rows_until(self, step: int, told: Collection[str]) -> None:
        kept = [
            row
            for row in _rows(self._jsonl)
            if row["step"] < step or (row["step"] == step and row.get("phase") in told)
        ]
        replace(self._jsonl, "".join(_line(row) for row in kept).encode())
        table = _csv_text([COLUMNS]) + "".join(_csv_text(_entries(row)) for row in kept)
        replace(self._csv, table.encode())

    def add(self, phase: str, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Write one row.

        Args:
            phase: ``"train"`` or ``"validation"``.
            step: optimizer steps made.
            epoch: epochs ended.
            metrics: numbers by name.

        Raises:
            OptcpuError: a file cannot be written.
        """
        row = {"step": step, "epoch": epoch, "phase": phase, **metrics}
        _append(self._jsonl, _line(row))
        _append(self._csv, _csv_text(_entries(row)), head=_csv_text([COLUMNS]))
        if self._writer is not None:
            with self._told():
                for name, value in metrics.items():
                    self._writer.add_scalar(f"{phase}/{name}", value, step)

    def close(self) -> None:
        """Write what is still in memory; where that fails, the other files have it, and it is only told."""
        if self._writer is None:
            return
        try:
            with self._told():
                self._writer.close()
        except OptcpuError as error:
            warn(str(error))

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tell of what TensorBoard's writer cannot write, which may be what it was given before."""
        try:
            yield
        except OSError as error:
            raise _cannot_write(self._jsonl.parent, error) from error


def _append(path: Path, text: str, head: str = "") -> None:
    """Add ``text`` to a file, behind ``head`` where somebody has removed what there was."""
    try:
        try:
            file = path.open("a", encoding="utf-8")
        except FileNotFoundError:  # the folder, too
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a", encoding="utf-8")
        with file:
            file.write(text if file.tell() else head + text)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> OptcpuError:
    return OptcpuError(
        f"cannot write metrics to {path}: {error.strerror}. {remedy_for_folder(error)}"
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a file that may end in half a row, or not be there."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _line(row: dict[str, Any]) -> str:
    plain = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(plain) + "\n"


def _entries(row: dict[str, Any]) -> list[tuple[Any, ...]]:
    place = tuple(row.get(name, "") for name in COLUMNS[:3])
    return [(*place, name, value) for name, value in row.items() if name not in COLUMNS[:3]]


def _csv_text(rows: list[tuple[Any, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _tensorboard_writer(folder: Path, after_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise OptcpuError(
            "log.tensorboard needs the tensorboard package, which is not installed; remedy: pip install "
            "tensorboard, or leave it out"
        ) from error
    # TensorBoard hides what an earlier writer put there for steps from purge_step on.
    return SummaryWriter(folder, purge_step=after_step + 1 if after_step else 0)
