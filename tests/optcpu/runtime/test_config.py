from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optcpu.errors import OptcpuError
from optcpu.runtime.config import make_trainer, parse_override, read_config
from optcpu.runtime.freezing.freezer import DynamicFreezer

CONFIG = """
job = "{module}:make"
epochs = 2
batch_size = 4
accumulation_steps = 2
compile = false
"""


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = f"jobs_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(
        "import torch\n"
        "from training import small_data\n"
        "def make():\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))\n"
        "    return model, small_data(), small_data(8, seed=4)\n"
    )
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.format(module=module))
    return path


def test_a_run_from_a_file(config_file: Path) -> None:
    config_file.write_text(
        config_file.read_text()
        + '[optimizer]\nname = "lamb"\nlr = 0.01\n[optimizer.lookahead]\nk = 2\n'
        + "[freezing]\nwindow = 1\nblocks = ['0', '2']\npayback = false\n"
    )
    trainer = make_trainer(read_config(config_file, {"progress": False}))
    assert trainer.options.optimizer.lookahead is not None
    assert trainer.options.optimizer.lookahead.k == 2
    assert isinstance(trainer.freezer, DynamicFreezer)
    result = trainer.train()
    assert (result.steps, result.epochs) == (6, 2)
    assert set(result.metrics) == {"loss"}


def test_the_seed_makes_the_weights(config_file: Path) -> None:
    def first(**overrides: Any) -> torch.Tensor:
        model = make_trainer(read_config(config_file, overrides)).model
        assert isinstance(model, nn.Sequential)
        return model[0].weight.detach()

    assert torch.equal(first(), first())
    assert not torch.equal(first(), first(seed=5))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer.lr=0.01", ("optimizer.lr", 0.01)),
        ("epochs = 3", ("epochs", 3)),
        ("compile=false", ("compile", False)),
        ("optimizer=lamb", ("optimizer", "lamb")),
        ('job="a:b"', ("job", "a:b")),
        ("log=here/there", ("log", "here/there")),
        ("optimizer.betas=[0.9, 0.95]", ("optimizer.betas", [0.9, 0.95])),
    ],
)
def test_overrides_are_read_as_toml_or_as_strings(text: str, expected: tuple[str, Any]) -> None:
    assert parse_override(text) == expected


def test_overrides_come_before_the_file(config_file: Path) -> None:
    config_file.write_text(config_file.read_text() + 'optimizer = "sgd"\n')
    config = read_config(config_file, {"epochs": 9, "optimizer.lr": 0.5})
    assert (config.epochs, config.optimizer.name, config.optimizer.lr) == (9, "sgd", 0.5)
    with pytest.raises(ValueError, match=r"expected NAME=VALUE.*got 'epochs'"):
        parse_override("epochs")
    with pytest.raises(ValueError, match="epochs is 9, not a group of settings with one named 'x'"):
        read_config(config_file, {"epochs": 9, "epochs.x": 1})


def test_a_shorthand_leaves_the_rest_of_its_group(config_file: Path) -> None:
    config_file.write_text(
        config_file.read_text()
        + "[optimizer]\nlr = 0.5\n[schedule]\nwarmup_steps = 3\n"
        + "[checkpoints]\nfolder = 'here'\nkeep_last = 7\n"
    )
    changes = {"optimizer": "sgd", "schedule": "linear", "checkpoints": "there"}
    config = read_config(config_file, changes)
    assert (config.optimizer.name, config.optimizer.lr) == ("sgd", 0.5)
    assert (config.schedule.name, config.schedule.warmup_steps) == ("linear", 3)
    assert config.checkpoints is not None
    assert (config.checkpoints.folder, config.checkpoints.keep_last) == (Path("there"), 7)


@pytest.mark.parametrize(
    "in_file", ["", "[early_stopping]\npatience = 3\n[freezing]\nwindow = 9\n"]
)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("early_stopping", r"early_stopping\.monitor=VALUE; there are monitor, mode, min_delta"),
        ("freezing", r"freezing\.window=VALUE; there are window, percentile"),
        ("optimizer.lookahead", r"optimizer\.lookahead\.k=VALUE; there are k, alpha, pullback"),
    ],
)
def test_a_group_without_a_shorthand_is_told(
    config_file: Path, in_file: str, name: str, settings: str
) -> None:
    config_file.write_text(config_file.read_text() + in_file)
    message = (
        f"^{name} is 'loss', but that is a group of settings: give one of them, as in {settings}"
    )
    with pytest.raises(ValueError, match=message):
        read_config(config_file, {name: "loss"})


def test_a_text_is_no_group_of_settings(config_file: Path) -> None:
    config_file.write_text(f"early_stopping = 'loss'\n{config_file.read_text()}")
    with pytest.raises(
        ValueError, match="early_stopping is 'loss', not a group of settings with one"
    ):
        read_config(config_file, {"early_stopping.patience": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed=" + "[" * 5000 + "]" * 5000, r"seed is '\[{40}\.\.\.', nested too deeply; a number"),
        ("steps=" + "1" * 5000, r"steps is '1{40}\.\.\.', of too many digits; a number"),
        (
            "steps=1\nfoo=2",
            r"expected one NAME=VALUE, got 'steps=1\\nfoo=2' with 2 settings: give each",
        ),
        ("steps=1\n[foo]", "with 2 settings: give each by itself"),
    ],
)
def test_values_that_cannot_be_read_are_told(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_override(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epoch = 3", "there is no setting 'epoch'; did you mean 'epochs'"),
        ("[optimiser]\nlr = 1.0", "there is no setting 'optimiser'; did you mean 'optimizer'"),
        ("[checkpoints]\nevery_steps = 5", "checkpoints.folder is missing: it is required beside"),
        ("[freezing]\npercentile = 101.0", r"freezing.percentile is 101.0; input should be less"),
    ],
)
def test_wrong_settings_are_named_with_the_file(
    config_file: Path, change: str, message: str
) -> None:
    config_file.write_text(f"{config_file.read_text()}{change}\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_config(config_file)
    assert str(config_file) in str(caught.value)


def test_steps_stand_in_for_epochs(config_file: Path) -> None:
    config = read_config(config_file, {"steps": 7})
    assert (config.steps, config.epochs) == (7, None)
    with pytest.raises(ValueError, match="not both of them"):
        read_config(config_file, {"steps": 7, "epochs": 3})


def test_a_file_that_is_not_there_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(OptcpuError, match=r"cannot read .*none.toml: No such file"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("epochs = = 3")
    with pytest.raises(OptcpuError, match=r"bad.toml is not TOML: .*line 1"):
        read_config(tmp_path / "bad.toml")
    (tmp_path / "deep.toml").write_text(f"seed = {'[' * 5000}")
    with pytest.raises(OptcpuError, match=r"a setting in .*deep.toml is nested too deeply; a num"):
        read_config(tmp_path / "deep.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(OptcpuError, match=r"binary.toml is not TOML"):
        read_config(tmp_path / "binary.toml")
