"""A training run in a file: TOML in, a trainer out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from optcpu.errors import OptcpuError
from optcpu.runtime.jobs import job
from optcpu.runtime.options import TrainerOptions
from optcpu.runtime.reading import group_at, read_options
from optcpu.runtime.trainer import Trainer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LONGEST = 40  # characters of a setting in a message


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
    except (ValueError, RecursionError) as error:
        raise OptcpuError(f"a setting in {path} is {_unreadable(error)}") from error
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
        ValueError: there is no ``=``, more than one setting, or a value that Python cannot read.
    """
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise ValueError(f"expected NAME=VALUE, as in optimizer.lr=0.01, got {text!r}")
    name = name.strip()
    try:
        read = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return name, value.strip()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is {_short(value.strip())}, {_unreadable(error)}") from None
    if len(read) > 1:
        raise ValueError(
            f"expected one NAME=VALUE, got {_short(text)} with {len(read)} settings: give each by itself"
        )
    return name, read["value"]


def _unreadable(error: Exception) -> str:
    """What is wrong with TOML that Python cannot take, though it may be right."""
    wrong = "nested too deeply" if isinstance(error, RecursionError) else "of too many digits"
    return f"{wrong}; a number, a text or a list of some was expected"


def _short(text: str) -> str:
    return repr(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


def _set(settings: dict[str, Any], path: list[str], value: Any) -> None:
    *groups, name = path
    for depth, group in enumerate(groups, start=1):
        inner = settings.setdefault(group, {})
        shorthand = group_at(RunConfig, path[:depth]).shorthand
        if isinstance(inner, str) and shorthand is not None:
            inner = settings[group] = {shorthand: inner}
        elif not isinstance(inner, dict):
            raise ValueError(
                f"{group} is {inner!r}, not a group of settings with one named {name!r}"
            )
        settings = inner
    kind = group_at(RunConfig, path)
    if isinstance(value, str) and kind is not group_at(RunConfig, groups):
        if kind.shorthand is None:
            raise ValueError(
                f"{'.'.join(path)} is {value!r}, but that is a group of settings: give one of them, as in "
                f"{'.'.join(path)}.{next(iter(kind.model_fields))}=VALUE; there are "
                f"{', '.join(kind.model_fields)}"
            )
        if isinstance(settings.get(name), dict):
            settings, name = settings[name], kind.shorthand
    settings[name] = value


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
