"""``optcpu bench`` shows the machine's limits as a table or as JSON."""

from __future__ import annotations

import json

import pytest

from optcpu.cli import main
from optcpu.measure import roofline
from tests.optcpu.measure.conftest import LIMITS


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nothing is measured; with how many threads it would have been."""
    asked: list[int] = []

    def measured(threads: int) -> roofline.Limits:
        asked.append(threads)
        return LIMITS

    monkeypatch.setattr(roofline, "measure_limits", measured)
    return asked


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--roofline"]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["products", "in", "bf16,", "onednn", "960", "GFLOP"] in shown
    assert ["update", "in", "place", "32", "GB"] in shown
    assert ["first", "touch,", "huge", "pages", "18", "GB"] in shown


def test_json(capsys: pytest.CaptureFixture[str], threads: list[int]) -> None:
    assert main(["bench", "--roofline", "--json", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out) == LIMITS.to_dict()
    assert threads == [1]


def test_what_to_measure_must_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench"])
    assert "--roofline" in capsys.readouterr().err
