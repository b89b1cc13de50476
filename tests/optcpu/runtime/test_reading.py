from __future__ import annotations

from pathlib import Path

import pytest
from training import small_trainer

from optcpu.runtime.config import parse_override, read_config


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("callback", "callbacks"),
        ("metric", "metrics"),
        ("val_data", "validation_data"),
        ("valid_data", "validation_data"),
        ("eval_data", "validation_data"),
        ("criterion", "loss"),
        ("loss_fn", "loss"),
        ("lr_scheduler", "scheduler"),
        ("schedulers", "scheduler"),
        ("learning_rate", "lr"),
        ("wd", "optimizer.weight_decay"),
        ("collate", "collate_fn"),
        ("sizeof", "size_of"),
        ("state_type", "state_dtype"),
        ("max_epochs", "epochs"),
        ("gradient_clip_norm", "max_grad_norm"),
        ("momentum", "optimizer.momentum"),
    ],
)
def test_what_an_argument_of_the_trainer_is_called_elsewhere(given: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"no setting '{given}'; did you mean '{meant}'\?"):
        small_trainer(**{given: 3})


def test_arguments_that_are_no_options_are_known_as_well() -> None:
    with pytest.raises(ValueError, match=r"known are epochs, .*validation_data, metrics, .*passes"):
        small_trainer(zzz=3)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("learning_rate", "optimizer.lr"),
        ("wd", "optimizer.weight_decay"),
        ("lr_scheduler", "schedule"),
        ("optimizer.learning_rate", "optimizer.lr"),
        ("schedule.warmup", "schedule.warmup_steps"),
    ],
)
def test_files_and_the_command_line_know_the_usual_names(
    tmp_path: Path, given: str, meant: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text('job = "mlp"\nepochs = 1\n')
    with pytest.raises(ValueError, match=rf"no setting '{given}'; did you mean '{meant}'\?"):
        read_config(path, dict([parse_override(f"{given}=1")]))
    path.write_text(f'job = "mlp"\nepochs = 1\n{given} = 1\n')
    with pytest.raises(ValueError, match=rf"no setting '{given}'; did you mean '{meant}'\?"):
        read_config(path)
