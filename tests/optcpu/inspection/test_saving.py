"""An inspection is written to files that are what their names say, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from optcpu.errors import OptcpuError
from optcpu.inspect import Inspection, inspect


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    return inspect(nn.Linear(2, 2), torch.randn(1, 2), train=False)


@pytest.mark.parametrize(
    ("method", "name", "better"),
    [("save", "x.weird", "x.html"), ("save", "x.json", "x.html"), ("to_json", "x.html", "x.json")],
)
def test_another_suffix_is_refused(
    inspection: Inspection, tmp_path: Path, method: str, name: str, better: str
) -> None:
    with pytest.raises(ValueError, match=rf"{name}' ends in .* as in '.*{better}'$"):
        getattr(inspection, method)(tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("method", ["save", "to_json"])
@pytest.mark.parametrize("name", ["nowhere/graphs", "file/graphs", ""])
def test_what_cannot_be_written_is_told(
    inspection: Inspection, tmp_path: Path, method: str, name: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptcpuError, match=r"cannot write .*nothing is lost"):
        getattr(inspection, method)(tmp_path / name)


def test_pages_and_json_are_written(inspection: Inspection, tmp_path: Path) -> None:
    inspection.save(tmp_path / "graphs.html")
    assert (tmp_path / "graphs.html").read_text(encoding="utf-8").startswith("<!")
    text = inspection.to_json(tmp_path / "graphs.json")
    assert (tmp_path / "graphs.json").read_text(encoding="utf-8") == text
