from __future__ import annotations

import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from optcpu.errors import OptcpuError
from optcpu.measure.result import Comparison, Row

MakeRow = Callable[..., Row]
MakeComparison = Callable[..., Comparison]

needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="no matplotlib")
_PNG = b"\x89PNG\r\n\x1a\n"


@needs_matplotlib
def test_a_png_is_drawn_whatever_the_figures_are(
    row: MakeRow, comparison: MakeComparison, tmp_path: Path
) -> None:
    made = comparison(
        row("zentorch", "peer", 10.0, learned=False, gradient_error=math.nan),
        row("optcpu", "optcpu", 50.0, gradient_error=0.0),
        Row("optcpu+optimizer", "optcpu", failed="RuntimeError: no"),
        name="costs $5, {x}_1^2 \\ 100 %",
    )
    assert made.plot(tmp_path / "chart.png") == tmp_path / "chart.png"
    assert (tmp_path / "chart.png").read_bytes().startswith(_PNG)


@needs_matplotlib
def test_a_reference_alone_can_be_drawn(comparison: MakeComparison, tmp_path: Path) -> None:
    made = comparison()
    made.rows = made.rows[:1]
    made.plot(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(_PNG)


def test_without_matplotlib_the_remedy_is_named(
    comparison: MakeComparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OptcpuError, match=r"pip install optcpu\[plot\]"):
        comparison().plot(tmp_path / "chart.png")
