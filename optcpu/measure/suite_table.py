"""A suite as a table, on a terminal and in Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from optcpu import files, tables
from optcpu.measure.numbers import figure

if TYPE_CHECKING:
    from optcpu.measure.suite import Entry, Ratio, Standing, Suite

_NONE = "-"
_HEADINGS = {  # on a terminal, and in Markdown
    "ms/step": "ms a step",
    "x\neager": "times eager FP32",
    "x\ncompile": "times compiled",
    "x best\nstock": "times the best stock variant",
    "x best\npeer": "times the best peer",
    "of\nideal": "of the ideal step",
    "x\nmemory": "memory, times the best stock variant's",
}
_MEANING = (
    "Ratios are of step times, medians over rounds in which all variants had their turn. Compiled is "
    "torch.compile as it comes, in BF16 where the processor has it; the best stock variant is the fastest "
    "of plain PyTorch's, a tuned allocator included; peers are other projects' extensions; the ideal is "
    "the products at the machine's measured peak and the update at its bandwidth."
)


def to_text(suite: Suite, width: int | None = None) -> str:
    """The table as plain text, ``width`` columns wide (default: the terminal's)."""
    return tables.to_text(render(suite), width)


def render(suite: Suite) -> RenderableType:
    """The table for a rich console; the variant is left out of a narrow one."""
    return Group(
        Text(str(suite.machine), "dim"),
        "",
        tables.FirstThatFits(_table(suite), _table(suite, named=False)),
        "",
        *(tables.sentence(told, "red") for told in _problems(suite.entries)),
        tables.sentence(_MEANING, "dim"),
    )


def to_markdown(suite: Suite, path: str | Path | None) -> str:
    """The table in Markdown; ``path`` as in :meth:`Suite.to_markdown`."""
    target = None if path is None else files.path_for(path, "to_markdown", "Markdown", ".md")
    rows = [("workload", "variant", *_HEADINGS.values()), ("---",) * (2 + len(_HEADINGS))]
    for entry in suite.entries:
        standing = entry.standing
        if standing is None:
            rows.append((entry.name, "failed", *[_NONE] * len(_HEADINGS)))
        else:
            rows.append((entry.name, standing.variant, *_figures(standing, named=True)))
    lines = [
        f"{suite.machine}.",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        *(f"{told}\n" for told in _problems(suite.entries)),
        _MEANING,
    ]
    text = "\n".join(lines) + "\n"
    if target is not None:
        files.write(target, text.encode(), "to_markdown")
    return text


def _table(suite: Suite, named: bool = True) -> Table:
    """The figures of all workloads; ``named`` says which variant they are of."""
    table = tables.plain_table()
    table.add_column("workload", no_wrap=True)
    if named:
        table.add_column("variant", no_wrap=True)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in suite.entries:
        if entry.standing is None:
            variant, figures = Text("failed", "red"), (_NONE,) * len(_HEADINGS)
        else:
            variant, figures = Text(entry.standing.variant), _figures(entry.standing)
        table.add_row(entry.name, *([variant] if named else []), *figures)
    return table


def _figures(standing: Standing, named: bool = False) -> tuple[str, ...]:
    """The cells below :data:`_HEADINGS`; ``named`` says which variant was the best."""
    return (
        figure(standing.step_ms),
        _times(standing.eager),
        _times(standing.compiled),
        _times(standing.best_stock, named),
        _times(standing.best_peer, named),
        f"{standing.of_ideal:.0%}",
        f"{standing.memory:.2f}",
    )


def _times(ratio: Ratio | None, named: bool = False) -> str:
    if ratio is None:
        return _NONE
    return f"{ratio.times:.2f} ({ratio.variant})" if named else f"{ratio.times:.2f}"


def _problems(entries: list[Entry]) -> list[str]:
    return [f"{entry.name}: {entry.problem}." for entry in entries if entry.problem is not None]
