"""Settings read from what a user gives, and messages about those that cannot be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from optcpu.runtime.options import Options

SomeOptions = TypeVar("SomeOptions", bound=Options)

_NOT_A_GROUP = ("model_type", "model_attributes_type", "dict_type")  # pydantic's words
_EXPECTED = "; input should be "  # pydantic's words
# What settings are called elsewhere, by what they are called here.
_ELSEWHERE = {
    ("lr",): "learning_rate",
    ("weight_decay",): "wd",
    ("epochs",): "max_epochs num_epochs num_train_epochs n_epochs",
    ("steps",): "max_steps",
    ("batch_size",): "train_batch_size per_device_train_batch_size",
    ("workers",): "num_workers dataloader_num_workers",
    ("accumulation_steps",): "gradient_accumulation_steps accumulate_grad_batches grad_accum",
    ("max_grad_norm",): "gradient_clip_val gradient_clip_norm clip_grad_norm clip_norm grad_clip",
    ("precision",): "bf16 amp",
    ("log",): "logger",
    ("callbacks",): "callback",
    ("metrics",): "metric",
    (
        "validation_data",
    ): "val_data valid_data eval_data validation_dataset val_dataset eval_dataset",
    ("train_data",): "data dataset train_dataset train_dataloader",
    ("loss",): "criterion loss_fn loss_function",
    ("optimizer",): "optim",
    ("scheduler", "schedule"): "lr_scheduler schedulers scheduler",
}
_USUAL = {other: ours for ours, others in _ELSEWHERE.items() for other in others.split()}


def read_options(
    kind: type[SomeOptions], given: dict[str, Any], what: str, beside: Sequence[str] = ()
) -> SomeOptions:
    """The options of a ``kind`` that ``given`` describes.

    Args:
        kind: which group of settings.
        given: names and values.
        what: what they are called in messages, as in ``"Trainer"``.
        beside: what else may be given there, for messages about unknown names.

    Raises:
        ValueError: naming each setting that is unknown or has a value that it cannot have.
    """
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        problems = _joined(_problem(kind, dict(one), beside) for one in error.errors())
        raise ValueError(f"{what}: {'; '.join(problems)}") from None


def _joined(problems: Iterable[str]) -> list[str]:
    """Without repetitions, and in one sentence what a value could have been instead."""
    joined: dict[str, list[str]] = {}
    for problem in problems:
        start, expected, instead = problem.partition(_EXPECTED)
        alternatives = joined.setdefault(start + expected, [])
        if instead not in alternatives:
            alternatives.append(instead)
    return [start + " or ".join(alternatives) for start, alternatives in joined.items()]


def _problem(kind: type[Options], error: dict[str, Any], beside: Sequence[str]) -> str:
    # For a union, pydantic adds the branch that it tried, as in ("threads", "int").
    path = [str(part) for part in error["loc"]]
    while (
        len(path) > 1
        and error["type"] != "extra_forbidden"
        and path[-1] not in _names_at(kind, path[:-1])
    ):
        path.pop()
    name = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = [*_names_at(kind, path[:-1]), *(beside if len(path) == 1 else ())]
        known = list(dict.fromkeys(known))
        near = _meant(kind, path, known)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"there is no setting {name!r}; {hint}"
    if error["type"] == "value_error" and not path:
        return str(error["ctx"]["error"])
    if error["type"] == "value_error":
        return f"{name}: {error['ctx']['error']}"
    if error["type"] == "missing" and len(path) < len(error["loc"]):
        return f"{name} is {error['input']!r}; it has too few values"
    if error["type"] == "missing":
        return f"{name} is missing: it is required{_beside(path)}"
    if error["type"] in _NOT_A_GROUP:
        names = ", ".join(_names_at(kind, path))
        return f"{name} is {error['input']!r}; it is a group of settings: {names}"
    message = str(error["msg"])
    return f"{name} is {error['input']!r}; {message[:1].lower()}{message[1:]}"


def _beside(path: list[str]) -> str:
    return " beside the other settings of its group" if len(path) > 1 else ""


def _meant(kind: type[Options], path: list[str], known: list[str]) -> list[str]:
    """The settings that an unknown one may stand for, the likeliest first.

    What is usually called so, beside it or in a group beside it, comes before a name that looks alike.
    """
    *group, name = path
    usual = _USUAL.get(name, ())
    here = [ours for ours in usual if ours in known]
    inner = [found for one in (*usual, name) for found in _groups_with(kind, [*group, one])]
    alike = difflib.get_close_matches(name, known, n=1)
    of_group = [".".join([*group, ours]) for ours in (*here, *alike)]
    return [*of_group[: len(here)], *inner, *of_group[len(here) :]]


def _groups_with(kind: type[Options], path: list[str]) -> list[str]:
    """The groups beside ``path``, as in ``"optimizer.lr"``, that do have a setting of its last name."""
    groups = [[*path[:-1], name] for name in _names_at(kind, path[:-1])]
    inner = [[*group, path[-1]] for group in groups if path[-1] in _names_at(kind, group)]
    return [".".join(names) for names in inner]


def _names_at(kind: type[Options], path: list[str]) -> list[str]:
    """The settings of the group that ``path`` leads to."""
    return list(group_at(kind, path).model_fields)


def group_at(kind: type[Options], path: list[str]) -> type[Options]:
    """The group that ``path`` leads to from ``kind``, or the one that its last setting is in."""
    for part in path:
        if part not in kind.model_fields:
            continue  # pydantic names the branch of a union, too
        annotation = kind.model_fields[part].annotation
        groups = [annotation, *getattr(annotation, "__args__", ())]
        inner = [g for g in groups if isinstance(g, type) and issubclass(g, Options)]
        if inner:
            kind = inner[0]
    return kind
