"""A step that is left out leaves no trace in the buffers, whoever wrote to them and however."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import optcpu
from optcpu.runtime.buffers import BufferKeeper


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_buffers_are_put_back(compiled: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model.register_buffer("table", torch.zeros(2))
    if compiled:
        optcpu.optimize(model, precision="fp32")
    keeper = BufferKeeper(model, None)
    keeper.keep()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(8, 4))
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    keeper.put_back()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    model(torch.randn(8, 4))
    keeper.keep()
    later = model[1].running_mean.clone()
    model(torch.randn(8, 4))
    keeper.put_back()
    assert torch.equal(model[1].running_mean, later)


class Holder(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6.0),
        torch.tensor(3),
        torch.zeros(0),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(6.0).bfloat16(),
        torch.arange(4).to(torch.complex64).conj(),
        torch.arange(6.0).requires_grad_(),
        torch.arange(6.0).to_sparse(),
        torch.zeros(2**16 + 1),
    ],
    ids=["fp32", "number", "empty", "strided", "bf16", "conj", "grad", "sparse", "large"],
)
def test_every_kind_of_buffer_is_put_back(value: Tensor) -> None:
    model = Holder(value.detach().clone().requires_grad_(value.requires_grad))
    keeper = BufferKeeper(model)
    for _ in range(2):  # the first copy is made anew, the second into it
        keeper.keep()
        before = model.value.detach().clone()
        with torch.no_grad():
            model.value.mul_(2).add_(model.value)
        keeper.put_back()
        assert torch.equal(model.value.to_dense(), before.to_dense())
        with torch.no_grad():
            model.value.mul_(3)


@pytest.mark.parametrize("other", [torch.full((6,), 7.0), torch.full((1,), 7.0)])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_buffer_with_other_memory_is_put_back(other: Tensor, batch_norm: bool) -> None:
    model = nn.BatchNorm1d(6) if batch_norm else Holder(torch.zeros(6))
    buffer = next(model.buffers())
    keeper = BufferKeeper(model)
    keeper.keep()
    buffer.data = other.clone()
    buffer.add_(1)
    keeper.keep()
    buffer.zero_()
    keeper.put_back()
    assert torch.equal(buffer, other + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_each_dtype_are_put_back(dtype: torch.dtype) -> None:
    model = nn.BatchNorm1d(3).to(dtype)
    keeper = BufferKeeper(model)
    for _ in range(3):
        keeper.keep()
        before = [buffer.clone() for buffer in model.buffers()]
        model(torch.randn(8, 3, dtype=dtype))
        keeper.put_back()
        for buffer, kept in zip(model.buffers(), before, strict=True):
            assert torch.equal(buffer, kept)
        model(torch.randn(8, 3, dtype=dtype))


def test_a_write_through_data_is_put_back() -> None:
    """As layers with a codebook do; PyTorch does not count it as a change."""
    model = Holder(torch.arange(6.0))
    keeper = BufferKeeper(model)
    for _ in range(3):
        keeper.keep()
        before = model.value.clone()
        model.value.data.mul_(0.5).add_(1)
        keeper.put_back()
        assert torch.equal(model.value, before)
        model.value.data.mul_(0.5).add_(1)


def test_other_shapes_and_names_are_put_back() -> None:
    model = Holder(torch.arange(6.0))
    model.register_buffer("none", None)
    model.register_buffer("wide", torch.arange(3.0).expand(4, -1))
    keeper = BufferKeeper(model)
    for _ in range(2):
        keeper.keep()
        model.value.resize_(3).fill_(1)
        model.none = torch.zeros(1)
        model.register_buffer("added", torch.zeros(1))
        keeper.put_back()
        assert list(dict(model.named_buffers())) == ["value", "wide"]
        assert model.none is None
        assert torch.equal(model.value, torch.arange(6.0))
        assert torch.equal(model.wide, torch.arange(3.0).expand(4, -1))


def test_a_buffer_made_in_inference_mode_is_put_back() -> None:
    model = Holder(torch.zeros(3))
    keeper = BufferKeeper(model)
    with torch.inference_mode():
        model.value = torch.arange(3.0)
    keeper.keep()
    with torch.inference_mode():
        model.value.add_(1)
    keeper.put_back()
    assert torch.equal(model.value, torch.arange(3.0))


def test_a_buffer_may_be_resized() -> None:
    model = Holder(torch.arange(6.0))
    keeper = BufferKeeper(model)
    keeper.keep()
    model.value.resize_(12).fill_(1)
    keeper.keep()
    model.value.zero_()
    keeper.put_back()
    assert torch.equal(model.value, torch.ones(12))


def test_buffers_that_are_replaced_are_put_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("none", None)

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1
            return x

    model = Counting()
    keeper = BufferKeeper(model)
    for expected in (0, 1, 2):
        keeper.keep()
        model(torch.ones(1))
        keeper.put_back()
        assert model.count == expected
        model(torch.ones(1))
