"""Findings as a table."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optcpu.doctor.finding import Finding, Status

_SIGNS: dict[Status, tuple[str, str]] = {
    "ok": ("✓", "green"),
    "note": ("·", "cyan"),
    "warning": ("!", "yellow"),
    "error": ("✗", "red"),
}


def show(findings: Iterable[Finding], console: Console) -> None:
    """Print the findings for people."""
    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        sign, colour = _SIGNS[finding.status]
        told = Text(finding.detail)
        if finding.remedy:
            told.append(f"\n→ {finding.remedy}", style=colour)
        table.add_row(Text(sign, style=colour), Text(finding.check, style="bold"), told)
    console.print(table)
