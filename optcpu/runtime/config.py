"""A training run in a file: TOML in, a trainer out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from optcpu.errors import OptcpuError
from optcpu.runtime.jobs import job
from optcpu.runtime.options import TrainerOptions, read_options
from optcpu.runtime.trainer import Trainer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class RunConfig(TrainerOptions):
    """A whole run.

    Attributes:
        job: what is trained: one of :data:`optcpu.runtime.jobs.BUILT_IN`, or
            ``"package.module:factory"``.
    """

    job: str


def read_config(path: Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """The run that a TOML file describes.

    Args:
        path: of the file.
        overrides: settings by dotted names, as in ``{"optimizer.lr": 0.01}``, that come before it;
            ``steps`` stands in for the file's ``epochs``, and the other way round.

    Raises:
        OptcpuError: the file cannot be read or is not TOML.
        ValueError: a setting is unknown, out of range, or not the group that an override takes it for.
    """
    try:
        with path.open("rb") as file:
            settings = tomllib.load(file)
    except OSError as error:
        raise OptcpuError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptcpuError(f"{path} is not TOML: {error}") from error
    overrides = overrides or {}
    for length, other in (("steps", "epochs"), ("epochs", "steps")):
        if length in overrides and other not in overrides:
            settings.pop(other, None)
    for name, value in overrides.items():
        _set(settings, name.split("."), value)
    return read_options(RunConfig, settings, str(path))


def parse_override(text: str) -> tuple[str, Any]:
    """``"optimizer.lr=0.01"`` as name and value; the value is read as TOML, or else as a string.

    Raises:
        ValueError: there is no ``=``.
    """
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise ValueError(f"expected NAME=VALUE, as in optimizer.lr=0.01, got {text!r}")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()


def _set(settings: dict[str, Any], path: list[str], value: Any) -> None:
    *groups, name = path
    for group in groups:
        inner = settings.setdefault(group, {})
        if isinstance(inner, str):
            inner = settings[group] = {_shorthand_of(group): inner}
        elif not isinstance(inner, dict):
            raise ValueError(
                f"{group} is {inner!r}, not a group of settings with one named {name!r}"
            )
        settings = inner
    present = settings.get(name)
    if isinstance(value, str) and isinstance(present, dict):
        present[_shorthand_of(name)] = value
    else:
        settings[name] = value


def _shorthand_of(group: str) -> str:
    """The setting that a value in place of the whole group stands for, as in ``optimizer = "lamb"``."""
    return "folder" if group in ("checkpoints", "log") else "name"


def make_trainer(config: RunConfig) -> Trainer:
    """The trainer for a run."""
    what = job(config.job, config.seed)
    given = config.model_fields_set & set(TrainerOptions.model_fields)
    settings = {name: getattr(config, name) for name in given}
    return Trainer(
        what.model,
        what.train_data,
        loss=what.loss,
        validation_data=what.validation_data,
        metrics=what.metrics,
        **settings,
    )
