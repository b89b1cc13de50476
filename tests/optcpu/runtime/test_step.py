from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import optcpu
from optcpu.measure.batches import default_loss, units_in
from optcpu.runtime.data.loading import Feed
from optcpu.runtime.step import (
    MicroBatches,
    StepRunner,
    buffers_of,
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


def test_a_process_that_only_repeats_a_sample_counts_nothing() -> None:
    """Three go on where one has left two of eight samples: one of them takes part without any."""
    data = TensorDataset(torch.randn(8, 5), torch.randint(3, (8,)))
    alone = Feed(data, batch_size=2, workers=0)
    alone.take(3)
    state = alone.state_dict()
    model = _parts([])[0]
    assert isinstance(model, nn.Sequential)
    steps = []
    for rank in range(3):
        feed = Feed(data, batch_size=2, workers=0, rank=rank, world_size=3)
        feed.load_state_dict(state)
        raw = feed.take(2)
        steps.append(collect(raw, {}, units_in, lambda mine: (mine,), feed.repeated))
    assert [step.sizes for step in steps] == [[0], [1], [1]]
    runner = _runner(model)
    for step in steps:
        step.total = 2
        runner.run_micro_batch(step)
    gradient = model[0].weight.grad.clone()
    model.zero_grad()
    (batch,) = alone.take(1)
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    assert sum(step.loss for step in steps) == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient, model[0].weight.grad)


class _Two(World):
    """Two processes, of which the other has the same numbers."""

    def __init__(self) -> None:
        super().__init__(0, 2)
        self.averaged = 0

    def average(self, tensors: Any) -> None:
        self.averaged += 1

    def sum_numbers(self, *numbers: float) -> tuple[float, ...]:
        return numbers


@pytest.mark.parametrize("lookahead", [False, True])
def test_weights_are_averaged_when_each_has_changed_its_own(lookahead: bool) -> None:
    """Whoever does it, and whenever the processes have met in between."""
    model, batches = _parts([4])
    world, optimizer = _Two(), torch.optim.SGD(model.parameters(), lr=0.5)
    runner = StepRunner(
        model,
        optcpu.Lookahead(optimizer, k=3) if lookahead else optimizer,
        default_loss,
        world,
        max_grad_norm=None,
        check_gradients=False,
        local_steps=3,
    )

    def steps(count: int) -> int:
        for _ in range(count):
            step = _collect(list(batches))
            runner.run_micro_batch(step)
            runner.update(runner.gradient_norm(step))
        return world.averaged

    assert steps(2) == 0
    runner.meet()
    assert world.averaged == 1
    runner.meet()
    assert world.averaged == 1, "nobody has changed anything"
    # Lookahead's next turn is the third step; without it three more are made alone.
    assert steps(1) == (2 if lookahead else 1)
    runner.meet()
    assert world.averaged == 2
    assert steps(2) == 2
    assert steps(1) == 3


def test_parameters_of_the_optimizer_alone_are_clipped_and_looked_at_as_well() -> None:
    model, (batch,) = _parts([4])
    scale = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.5)

    def loss(output: Tensor, batch: Any) -> Tensor:
        return default_loss(output, batch) * scale

    runner = StepRunner(model, optimizer, loss, World(), max_grad_norm=1e-3, check_gradients=True)
    step = _collect([batch])
    runner.run_micro_batch(step)
    norm = runner.gradient_norm(step)
    gradients = [p.grad for p in (*model.parameters(), scale)]
    assert norm == pytest.approx(
        sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5
    )
    before = scale.item()
    runner.update(norm)
    assert 0 < abs(scale.item() - before) <= 0.5 * 1e-3


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_has_the_bits_of_pytorchs(dtype: torch.dtype) -> None:
    factors = []
    for seed in range(20):
        torch.manual_seed(seed)
        mine, theirs = (nn.Linear(5, 3, dtype=dtype) for _ in range(2))
        theirs.load_state_dict(mine.state_dict())
        gradients = [torch.randn_like(p) for p in mine.parameters()]
        for model in (mine, theirs):
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
        limit = float(torch.rand(())) * 6
        runner = _runner(mine, max_grad_norm=limit)
        norm = runner.gradient_norm(_collect([(torch.ones(1, 5), torch.zeros(1, dtype=int))]))
        factors.append(limit / (norm or math.inf))
        runner.update(norm)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit)
        torch.optim.SGD(theirs.parameters(), lr=0.5).step()
        for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(one, other)
    assert min(factors) < 1 < max(factors)


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
    for loss, told in (
        (lambda o, b: o, r"\(2, 3\)"),
        (lambda o, b: 3.0, "float"),
        (lambda o, b: o.sum() * 1j, "complex64"),
    ):
        with pytest.raises(TypeError, match=f"the loss must be .* one real number.*{told}"):
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


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("running_mean", torch.zeros(3))

    def forward(self, output: Tensor, batch: Any) -> Tensor:
        return default_loss(output * self.weight, batch)


def test_a_submodule_called_loss_keeps_its_parameters_beside_those_of_the_loss() -> None:
    model, loss = nn.Module(), _Scaled()
    model.loss = nn.BatchNorm1d(3)
    trained, buffers = trained_parameters(model, loss), buffers_of(model, loss)
    assert {id(p) for p in trained.values()} == {*map(id, [*model.parameters(), loss.weight])}
    assert {id(b) for b in buffers.values()} == {*map(id, [*model.buffers(), loss.running_mean])}
    assert list(trained_parameters(nn.Linear(2, 3), loss)) == ["weight", "bias", "loss.weight"]
    assert "loss.running_mean" in buffers_of(nn.Linear(2, 3), loss)
