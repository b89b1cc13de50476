from __future__ import annotations

import io
import logging
import sys

import pytest

from optcpu.runtime.display import Display, duration


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _not_asked() -> tuple[None, None]:
    raise AssertionError("an estimate takes time, and nothing is shown now")


def test_durations() -> None:
    assert [duration(s) for s in (None, 0.4, 59.6, 61, 3723)] == [
        "?",
        "0:00",
        "1:00",
        "1:01",
        "1:02:03",
    ]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Display(None, total=40, done=10) as display:
        display.step(11, 0, 1.25, lambda: (321.0, 95.0))
        display.step(12, 0, 9.75, _not_asked)  # too soon to be drawn
        assert "11/40" in terminal.getvalue()
        display.phase("validation")
        display.message("validation loss 0.5")
    drawn = terminal.getvalue()
    assert "12/40" in drawn, "what other phases come after is told exactly"
    assert "epoch 1  loss 1.2500  321 samples/s  1:35 left" in drawn
    assert "9.75" not in drawn
    assert "validation loss 0.5" in drawn


def test_logging_to_the_terminal_comes_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    handler = logging.StreamHandler()
    logger = logging.getLogger("optcpu.trainer")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with Display(None, total=4, done=0) as display:
            logger.warning("a warning")
            display.message("a message")
        assert handler.stream is terminal
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    for line in ("a warning", "a message"):
        # The bar is wiped away before, and drawn anew after a line of its own.
        assert f"\x1b[2K{line}\n" in terminal.getvalue()


def test_lines_elsewhere(capfd: pytest.CaptureFixture[str]) -> None:
    with Display(None, total=None, done=0) as display:
        display.step(1, 0, 1.0, lambda: (None, None))
        display.step(2, 0, 1.0, lambda: (None, None))
        display.message("a message")
    assert capfd.readouterr().err.splitlines() == [
        "step 1  epoch 1  loss 1.0000  ? left",
        "a message",
    ]


def test_lines_go_through_logging_where_somebody_listens(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("optcpu.trainer")
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        Display(None, total=None, done=0).message("a message")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert seen == ["a message"]
    assert capfd.readouterr().err == ""


def test_nothing_where_nothing_is_wanted(capfd: pytest.CaptureFixture[str]) -> None:
    with Display(False, total=3, done=0) as display:
        display.step(1, 0, 1.0, lambda: (None, None))
        display.phase("validation")
        display.message("a message")
    assert capfd.readouterr().err == ""
