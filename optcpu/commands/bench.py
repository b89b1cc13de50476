"""``optcpu bench``."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from optcpu.commands.arguments import add_traceback, positive

if TYPE_CHECKING:
    from optcpu.commands.arguments import Commands


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "bench",
        help="measure what this machine can do at best",
        description="Measure what this machine can do at best: matrix products by data type and "
        "library, streaming, and the first touch of fresh memory. Training is compared with that.",
    )
    parser.add_argument(
        "--roofline", action="store_true", required=True, help="measure the machine's limits"
    )
    parser.add_argument(
        "--threads",
        type=positive(int),
        metavar="N",
        help="threads to compute with (default: torch's own choice)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_traceback(parser)
    parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from optcpu.cpu import capabilities
    from optcpu.measure import report
    from optcpu.measure.machine import describe_machine
    from optcpu.measure.roofline import measure_limits

    limits = measure_limits(arguments.threads or torch.get_num_threads())
    if arguments.json:
        print(json.dumps(limits.to_dict(), indent=2))
        return 0
    console = Console(highlight=False)
    console.print(f"[dim]{describe_machine(capabilities(), limits.threads)}[/]\n")
    console.print(report.limits_table(limits))
    return 0
