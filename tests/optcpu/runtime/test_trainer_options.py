from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optcpu.runtime.options import TrainerOptions
from optcpu.runtime.reading import read_options


def _read(**given: Any) -> TrainerOptions:
    return read_options(TrainerOptions, {"epochs": 1, **given}, "Trainer")


def test_defaults() -> None:
    options = _read()
    assert (options.accumulation_steps, options.optimizer.name, options.on_nan) == (
        1,
        "adamw",
        "stop",
    )
    assert options.checkpoints is None


def test_a_bare_value_stands_for_a_group() -> None:
    options = _read(optimizer="lamb", schedule="cosine", checkpoints="here", log=Path("there"))
    assert options.optimizer.name == "lamb"
    assert options.schedule.name == "cosine"
    assert options.checkpoints is not None
    assert options.checkpoints.folder == Path("here")
    assert options.log is not None
    assert options.log.folder == Path("there")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"acumulation_steps": 3}, "no setting 'acumulation_steps'; did you mean 'accumulation_s"),
        ({"zzz": 3}, "no setting 'zzz'; known are epochs, steps"),
        ({"optimizer": {"lrr": 1}}, "no setting 'optimizer.lrr'; did you mean 'optimizer.lr'"),
        (
            {"optimizer": {"lookahead": {"alfa": 1}}},
            "no setting 'optimizer.lookahead.alfa'; did you mean 'optimizer.lookahead.alpha'",
        ),
        ({"epochs": 0}, "epochs is 0; input should be greater than or equal to 1"),
        ({"epochs": "3"}, "epochs is '3'; input should be a valid integer"),
        ({"epochs": True}, "epochs is True; input should be a valid integer"),
        ({"steps": 3}, "either epochs or steps, not both"),
        ({"epochs": None}, "either epochs or steps; there is neither"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm is nan; input should be"),
        ({"optimizer": {"lr": -1.0}}, "optimizer.lr is -1.0; input should be greater than 0"),
        (
            {"optimizer": {"learning_rate": 1}},
            "no setting 'optimizer.learning_rate'; did you mean 'optimizer.lr'",
        ),
        ({"num_workers": 1}, "no setting 'num_workers'; did you mean 'workers'"),
        ({"log": 3}, "log is 3; it is a group of settings: folder, every_steps"),
        (
            {"optimizer": {"lookahead": 3}},
            "optimizer.lookahead is 3; it is a group of settings: k,",
        ),
        ({"lr": 0.1}, "no setting 'lr'; did you mean 'optimizer.lr'"),
        ({"optimizer": {"k": 3}}, "no setting 'optimizer.k'; did you mean 'optimizer.lookahead.k'"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer: betas must lie in"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas is [0.9]; it has too few values"),
        ({"threads": "many"}, "threads is 'many'; input should be a valid integer or 'auto'"),
        ({"optimizer": {"name": "sgd", "betas": [0.9, 0.99]}}, "optimizer: sgd has no betas"),
        ({"optimizer": {"momentum": 0.5}}, "optimizer: adamw has no momentum"),
        ({"seed": 2**63}, "seed is 9223372036854775808; input should be less than"),
        ({"checkpoints": ""}, "checkpoints.folder: the name of a folder is empty"),
        (
            {"checkpoints": "~nobody-here/a"},
            "checkpoints.folder: '~nobody-here/a' leads to nobody's home",
        ),
        ({"log": "a\0b"}, "log.folder: the name of a folder has a null byte in it"),
        ({"precision": "fp16"}, "precision is 'fp16'; input should be 'auto', 'bf16' or 'fp32'"),
        ({"threads": 0}, "threads must be at least 1, or 'auto'"),
        ({"threads": 10**8}, "threads must be at most 1024, or 'auto'"),
        ({"workers": -1}, "workers must be at least 0, or 'auto'"),
        ({"on_nan": "rollback"}, "needs checkpoints to roll back to"),
        ({"resume": "must"}, "needs checkpoints to resume from"),
        ({"update_in_backward": True, "max_grad_norm": 1.0}, "exclude each other"),
        ({"update_in_backward": True, "on_nan": "skip"}, "exclude each other"),
        (
            {"local_steps": 4, "optimizer": {"lookahead": {"k": 5}}},
            "local_steps is 4, and lookahead.k is 5",
        ),
    ],
)
def test_a_wrong_setting_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^Trainer: ") as caught:
        _read(**given)
    assert message in str(caught.value)


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"batch_size is 0; .*; there is no setting .acumulation"):
        _read(acumulation=3, batch_size=0)


def test_the_home_folder_is_found() -> None:
    options = read_options(TrainerOptions, {"steps": 1, "log": "~/log", "checkpoints": "a"}, "x")
    assert options.log is not None
    assert options.log.folder == Path.home() / "log"
    assert options.checkpoints is not None
    assert options.checkpoints.folder == Path("a")
