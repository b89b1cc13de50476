from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from optcpu.errors import OptcpuError
from optcpu.measure.result import Comparison, Row

MakeRow = Callable[..., Row]
MakeComparison = Callable[..., Comparison]


def test_json_holds_every_figure(row: MakeRow, comparison: MakeComparison, tmp_path: Path) -> None:
    made = comparison(row("optcpu", "optcpu", 50.0))
    text = made.to_json(tmp_path / "out.json")
    assert (tmp_path / "out.json").read_text(encoding="utf-8") == text
    told = json.loads(text)
    assert told["best_stock"] == "compiled-bf16-tuned"
    assert told["machine"]["isa"] == "avx512_bf16"
    assert told["verdict"] == made.verdict
    assert told["rows"][3]["step_ms"] == 50.0
    assert told["rows"][3]["losses"] == [6.9, 0.01234]


def test_json_stays_json_where_a_loss_is_nan(row: MakeRow, comparison: MakeComparison) -> None:
    made = comparison(row("zentorch", "peer", 50.0, final_loss=math.nan, losses=[1.0, math.nan]))
    text = made.to_json()
    assert "NaN" not in text
    assert json.loads(text)["rows"][3]["losses"] == [1.0, None]


def test_csv_has_one_line_per_variant(
    row: MakeRow, comparison: MakeComparison, tmp_path: Path
) -> None:
    failed = Row("ipex", "peer", failed='RuntimeError: "a, b"\nsecond line')
    text = comparison(row("optcpu", "optcpu", 50.0), failed).to_csv(tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text(encoding="utf-8") == text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 5
    assert rows[3]["variant"] == "optcpu"
    assert float(rows[3]["step_ms_slowest"]) == 50.0 * 1.1
    assert rows[4]["failed"] == 'RuntimeError: "a, b"\nsecond line'
    assert rows[4]["step_ms"] == ""


@pytest.mark.parametrize(
    ("method", "name", "better"),
    [
        ("to_json", "x.csv", "x.json"),
        ("to_csv", "x.json", "x.csv"),
        ("plot", "x.pdf", "x.png"),
    ],
)
def test_another_suffix_is_refused(
    comparison: MakeComparison, tmp_path: Path, method: str, name: str, better: str
) -> None:
    with pytest.raises(ValueError, match=rf"{name}' ends in .*, but {method}\(\).*{better}'$"):
        getattr(comparison(), method)(tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["nowhere/x", "file/x", "folder"])
@pytest.mark.parametrize("method", ["to_json", "to_csv", "plot"])
def test_what_cannot_be_written_is_told(
    comparison: MakeComparison, tmp_path: Path, method: str, name: str
) -> None:
    if method == "plot":
        pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OptcpuError, match=rf"cannot write .*{name}: .*call {method}\(\)"):
        getattr(comparison(), method)(tmp_path / name)
