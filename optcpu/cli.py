"""The command line: ``optcpu compare``, ``optcpu inspect``, ``optcpu doctor``.

torch takes seconds to import, so every command imports what it needs when it runs; ``--help`` and
``--version`` answer at once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optcpu.errors import OptcpuError

if TYPE_CHECKING:
    from typing import TypeAlias

    from rich.console import Console

    from optcpu.compare import Comparison
    from optcpu.workloads import Workload

    _Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_MODEL_HELP = (
    "mlp (default), gpt2-small, digits-cnn, or your own as package.module:factory "
    "(see optcpu.workloads.workload)"
)
_DATA_SUFFIXES = (".json", ".csv", ".png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        Exit status: 0 if all went well; 1 if ``doctor`` found what makes optcpu unusable, or if
        optcpu failed in ``compare``; 2 for wrong input; 130 if interrupted.
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
    return status


def _compare(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from optcpu.compare import compare

    console = Console(highlight=False)
    job = _workload(arguments)
    prefix = _output_prefix(arguments.output, f"optcpu-compare-{_file_name(job.name)}")
    _check_writable(prefix)
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


def _inspect(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from optcpu.inspect import inspect
    from optcpu.inspection.page import page_path
    from optcpu.measure.batches import call_model

    console = Console(highlight=False)
    page = page_path(arguments.output)
    job = _workload(arguments)
    _check_writable(page)
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


def _doctor(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from optcpu import doctor

    findings = doctor.examine()
    if arguments.json:
        print(json.dumps([finding.as_dict() for finding in findings], indent=2))
    else:
        doctor.show(findings, Console(highlight=False))
    return 0 if doctor.usable(findings) else 1


def _workload(arguments: argparse.Namespace) -> Workload:
    from optcpu.workloads import workload

    # The user's own module is looked for where the command is run, as python -m would do.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return workload(arguments.model, batch_size=arguments.batch_size, seed=arguments.seed)


def _save(comparison: Comparison, prefix: Path, console: Console) -> None:
    comparison.to_json(Path(f"{prefix}.json"))
    comparison.to_csv(Path(f"{prefix}.csv"))
    console.print(f"figures: {prefix}.json, {prefix}.csv")
    if importlib.util.find_spec("matplotlib") is None:
        console.print("chart: none, as matplotlib is missing; remedy: pip install matplotlib")
        return
    comparison.plot(Path(f"{prefix}.png"))
    console.print(f"chart: {prefix}.png")


def _output_prefix(output: str | None, default: str) -> Path:
    """What the names of all result files begin with; they differ in their suffix."""
    if output is None:
        return Path(default)
    path = Path(output)
    if output.endswith(("/", os.sep)) or path.is_dir():
        return path / default
    return path.with_suffix("") if path.suffix in _DATA_SUFFIXES else path


def _check_writable(path: Path) -> None:
    """Fail before the work is done, not after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write into {path.parent} ({error.strerror}); choose another with --output"
        ) from error


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="optcpu",
        description="Train PyTorch models on CPUs close to the hardware's limit.",
    )
    parser.add_argument("--version", action="version", version=f"optcpu {_version()}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_compare(commands)
    _add_inspect(commands)
    _add_doctor(commands)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("optcpu")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _add_compare(commands: _Commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="train a model as it is, compiled, and with optcpu, and show what was gained",
        description="Train a model as it is, compiled, and with optcpu, in turn; print a table of "
        "time, throughput, memory and error, and save it as JSON, CSV and PNG.",
    )
    _add_workload_options(parser)
    parser.add_argument(
        "--steps",
        type=_positive(int),
        default=50,
        metavar="N",
        help="training steps after which the losses are compared (default: %(default)s)",
    )
    parser.add_argument(
        "--variants",
        type=_names,
        metavar="A,B",
        help="measure only these, e.g. eager-fp32,optcpu (default: all that can run here)",
    )
    parser.add_argument(
        "--rounds",
        type=_positive(int),
        default=5,
        metavar="N",
        help="rounds in which every variant has its turn (default: %(default)s)",
    )
    parser.add_argument(
        "--round-seconds",
        type=_positive(float),
        default=1.0,
        metavar="S",
        help="length of one turn in seconds (default: %(default)s)",
    )
    parser.add_argument(
        "--accumulation",
        type=_positive(int),
        default=1,
        metavar="N",
        help="batches per optimizer step (default: %(default)s)",
    )
    _add_precision(parser)
    parser.add_argument(
        "--threads",
        type=_positive(int),
        metavar="N",
        help="threads of each variant (default: torch's own choice)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR_OR_PREFIX",
        help="folder, or beginning of the names, of the result files (default: "
        "optcpu-compare-MODEL here)",
    )
    parser.add_argument(
        "--no-progress", action="store_false", dest="progress", help="do not show progress"
    )
    parser.set_defaults(run=_compare)


def _add_inspect(commands: _Commands) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show what optcpu does to a model's graphs",
        description="Show the captured, forward and backward graphs of a model before and after "
        "each pass, what each pass did, and what runs eagerly and why.",
    )
    _add_workload_options(parser)
    _add_precision(parser)
    parser.add_argument(
        "--output",
        default="graphs.html",
        metavar="FILE",
        help="web page to write (default: %(default)s)",
    )
    parser.set_defaults(run=_inspect)


def _add_doctor(commands: _Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="look at what this machine can do, and at what is missing",
        description="Look at processor, threads, compiler, allocator and libraries, and say what "
        "to do about what is missing. Exit status 1 if optcpu cannot be used at all.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_traceback(parser)
    parser.set_defaults(run=_doctor)


def _add_workload_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="mlp", metavar="NAME", help=_MODEL_HELP)
    parser.add_argument(
        "--batch-size",
        type=_positive(int),
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
    _add_traceback(parser)


def _add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of products in optcpu; auto: BF16 where the processor has it (default: %(default)s)",
    )


def _add_traceback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error comes from, in full"
    )


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
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


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("expected names with commas between them")
    return names
