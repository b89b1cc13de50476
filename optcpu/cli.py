"""The command line: ``optcpu compare``, ``inspect``, ``train``, ``bench``, ``doctor``.

torch takes seconds to import, so every command imports what it needs when it runs; ``--help`` and
``--version`` answer at once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import os
import sys
from collections.abc import Sequence

from optcpu.commands import bench, compare, doctor, inspect, train
from optcpu.errors import OptcpuError, notes_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        Exit status: 0 if all went well; 1 if ``doctor`` found what makes optcpu unusable, or if
        optcpu failed in ``compare``; 2 for wrong input; 130 if interrupted, and 128 and the signal's
        number if ``train`` was stopped by one.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Where the output has no UTF-8, a sign that it lacks becomes "?".
            stream.reconfigure(errors="replace")
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.run is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        status: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print("\noptcpu: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has left; nothing more may be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OptcpuError, ValueError, TypeError) as error:
        if arguments.traceback:
            raise
        print(f"optcpu: {_one_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if arguments.traceback or not notes_of(error):  # which errors of the user's code have
            raise
        what = f"{type(error).__name__}: {_one_line(error)}"
        print(f"optcpu: {what} (--traceback shows where it comes from)", file=sys.stderr)
        return 2
    return status


def _one_line(error: Exception) -> str:
    told = "; ".join(filter(None, [str(error), *notes_of(error)]))
    return " ".join(told.split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="optcpu",
        description="Train PyTorch models on CPUs close to the hardware's limit.",
    )
    parser.add_argument("--version", action="version", version=f"optcpu {_version()}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in (compare, inspect, train, bench, doctor):
        command.add(commands)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("optcpu")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
