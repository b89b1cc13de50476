"""``optcpu bench``."""

from __future__ import annotations

import argparse
import importlib.util
import json
from typing import TYPE_CHECKING

from optcpu.commands.arguments import (
    add_precision,
    add_timing_options,
    add_traceback,
    check_writable,
    names,
    output_prefix,
)

if TYPE_CHECKING:
    from pathlib import Path

    from optcpu.bench import Case
    from optcpu.commands.arguments import Commands
    from optcpu.measure.suite import Suite


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "bench",
        help="compare over a suite of models, or measure what this machine can do at best",
        description="Compare optcpu with stock PyTorch and every peer that is installed, over a suite of "
        "models (half an hour, more without BF16 hardware); print a table, and save it as JSON, Markdown "
        "and PNG. With --roofline, measure what this machine can do at best instead: matrix products by "
        "data type and library, streaming, and the first touch of fresh memory; with --updates, what the "
        "updates of optimizers take.",
    )
    parser.add_argument(
        "--roofline", action="store_true", help="measure the machine's limits, and no model"
    )
    parser.add_argument(
        "--updates",
        action="store_true",
        help="measure the updates of optimizers on 51 million parameters, and no model",
    )
    parser.add_argument(
        "--json", action="store_true", help="with --roofline or --updates: print JSON"
    )
    parser.add_argument(
        "--workloads",
        type=names,
        metavar="A,B",
        help="only these of the suite, e.g. mlp,resnet18 (default: all)",
    )
    add_timing_options(parser)
    add_precision(parser)
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of weights and data order (default: %(default)s)",
    )
    add_traceback(parser)
    parser.set_defaults(run=_chosen)


def _chosen(arguments: argparse.Namespace) -> int:
    if arguments.roofline and arguments.updates:
        raise ValueError("--roofline and --updates exclude each other: give one of them")
    if arguments.roofline:
        return _roofline(arguments)
    if arguments.updates:
        return _updates(arguments)
    if arguments.json:
        raise ValueError(
            "--json goes with --roofline or --updates; the suite writes JSON to a file (--output)"
        )
    return _suite(arguments)


def _updates(arguments: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from optcpu.cpu import capabilities
    from optcpu.measure import report
    from optcpu.measure.machine import describe_machine
    from optcpu.measure.updates import measure_updates

    threads = arguments.threads or torch.get_num_threads()
    costs = measure_updates(
        threads,
        rounds=arguments.rounds,
        round_seconds=arguments.round_seconds,
        progress=None if arguments.progress else False,
    )
    if arguments.json:
        print(json.dumps([cost.to_dict() for cost in costs], indent=2))
        return 0
    console = Console(highlight=False)
    console.print(f"[dim]{describe_machine(capabilities(), threads)}[/]\n")
    console.print(report.updates_table(costs))
    console.print(
        "speedup: over PyTorch's fused AdamW, and over pytorch-optimizer's LAMB. moved: bytes a parameter "
        "that an update reads and writes; of bandwidth: their rate, by that of an addition in place. "
        "resident: bytes a parameter of weights, gradients and state.",
        style="dim",
    )
    return 0


def _roofline(arguments: argparse.Namespace) -> int:
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


def _suite(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from optcpu.bench import SUITE, cases_named, run_suite

    console = Console(highlight=False)
    cases = SUITE if arguments.workloads is None else cases_named(arguments.workloads)
    prefix = output_prefix(arguments.output, "optcpu-bench", (".json", ".md", ".png"))
    check_writable(prefix)

    def begins(case: Case) -> None:
        console.print(f"[bold]{case.name}[/] ({cases.index(case) + 1} of {len(cases)})")

    def ends(suite: Suite) -> None:
        entry = suite.entries[-1]
        sentences = [entry.problem] if entry.comparison is None else entry.comparison.verdict
        for sentence in sentences:
            console.print(f"  {sentence}", markup=False, soft_wrap=True)
        _save(suite, prefix)  # at once: nothing that was measured is lost

    suite = run_suite(
        cases,
        variants=arguments.variants,
        rounds=arguments.rounds,
        round_seconds=arguments.round_seconds,
        precision=arguments.precision,
        threads=arguments.threads,
        progress=None if arguments.progress else False,
        seed=arguments.seed,
        before=begins,
        after=ends,
    )
    console.print()
    console.print(suite)
    console.print(f"figures: {prefix}.json, {prefix}.md{_chart(suite, prefix)}")
    return 1 if any(entry.problem is not None for entry in suite.entries) else 0


def _save(suite: Suite, prefix: Path) -> None:
    suite.to_json(f"{prefix}.json")
    suite.to_markdown(f"{prefix}.md")


def _chart(suite: Suite, prefix: Path) -> str:
    if importlib.util.find_spec("matplotlib") is None:
        return "; chart: none, as matplotlib is missing; remedy: pip install matplotlib"
    return f"; chart: {suite.plot(f'{prefix}.png')}"
