"""``optcpu inspect``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from optcpu.commands.arguments import (
    add_precision,
    add_workload_options,
    check_writable,
    workload_from,
)

if TYPE_CHECKING:
    from optcpu.commands.arguments import Commands


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "inspect",
        help="show what optcpu does to a model's graphs",
        description="Show the captured, forward and backward graphs of a model before and after "
        "each pass, what each pass did, and what runs eagerly and why.",
    )
    add_workload_options(parser)
    add_precision(parser)
    parser.add_argument(
        "--output",
        default="graphs.html",
        metavar="FILE",
        help="web page to write (default: %(default)s)",
    )
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from optcpu.inspect import inspect
    from optcpu.inspection.page import page_path
    from optcpu.measure.batches import call_model

    console = Console(highlight=False)
    page = page_path(arguments.output)
    job = workload_from(arguments)
    check_writable(page)
    console.print(f"[bold]{job.name}[/]: {job.description}")
    batch, loss = job.batches[0], job.loss
    inputs, keywords = call_model(lambda *args, **kwargs: (args, kwargs), batch)
    inspection = inspect(
        job.model,
        *inputs,
        precision=arguments.precision,
        loss=None if loss is None else lambda output: loss(output, batch),
        train=True,
        **keywords,
    )
    console.print(inspection)
    inspection.save(page)
    console.print(f"graphs: {page}")
    return 0
