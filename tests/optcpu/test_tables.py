from __future__ import annotations

import pytest
from rich.console import Group
from rich.table import Table
from rich.text import Text

from optcpu.tables import FirstThatFits, plain_table, sentence, to_text


def table(*headings: str, note: str = "") -> Table:
    made = plain_table()
    for heading in headings:
        made.add_column(heading, no_wrap=True)
    if note:
        made.add_column("note")
    made.add_row("first", *["123456"] * (len(headings) - 1), *([note] if note else []))
    made.add_row("second", Text("failed", "red"), *[""] * (len(headings) - 2), style="red")
    return made


WIDE = table("name", "output\nerror", "the time", "memory")  # takes 32 columns
NARROW = table("name", "time")  # takes 14


@pytest.mark.parametrize(
    ("width", "heading"),
    [(200, "memory"), (32, "memory"), (31, "name    time"), (14, "name    time")],
)
def test_the_first_form_that_there_is_room_for_is_taken(width: int, heading: str) -> None:
    text = to_text(FirstThatFits(WIDE, NARROW), width)
    assert heading in text
    assert ("memory" in text) == (heading == "memory")
    assert "123456" in text
    assert "…" not in text


def test_without_room_the_rows_of_the_first_become_lines() -> None:
    assert to_text(FirstThatFits(WIDE), 31).splitlines() == [
        "first: output error 123456,",
        "  the time 123456,",
        "  memory 123456",
        "second: output error failed",
    ]
    assert to_text(FirstThatFits(WIDE, NARROW), 13).count("123456") == 3


def test_what_may_wrap_wraps_before_figures_are_cut() -> None:
    noted = FirstThatFits(table("name", "time", note="one two three four five six seven"))
    assert len(to_text(noted, 60).splitlines()) == 4
    wrapped = to_text(noted, 28)
    assert "name    time    note" in wrapped
    assert "123456  one two" in wrapped
    assert to_text(noted, 27).startswith("first: time 123456,")


def test_sentences_below_a_table_need_no_room() -> None:
    below = sentence("a long remark about all of these figures", "dim")
    text = to_text(FirstThatFits(Group(WIDE, below)), 32)
    assert "memory" in text.splitlines()[1]
    assert " a long remark about all of\n these figures" in text


def test_without_a_terminal_text_is_100_columns_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.__stdout__", None)
    assert max(map(len, to_text("word " * 100).splitlines())) in range(95, 101)
    monkeypatch.setenv("COLUMNS", "50")
    assert max(map(len, to_text("word " * 100).splitlines())) in range(45, 51)
