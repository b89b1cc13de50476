from __future__ import annotations

import io

from rich.console import Console

from optcpu.doctor import Finding, show


def test_table_fits_80_columns_and_cuts_nothing() -> None:
    console = Console(width=80, file=io.StringIO())
    path = "/a/very/long/path/" + "x" * 100
    show([Finding("compile cache", "warning", path, f"rm {path}")], console)
    text = console.file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "".join(text.split()).count("x" * 100) == 2
