"""What a checkpoint's files hold, and that no damage to any of them goes unseen."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from optcpu.errors import OptcpuError
from optcpu.optim import AdamW, Lookahead
from optcpu.optim.formats import Format
from optcpu.optim.storing import store_weights
from optcpu.runtime.checkpoint.format import Contents, read_checkpoint
from optcpu.runtime.checkpoint.rng import rng_state, set_rng_state

FILES = ("manifest.json", "model.safetensors", "state.json", "tensors.safetensors")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


def write(folder: Path, state: dict[str, Any], step: int = 7) -> Path:
    folder.mkdir()
    Contents(state).write(folder, step, number=3)
    return folder


def test_files_and_manifest(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", {"model": {"w": torch.ones(3)}, "epoch": 2})
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["number"]) == (1, 7, 3)
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert json.loads((folder / "state.json").read_text()) == {
        "model": {"w": {"$tensor": "model.w"}},
        "epoch": 2,
    }


def test_a_model_and_its_optimizer_come_back(tmp_path: Path) -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    model.norm(model.head(model.embedding(torch.tensor([1, 2])))[:, :4]).pow(2).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    checkpoint = read_checkpoint(write(tmp_path / "c", state))
    assert (checkpoint.step, checkpoint.path) == (7, tmp_path / "c")
    back = checkpoint.state
    assert list(back) == ["model", "optimizer", "epoch"]
    assert type(back["model"]) is OrderedDict
    assert list(back["model"]) == list(state["model"])
    torch.testing.assert_close(back["model"], dict(state["model"]), rtol=0, atol=0)
    torch.testing.assert_close(back["optimizer"], state["optimizer"], rtol=0, atol=0)
    other = Tied()
    other.load_state_dict(back["model"])
    torch.optim.AdamW(other.parameters()).load_state_dict(back["optimizer"])


class Training:
    """A small run with everything that has a state."""

    def __init__(self, weights: Format, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(16, 8)
        ).to(memory_format=torch.channels_last)
        inner = AdamW(self.model.parameters(), lr=1e-2, state_dtype=torch.bfloat16, seed=seed)
        self.optimizer = Lookahead(inner, k=3, slow_dtype=torch.bfloat16, pullback="pullback")
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(inner, [2, 5, 8])
        if weights != Format.FLOAT:
            store_weights(self.model, self.model.parameters(), weights)

    def state(self) -> dict[str, Any]:
        parts = {
            name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scheduler")
        }
        return {**parts, "random": rng_state()}

    def load(self, state: dict[str, Any]) -> None:
        for name in ("model", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        set_rng_state(state["random"])

    def steps(self, count: int) -> list[Any]:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.model(torch.randn(5, 2, 4, 4)).pow(2).mean().backward()
            self.optimizer.step()
            self.scheduler.step()
        return [
            self.optimizer.param_groups[0]["lr"],
            *map(Tensor.tolist, self.model.state_dict().values()),
        ]


@pytest.mark.parametrize("weights", list(Format))
def test_training_goes_on_bit_for_bit(tmp_path: Path, weights: Format) -> None:
    training = Training(weights, seed=1)
    training.steps(4)
    folder = write(tmp_path / "c", training.state())
    expected = training.steps(6)
    other = Training(weights, seed=2)
    other.load(read_checkpoint(folder).state)
    assert other.steps(6) == expected


def test_anyone_can_load_the_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    folder = write(tmp_path / "c", {"optimizer": {}, "model": model.state_dict()})
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    plain.load_state_dict(load_file(folder / "model.safetensors"))
    torch.testing.assert_close(plain.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_tied_weights_are_stored_once_and_told(tmp_path: Path) -> None:
    model = Tied()
    # The optimizer refers to the weight as well, and comes first.
    state = {"optimizer": {"slow": model.head.weight}, "model": model.state_dict()}
    folder = write(tmp_path / "c", state)
    path = folder / "model.safetensors"
    assert "head.weight" not in load_file(path)
    assert load_file(folder / "tensors.safetensors") == {}
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embedding.weight"}
    plain = Tied()
    assert load_model(plain, path) == (set(), [])
    assert torch.equal(plain.head.weight, model.head.weight)
    back = read_checkpoint(folder).state
    assert back["model"]["head.weight"] is back["model"]["embedding.weight"]
    assert back["optimizer"]["slow"] is back["model"]["embedding.weight"]


@pytest.mark.parametrize(
    "model",
    [
        None,
        torch.ones(2),
        {},
        {"w": torch.ones(2), "_extra_state": {"a": torch.zeros(3)}, 3: torch.ones(1)},
        {
            "__metadata__": torch.ones(2),
            "\ud800": torch.ones(3),
            "": torch.ones(4),
            "?": torch.ones(5),
        },
        {"c": torch.ones(2, dtype=torch.complex128), "t": torch.ones(3, 2).t()},
    ],
)
def test_whatever_is_called_model_comes_back(tmp_path: Path, model: Any) -> None:
    back = read_checkpoint(write(tmp_path / "c", {"model": model, "model.w": torch.zeros(1)})).state
    torch.testing.assert_close(back["model"], model)
    assert torch.equal(back["model.w"], torch.zeros(1))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = {"model": {"w": torch.arange(5.0)}, "rest": [torch.ones(3), {1: "a", "b": None}]}
    return write(tmp_path_factory.mktemp("sound") / "c", state)


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(FILES), where=st.integers(0, 5000), bit=st.integers(0, 7))
def test_any_flipped_bit_is_seen(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, name: str, where: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("flipped") / "c"
    shutil.copytree(sound, folder)
    content = bytearray((folder / name).read_bytes())
    content[where % len(content)] ^= 1 << bit
    (folder / name).write_bytes(content)
    with pytest.raises(OptcpuError, match=f"^{name} "):
        read_checkpoint(folder)


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(FILES), length=st.integers(0, 5000))
@example(name="manifest.json", length=0)
def test_a_truncated_file_is_seen(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, name: str, length: int
) -> None:
    folder = tmp_path_factory.mktemp("truncated") / "c"
    shutil.copytree(sound, folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: length % len(content)])
    with pytest.raises(OptcpuError, match=f"^{name} "):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("instead", ["nothing", "folder", "pipe"])
def test_a_missing_file_is_seen(sound: Path, tmp_path: Path, name: str, instead: str) -> None:
    folder = tmp_path / "c"
    shutil.copytree(sound, folder)
    (folder / name).unlink()
    if instead == "folder":
        (folder / name).mkdir()
    if instead == "pipe":
        os.mkfifo(folder / name)
    with pytest.raises(OptcpuError, match=f"^{name} (is missing|cannot be read)"):
        read_checkpoint(folder)


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and make its own checksum fit, as somebody with bad intentions would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**manifest, "sha256": digest}))


def forge_file(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    forge(folder, lambda manifest: manifest["files"].update({name: entry}))


def move_out(manifest: dict[str, Any]) -> None:
    manifest["files"]["../../passwords"] = manifest["files"].pop("state.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (move_out, r"^manifest\.json is malformed \(files\.\.\./\.\./passwords"),
        (lambda m: m["files"].pop("state.json"), r"^manifest\.json is malformed \(files: .+ names"),
        (
            lambda m: m.update(format=2),
            r"^manifest\.json is of format 2, and this .+ reads format 1$",
        ),
        (lambda m: m.pop("format"), r"^manifest\.json is of format None"),
        (lambda m: m.update(step=-1), r"^manifest\.json is malformed \(step: "),
        (lambda m: m.update(step="7"), r"^manifest\.json is malformed \(step: "),
        (lambda m: m.update(extra=1), r"^manifest\.json is malformed \(extra: "),
        (
            lambda m: m["files"]["state.json"].update(bytes=10**18),
            r"^state\.json has .+ bytes, not 1",
        ),
    ],
)
def test_a_forged_manifest_is_refused(
    sound: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = tmp_path / "c"
    shutil.copytree(sound, folder)
    forge(folder, lambda manifest: None)
    read_checkpoint(folder)  # the forgery itself is good
    forge(folder, change)
    with pytest.raises(OptcpuError, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tensors.safetensors", (2**60).to_bytes(8, "little") + b"{}"),
        ("tensors.safetensors", b"\x80\x05\x95"),
        ("model.safetensors", b"\x02\0\0\0\0\0\0\0{}"),
        ("state.json", b"[" * 100_000),
        ("state.json", b'{"a": ' * 90_000 + b"1" + b"}" * 90_000),
        ("state.json", b"\xff\xfe"),
        ("state.json", b'{"a": {"$tensor": "../model.w"}}'),
        ("state.json", b'{"a": {"$pickle": "gASVAAAA"}}'),
        ("state.json", b'{"a": {"$int": ' + b"9" * 5000 + b"}}"),
        ("state.json", b"[1, 2]"),
    ],
)
def test_forged_content_is_refused(sound: Path, tmp_path: Path, name: str, content: bytes) -> None:
    folder = tmp_path / "c"
    shutil.copytree(sound, folder)
    forge_file(folder, name, content)
    with pytest.raises(
        OptcpuError, match=r"^(its files do not fit together: .+|state\.json holds no)"
    ):
        read_checkpoint(folder)


@pytest.mark.parametrize("content", [b"[]", b"null", b"[" * 60_000, b"{" + b" " * 2**20 + b"}"])
def test_no_manifest_at_all(sound: Path, tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "c"
    shutil.copytree(sound, folder)
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(OptcpuError, match=r"^manifest\.json is no (JSON \(.+\)|manifest)$"):
        read_checkpoint(folder)
