from __future__ import annotations

import io

import pytest
from rich.console import Console

from optcpu.doctor import Finding, show


@pytest.mark.parametrize("width", [40, 80, 120])
def test_table_fits_and_cuts_nothing(width: int) -> None:
    console = Console(width=width, file=io.StringIO())
    path = "/a/very/long/path/" + "x" * 100
    show([Finding("compile cache", "warning", path, f"rm {path}")], console)
    text = console.file.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    assert "".join(text.split()).count("x" * 100) == 2
