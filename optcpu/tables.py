"""Reports as text: tables whose figures are never cut off, however narrow the terminal is."""

from __future__ import annotations

import copy
import io
import shutil
import textwrap
from collections.abc import Iterator

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_TEXT_WIDTH = 100  # where the output has no width of its own
_NARROWEST = 12  # of a column whose text may be broken into lines
_INDENT = "  "
_NO_BREAK = "\N{NO-BREAK SPACE}"


def to_text(report: RenderableType, width: int | None = None) -> str:
    """A report as plain text, ``width`` columns wide (default: the terminal's)."""
    columns = width or shutil.get_terminal_size((_TEXT_WIDTH, 24)).columns
    console = Console(file=io.StringIO(), width=columns, color_system=None)
    console.print(report)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def plain_table() -> Table:
    """An empty table with a line below its headings and no other."""
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)


def sentence(text: str, style: str) -> Padding:
    """A line of text below a table, or as many as it takes."""
    return Padding(Text(text, style), (0, 0, 0, 1))


class FirstThatFits:
    """The first of several forms of a table that there is room for.

    There is room if no column that must not wrap has to be cut. Where no form fits, the rows of the
    first table are written below each other, each figure with its heading.
    """

    def __init__(self, *forms: Table | Group) -> None:
        self._forms = forms

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for form in self._forms:
            if all(_needs(t, console, options) <= options.max_width for t in _tables(form)):
                yield form
                return
        yield from _rows(next(_tables(self._forms[0])), options.max_width)


def _tables(form: Table | Group) -> Iterator[Table]:
    parts = form.renderables if isinstance(form, Group) else [form]
    return (part for part in parts if isinstance(part, Table))


def _needs(table: Table, console: Console, options: ConsoleOptions) -> int:
    """The columns of text below which something in the table would be cut off."""
    narrow = copy.copy(table)
    narrow.columns = [copy.copy(column) for column in table.columns]
    for column in narrow.columns:
        if not column.no_wrap:
            column.max_width = _NARROWEST
    return Measurement.get(console, options.update(width=10_000), narrow).maximum


def _rows(table: Table, width: int) -> Iterator[Text]:
    """Each row as "name: heading figure, heading figure, ..."; a figure stays with its heading."""
    headings = [" ".join(str(column.header).split()) for column in table.columns]
    rows = zip(*(column.cells for column in table.columns), strict=True)
    for row, (name, *cells) in zip(table.rows, rows, strict=True):
        told = [f"{h} {c}" for h, c in zip(headings[1:], cells, strict=True) if str(c)]
        unbroken = [t.replace(" ", _NO_BREAK) if len(t) < width - len(_INDENT) else t for t in told]
        text = textwrap.fill(
            f"{name}: {', '.join(unbroken)}",
            width,
            subsequent_indent=_INDENT,
            break_on_hyphens=False,
        )
        yield Text(text.replace(_NO_BREAK, " "), style=row.style or "")
