from __future__ import annotations

from collections import deque

import pytest
import torch
from torch import Tensor, nn

from optcpu.runtime.unsaved import Unsaved


class _Model(nn.Module):
    """With a table that stays as it is, and a buffer that changes."""

    table: Tensor
    running: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("saved", torch.zeros(2))
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.register_buffer("running", torch.zeros(3), persistent=False)
        self.register_buffer("later", None, persistent=False)


def test_what_has_not_changed_is_made_anew_by_the_model() -> None:
    assert Unsaved(_Model(), None).buffers() == {}


def test_a_buffer_that_is_replaced_is_seen_each_time() -> None:
    """Where another tensor has come to its place in memory, too."""
    model = _Model()
    unsaved = Unsaved(model)
    for _ in range(50):
        model.running = 0.9 * model.running + 1
        assert list(unsaved.buffers()) == ["0..running"]


def test_a_buffer_that_is_written_to_is_seen() -> None:
    model = _Model()
    unsaved = Unsaved(model)
    model.running.add_(1)
    assert unsaved.buffers() == {"0..running": model.running}


@pytest.mark.parametrize("replaced", [False, True])
def test_what_had_not_changed_becomes_what_it_was(replaced: bool) -> None:
    model = _Model()
    unsaved = Unsaved(model)
    before = {name: buffer.clone() for name, buffer in unsaved.buffers().items()}
    if replaced:
        model.running = model.running + 1
    else:
        model.running.add_(1)
    model.later = torch.ones(1)
    unsaved.set_buffers(before)
    assert model.running.tolist() == [0, 0, 0]
    assert model.later is None
    assert model.table.tolist() == [0, 1, 2, 3]


def test_what_is_written_past_autograd_is_seen() -> None:
    model = _Model()
    unsaved = Unsaved(model)
    model.running.data.add_(1)
    assert list(unsaved.buffers()) == ["0..running"]


def test_another_dtype_comes_back_as_it_was() -> None:
    model = _Model()
    model.running = torch.zeros(3, dtype=torch.int64)
    saved = {"0..running": torch.full((3,), 0.5)}
    Unsaved(model).set_buffers(saved)
    assert model.running.tolist() == [0.5, 0.5, 0.5]


def test_a_buffer_that_the_first_forward_makes_comes_back() -> None:
    model = _Model()
    unsaved = Unsaved(model)
    model.register_buffer("made", torch.ones(2), persistent=False)
    saved = {name: buffer.clone() for name, buffer in unsaved.buffers().items()}
    assert list(saved) == ["0..made"]
    other = _Model()
    Unsaved(other).set_buffers(saved)
    assert dict(other.named_buffers())["made"].tolist() == [1, 1]
    assert "made" not in other.state_dict()


def test_what_modules_share_is_copied_once() -> None:
    mask = torch.ones(1000)
    layers = nn.ModuleList(nn.Module() for _ in range(4))
    for layer in layers:
        layer.register_buffer("mask", mask, persistent=False)
    copies = Unsaved(layers)._first.values()
    assert len(copies) == 4
    assert len({id(copy) for copy in copies}) == 1


@pytest.mark.parametrize(
    "buffer",
    [
        torch.zeros(3, device="meta"),
        torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        torch.empty(0),
    ],
    ids=["meta", "sparse", "quantised", "empty"],
)
def test_other_kinds_that_have_not_changed_are_left_out(buffer: Tensor) -> None:
    model = nn.Module()
    model.register_buffer("odd", buffer, persistent=False)
    unsaved = Unsaved(model)
    assert unsaved.buffers() == {}
    unsaved.set_buffers({})


def test_buffers_made_in_inference_mode() -> None:
    model = nn.Module()
    with torch.inference_mode():
        model.register_buffer("made", torch.zeros(2), persistent=False)
    unsaved = Unsaved(model)
    assert unsaved.buffers() == {}
    unsaved.set_buffers({"0..made": torch.ones(2)})
    assert model.made.tolist() == [1, 1]


def test_what_had_changed_comes_back() -> None:
    model = _Model()
    unsaved = Unsaved(model)
    model.running = torch.ones(3)
    saved = {name: buffer.clone() for name, buffer in unsaved.buffers().items()}
    model.running = torch.full((3,), 2.0)
    unsaved.set_buffers(saved)
    assert model.running.tolist() == [1, 1, 1]
    other = _Model()
    other.running = torch.zeros(5)  # of another shape by now
    Unsaved(other).set_buffers(saved)
    assert other.running.tolist() == [1, 1, 1]


class _Slotted:
    __slots__ = ("generator",)

    def __init__(self) -> None:
        self.generator = torch.Generator()


def test_generators_of_a_large_model_are_found_in_whatever_holds_them() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()) for _ in range(100)))
    last = model[99]
    last.listed, last.slotted = [torch.Generator()], _Slotted()  # type: ignore[assignment]
    last.queue, last.kept = deque([torch.Generator()]), {torch.Generator()}  # type: ignore[assignment]
    assert sorted(Unsaved(model).generators()) == [
        "0.99.kept.0",
        "0.99.listed.0",
        "0.99.queue.0",
        "0.99.slotted.generator",
    ]
