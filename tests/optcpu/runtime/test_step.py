from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optcpu
from optcpu.measure.batches import default_loss, units_in
from optcpu.runtime.step import (
    BufferKeeper,
    MicroBatches,
    StepRunner,
    collect,
    gradients_by_name,
    restore_gradients,
    trained_parameters,
)
from optcpu.runtime.world import World


def _parts(sizes: list[int]) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    return model, [(torch.randn(size, 5), torch.randint(3, (size,))) for size in sizes]


def _runner(model: nn.Module, loss: Any = default_loss, **given: Any) -> StepRunner:
    options: dict[str, Any] = {"max_grad_norm": None, "check_gradients": False, **given}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return StepRunner(model, optimizer, loss, World(), **options)


def _collect(batches: list[Any]) -> MicroBatches:
    return collect(batches, {}, units_in, World().sum_numbers)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
@settings(max_examples=30)
def test_the_gradient_is_that_of_the_mean_over_all_samples(sizes: list[int]) -> None:
    model, batches = _parts(sizes)
    step, runner = _collect(list(batches)), _runner(model)
    while not step.complete:
        runner.run_micro_batch(step)
    gradients = gradients_by_name(dict(model.named_parameters()))

    model.zero_grad()
    whole = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    loss = nn.functional.cross_entropy(model(whole[0]), whole[1])
    loss.backward()
    assert step.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_clipping_by_hand() -> None:
    for limit, expected in ((1e-3, 1e-3), (1e3, None)):
        model, batches = _parts([4])
        before = [p.detach().clone() for p in model.parameters()]
        runner, step = _runner(model, max_grad_norm=limit), _collect(list(batches))
        runner.run_micro_batch(step)
        norm = runner.gradient_norm(step)
        assert norm == pytest.approx(
            torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        )
        runner.update(norm)
        moved = torch.cat(
            [(b - p.detach()).flatten() for b, p in zip(before, model.parameters(), strict=True)]
        )
        assert moved.norm().item() == pytest.approx(0.5 * (expected or norm), rel=1e-3)
        assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_is_no_number_makes_the_step_bad() -> None:
    model, batches = _parts([2, 2])
    batches[1][0][0, 0] = float("nan")
    runner, step = _runner(model), _collect(list(batches))
    runner.run_micro_batch(step)
    assert not step.complete
    runner.run_micro_batch(step)
    assert step.complete
    assert step.bad == "the loss of model(float32[2, 5]) is nan"
    assert runner.gradient_norm(step) is None


def test_a_gradient_that_is_no_number_makes_the_step_bad_where_it_is_looked_at() -> None:
    def loss(output: Tensor, batch: Any) -> Tensor:
        return (output.sum() - output.sum().detach()).abs().sqrt()  # 0, with an infinite slope

    for looked_at in (True, False):
        model, batches = _parts([2])
        runner, step = _runner(model, loss, check_gradients=looked_at), _collect(list(batches))
        runner.run_micro_batch(step)
        runner.gradient_norm(step)
        assert (step.bad is not None) == looked_at


def test_what_is_no_loss_is_told() -> None:
    model, batches = _parts([2])
    for loss, told in ((lambda o, b: o, r"\(2, 3\)"), (lambda o, b: 3.0, "float")):
        with pytest.raises(TypeError, match=f"the loss must be a tensor with one number.*{told}"):
            _runner(model, loss).run_micro_batch(_collect(list(batches)))


def test_what_is_no_batch_is_told() -> None:
    with pytest.raises(TypeError, match="a batch of type int cannot be used"):
        _collect([3])
    with pytest.raises(ValueError, match="counts 0 samples"):
        collect([(torch.ones(2), torch.ones(2))], {}, lambda batch: 0, World().sum_numbers)


def test_gradients_are_put_back() -> None:
    model, batches = _parts([3])
    runner, step = _runner(model), _collect(list(batches))
    runner.run_micro_batch(step)
    parameters = trained_parameters(model, default_loss)
    gradients = {name: g.clone() for name, g in gradients_by_name(parameters).items()}
    runner.forget_gradients()
    assert gradients_by_name(parameters) == {}
    restore_gradients(parameters, gradients)
    for name, gradient in gradients_by_name(parameters).items():
        assert torch.equal(gradient, gradients[name])


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
