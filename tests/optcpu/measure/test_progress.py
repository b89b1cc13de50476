from __future__ import annotations

import io
import sys

import pytest

from optcpu.measure import progress
from optcpu.measure.progress import Reporter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_phases_are_lines_and_details_are_rare(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Reporter(None, total=2) as reporter:
        reporter.phase("one")
        reporter.detail("too soon")
        now += 11
        reporter.detail("late enough")
        reporter.detail("too soon again")
    told = capsys.readouterr()
    assert told.err.splitlines() == ["optcpu compare: one", "optcpu compare: one: late enough"]
    assert told.out == ""


def test_it_can_be_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(False, total=2) as reporter:
        reporter.phase("one")
        reporter.detail("two")
        reporter.tick()
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Reporter(None, total=2) as reporter:
        reporter.phase("one")
        reporter.detail("half")
        reporter.phase("two")
        reporter.tick()
    assert "one: half" in terminal.getvalue()
    assert "\x1b[" in terminal.getvalue()
