"""``optcpu train``."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from optcpu.commands.arguments import add_traceback, look_here_for_modules

if TYPE_CHECKING:
    from optcpu.commands.arguments import Commands
    from optcpu.runtime.trainer import TrainingResult


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "train",
        help="train a model as a file describes it",
        description="Train a model, validate it, and write checkpoints and metrics, as a TOML file "
        "describes it. Started again, an interrupted run goes on where it was. Under torchrun "
        "(torchrun --nproc-per-node 2 -m optcpu train ...) several processes train together.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the TOML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="overrides",
        help="a setting that comes before the file's, e.g. optimizer.lr=0.01; may be repeated",
    )
    parser.add_argument(
        "--no-progress", action="store_false", dest="progress", help="do not show progress"
    )
    add_traceback(parser)
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from optcpu.runtime.config import make_trainer, parse_override, read_config

    look_here_for_modules()
    overrides = dict(parse_override(text) for text in arguments.overrides)
    if not arguments.progress:
        overrides["progress"] = False
    trainer = make_trainer(read_config(Path(arguments.config), overrides))
    result = trainer.train()
    if trainer.is_first_process:
        Console(highlight=False).print(_summary(result))
    if result.stopped_by is None:
        return 0
    return 128 + getattr(signal, result.stopped_by, signal.SIGTERM)


def _summary(result: TrainingResult) -> str:
    ended = f"stopped by {result.stopped_by}; start again to go on" if result.stopped_by else "done"
    lines = [f"{ended}: {result.steps} steps, {result.epochs} epochs, {result.samples} samples"]
    if result.stop_reason is not None:
        lines.append(f"ended early: {result.stop_reason}")
    if result.metrics:
        told = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
        lines.append(f"validation: {told}")
    lines.append(
        "seconds: " + ", ".join(f"{phase} {spent:.1f}" for phase, spent in result.seconds.items())
    )
    return "\n".join(lines)
