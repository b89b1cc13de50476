from __future__ import annotations

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
