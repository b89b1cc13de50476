"""``optcpu compare``."""

from __future__ import annotations

import argparse
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

from optcpu.commands.arguments import (
    add_precision,
    add_timing_options,
    add_workload_options,
    check_writable,
    output_prefix,
    positive,
    workload_from,
)

if TYPE_CHECKING:
    from rich.console import Console

    from optcpu.commands.arguments import Commands
    from optcpu.compare import Comparison

_DATA_SUFFIXES = (".json", ".csv", ".png")


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "compare",
        help="train a model as it is, compiled, and with optcpu, and show what was gained",
        description="Train a model as it is, compiled, and with optcpu, in turn; print a table of "
        "time, throughput, memory and error, and save it as JSON, CSV and PNG.",
    )
    add_workload_options(parser)
    parser.add_argument(
        "--steps",
        type=positive(int),
        default=50,
        metavar="N",
        help="training steps after which the losses are compared (default: %(default)s)",
    )
    parser.add_argument(
        "--accumulation",
        type=positive(int),
        default=1,
        metavar="N",
        help="batches per optimizer step (default: %(default)s)",
    )
    add_timing_options(parser)
    add_precision(parser)
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from optcpu.compare import compare

    console = Console(highlight=False)
    job = workload_from(arguments)
    prefix = output_prefix(
        arguments.output, f"optcpu-compare-{_file_name(job.name)}", _DATA_SUFFIXES
    )
    check_writable(prefix)
    console.print(f"[bold]{job.name}[/]: {job.description}")
    comparison = compare(
        job.model,
        list(job.batches),
        loss=job.loss,
        steps=arguments.steps,
        variants=arguments.variants,
        rounds=arguments.rounds,
        round_seconds=arguments.round_seconds,
        accumulation_steps=arguments.accumulation,
        precision=arguments.precision,
        unit=job.unit,
        units_per_batch=job.units_per_batch,
        threads=arguments.threads,
        progress=None if arguments.progress else False,
        name=job.name,
    )
    console.print(comparison)
    _save(comparison, prefix, console)
    return 1 if any(row.failed for row in comparison.rows if row.kind == "optcpu") else 0


def _save(comparison: Comparison, prefix: Path, console: Console) -> None:
    comparison.to_json(Path(f"{prefix}.json"))
    comparison.to_csv(Path(f"{prefix}.csv"))
    console.print(f"figures: {prefix}.json, {prefix}.csv")
    if importlib.util.find_spec("matplotlib") is None:
        console.print("chart: none, as matplotlib is missing; remedy: pip install matplotlib")
        return
    comparison.plot(Path(f"{prefix}.png"))
    console.print(f"chart: {prefix}.png")


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)
