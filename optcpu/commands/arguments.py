"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TypeAlias

    from optcpu.workloads import Workload

    Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_MODEL_HELP = (
    "mlp (default), gpt2-small, encoder, digits-cnn, small-cnn, resnet18, vit-tiny, lstm, or your own as "
    "package.module:factory (see optcpu.workloads.workload)"
)


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what is trained."""
    parser.add_argument("--model", default="mlp", metavar="NAME", help=_MODEL_HELP)
    parser.add_argument(
        "--batch-size",
        type=positive(int),
        metavar="N",
        help="samples in a batch (default: the model's)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of weights and data order (default: %(default)s)",
    )
    add_traceback(parser)


def add_precision(parser: argparse.ArgumentParser) -> None:
    """The option for precision."""
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of products in optcpu; auto: BF16 where the processor has it (default: %(default)s)",
    )


def add_timing_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which variants are measured, how, and where the figures go."""
    parser.add_argument(
        "--variants",
        type=names,
        metavar="A,B",
        help="measure only these, e.g. eager-fp32,optcpu (default: all that can run here)",
    )
    parser.add_argument(
        "--rounds",
        type=positive(int),
        default=5,
        metavar="N",
        help="rounds in which every variant has its turn (default: %(default)s)",
    )
    parser.add_argument(
        "--round-seconds",
        type=positive(float),
        default=1.0,
        metavar="S",
        help="length of one turn in seconds (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=positive(int),
        metavar="N",
        help="threads of each variant (default: torch's own choice)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR_OR_PREFIX",
        help="folder, or beginning of the names, of the result files (default: here)",
    )
    parser.add_argument(
        "--no-progress", action="store_false", dest="progress", help="do not show progress"
    )


def names(text: str) -> list[str]:
    """Names with commas between them."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("expected names with commas between them")
    return found


def output_prefix(output: str | None, default: str, suffixes: tuple[str, ...]) -> Path:
    """What the names of all result files begin with; they differ in their suffix.

    Args:
        output: what the user gave: a folder, or a prefix, which may end in one of ``suffixes``.
        default: the prefix without that, and in a folder.
        suffixes: of the result files.
    """
    if output is None:
        return Path(default)
    path = Path(output)
    if output.endswith(("/", os.sep)) or path.is_dir():
        return path / default
    return path.with_suffix("") if path.suffix in suffixes else path


def add_traceback(parser: argparse.ArgumentParser) -> None:
    """The option for more than one line about an error."""
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error comes from, in full"
    )


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """What reads a positive number of a kind."""

    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = kind(0)
        if not 0 < number < float("inf"):
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"expected a positive {what}, got {text!r}")
        return number

    return parse


def workload_from(arguments: argparse.Namespace) -> Workload:
    """The workload that the arguments name."""
    from optcpu.workloads import workload

    look_here_for_modules()
    return workload(arguments.model, batch_size=arguments.batch_size, seed=arguments.seed)


def look_here_for_modules() -> None:
    """The user's own module is looked for where the command is run, as ``python -m`` would do."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def check_writable(path: Path) -> None:
    """Fail before the work is done, not after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write into {path.parent} ({error.strerror}); choose another with --output"
        ) from error
