"""``optcpu doctor``."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from optcpu.commands.arguments import add_traceback

if TYPE_CHECKING:
    from optcpu.commands.arguments import Commands


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        help="look at what this machine can do, and at what is missing",
        description="Look at processor, threads, compiler, allocator and libraries, and say what "
        "to do about what is missing. Exit status 1 if optcpu cannot be used at all.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_traceback(parser)
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from optcpu import doctor

    findings = doctor.examine()
    if arguments.json:
        print(json.dumps([finding.as_dict() for finding in findings], indent=2))
    else:
        doctor.show(findings, Console(highlight=False))
    return 0 if doctor.usable(findings) else 1
