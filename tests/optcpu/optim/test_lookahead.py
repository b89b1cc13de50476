"""Lookahead follows the paper's definition around any optimizer, fused or not."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import optcpu
from optcpu.errors import OptcpuError
from optcpu.optim import SGD, AdamW, Lamb, Lookahead
from optcpu.optim.formats import Format
from optcpu.optim.storing import store_weights
from tests.optcpu.optim.conftest import assert_equal, give_gradients, parameters, twins

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

INNER: dict[str, Make] = {
    "ours": lambda p: AdamW(p, lr=0.05, state_dtype=torch.float32),
    "lamb": lambda p: Lamb(p, lr=0.05, state_dtype=torch.float32),
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, state_dtype=torch.float32),
    "pytorch": lambda p: torch.optim.AdamW(p, lr=0.05),
}


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize(("k", "alpha"), [(1, 0.5), (3, 0.5), (2, 0.8), (2, 0.0), (2, 1.0)])
def test_algorithm_1(implementation: str, name: str, k: int, alpha: float) -> None:
    mine, yours = twins()
    optimizer, inner = Lookahead(INNER[name](mine), k, alpha), INNER[name](yours)
    slow = [p.detach().clone() for p in yours]
    for step in range(1, 8):
        give_gradients(mine, yours, seed=step)
        optimizer.step()
        inner.step()
        if step % k == 0:
            with torch.no_grad():
                for weight, parameter in zip(slow, yours, strict=True):
                    weight += alpha * (parameter - weight)
                    parameter.copy_(weight)
    assert_equal(mine, yours, tolerance=5e-6)


@pytest.mark.parametrize("name", INNER)
def test_parameters_without_a_gradient_are_synchronised_too(name: str) -> None:
    mine = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))]
    optimizer = Lookahead(INNER[name](mine), k=2, alpha=0.5)
    give_gradients(mine, seed=0)
    optimizer.step()
    moved = mine[1].detach().clone()
    mine[1].grad = None
    optimizer.step()
    torch.testing.assert_close(mine[1].detach(), (torch.ones(2, 2) + moved) / 2)


@pytest.mark.parametrize("name", INNER)
def test_some_may_meet_out_of_turn_or_begin_anew(name: str) -> None:
    mine = parameters()
    optimizer = Lookahead(INNER[name](mine), k=10, alpha=0.25, pullback="pullback")
    began = [p.detach().clone() for p in mine]
    give_gradients(mine, seed=0)
    optimizer.step()
    fast = [p.detach().clone() for p in mine]

    optimizer.synchronise(mine[:1])
    torch.testing.assert_close(mine[0].detach(), began[0].lerp(fast[0], 0.25))
    assert all(torch.equal(p, before) for p, before in zip(mine[1:], fast[1:], strict=True))

    optimizer.restart(mine[1:2])
    with optimizer.slow_weights():
        assert torch.equal(mine[1], fast[1])
        assert torch.equal(mine[2], began[2])


@pytest.mark.parametrize("name", ["ours", "pytorch"])
def test_slow_weights_for_evaluation(name: str) -> None:
    mine = parameters()
    start = [p.detach().clone() for p in mine]
    optimizer = Lookahead(INNER[name](mine), k=5)
    give_gradients(mine, seed=0)
    optimizer.step()
    fast = [p.detach().clone() for p in mine]
    with contextlib.suppress(KeyError), optimizer.slow_weights():
        assert all(torch.equal(a, b) for a, b in zip(mine, start, strict=True))
        raise KeyError  # an evaluation may fail
    assert all(torch.equal(a, b) for a, b in zip(mine, fast, strict=True))


def test_a_step_within_slow_weights_is_refused() -> None:
    mine = parameters()
    optimizer = Lookahead(AdamW(mine))
    give_gradients(mine, seed=0)
    with (
        pytest.raises(OptcpuError, match="leave the block before training"),
        optimizer.slow_weights(),
    ):
        optimizer.step()


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("pullback", ["none", "pullback"])
@pytest.mark.parametrize("slow_dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_bit_exact(name: str, pullback: str, slow_dtype: torch.dtype) -> None:
    def run(steps: range, start: list[nn.Parameter], saved: Any = None) -> Lookahead:
        optimizer = Lookahead(INNER[name](start), k=3, pullback=pullback, slow_dtype=slow_dtype)
        if saved is not None:
            optimizer.load_state_dict(saved)
        for step in steps:
            give_gradients(start, seed=step)
            optimizer.step()
        return optimizer

    through, half = parameters(), parameters()
    run(range(10), through)
    saved = copy.deepcopy(run(range(5), half).state_dict())
    resumed = [nn.Parameter(p.detach().clone()) for p in half]
    run(range(5, 10), resumed, saved)
    assert all(torch.equal(a, b) for a, b in zip(through, resumed, strict=True))


def test_state_is_keyed_by_group_and_index() -> None:
    mine = parameters()
    optimizer = Lookahead(AdamW([{"params": mine[:2]}, {"params": mine[2:3]}]))
    own = optimizer.state_dict()["lookahead"]
    assert set(own["slow"]) == {(0, 0), (0, 1), (1, 0)}
    assert own["steps"] == 0


def test_a_checkpoint_of_the_inner_optimizer_alone() -> None:
    mine, yours = twins()
    reference = torch.optim.AdamW(yours)
    give_gradients(mine, yours, seed=0)
    reference.step()
    optimizer = Lookahead(AdamW(mine))
    optimizer.load_state_dict(reference.state_dict())
    assert optimizer.optimizer.state[mine[0]]["step"] == 1
    reference.load_state_dict(optimizer.state_dict())  # and PyTorch takes ours


def test_a_checkpoint_of_another_model_is_refused() -> None:
    saved = Lookahead(AdamW([nn.Parameter(torch.ones(3, 3))])).state_dict()
    optimizer = Lookahead(AdamW([nn.Parameter(torch.ones(2, 3))]))
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 have shape \(3, 3\).*\(2, 3\)"):
        optimizer.load_state_dict(saved)
    assert optimizer.steps == 0


@pytest.mark.parametrize("name", ["ours", "sgd", "pytorch"])
def test_momentum_is_reset(name: str) -> None:
    mine = parameters()
    optimizer = Lookahead(INNER[name](mine), k=2, pullback="reset")
    for step in range(2):
        give_gradients(mine, seed=step)
        optimizer.step()
    key = "momentum_buffer" if name == "sgd" else "exp_avg"
    assert not any(optimizer.state[p][key].any() for p in mine)


def test_momentum_is_pulled_back() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = Lookahead(SGD([weight], lr=1.0, momentum=0.5), k=1, alpha=0.25, pullback="pullback")
    for _ in range(2):
        weight.grad = torch.ones(1)
        optimizer.step()
    # The momentum 1, then 0.5 * 1 + 1 = 1.5, of which a quarter of the way from 1 is kept.
    assert optimizer.state[weight]["momentum_buffer"].item() == pytest.approx(1.125)


def test_slow_weights_in_bf16_follow_on_average() -> None:
    weight = nn.Parameter(torch.ones(20_000))
    optimizer = Lookahead(SGD([weight], lr=1e-4), k=1, alpha=0.5, slow_dtype=torch.bfloat16)
    for _ in range(20):
        weight.grad = torch.ones(20_000)
        optimizer.step()
    # Every step goes half of 1e-4, far below BF16's last bit at 1, which is 2**-8.
    assert weight.mean().item() == pytest.approx(1 - 20 * 0.5e-4, abs=1e-4)


@pytest.mark.parametrize("format", [Format.SPLIT, Format.STOCHASTIC])
def test_stored_weights(format: Format) -> None:
    model = nn.Linear(40, 30)
    twin = copy.deepcopy(model)
    store_weights(model, model.parameters(), format)
    optimizer = Lookahead(AdamW(model.parameters(), lr=0.05, state_dtype=torch.float32), k=2)
    reference = Lookahead(torch.optim.AdamW(twin.parameters(), lr=0.05), k=2)
    for step in range(4):
        give_gradients(list(model.parameters()), list(twin.parameters()), seed=step)
        optimizer.step()
        reference.step()
    tolerance = 2e-6 if format == Format.SPLIT else 2e-2
    assert_equal(list(model.parameters()), list(twin.parameters()), tolerance=tolerance)
    before = model.weight.detach().clone()
    with optimizer.slow_weights():
        pass
    assert torch.equal(model.weight.detach().clone(), before)


def test_schedulers_closures_groups_and_hooks() -> None:
    weight, added = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Lookahead(torch.optim.SGD([weight], lr=0.1), k=2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.add_param_group({"params": [added]})
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight * added).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    scheduler.step()
    optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert calls == ["after", "after"]
    assert (added < 1).all()


def test_parameters_that_the_inner_optimizer_was_given() -> None:
    weight, added = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Lookahead(SGD([weight], lr=1.0), k=2, alpha=0.5)
    weight.grad = torch.ones(2)
    optimizer.step()
    optimizer.optimizer.add_param_group({"params": [added]})
    weight.grad = added.grad = torch.ones(2)
    optimizer.step()
    assert weight.tolist() == [0.0, 0.0]
    assert added.tolist() == [0.5, 0.5]


def test_a_step_that_fails_is_not_counted() -> None:
    optimizer = Lookahead(SGD([nn.Parameter(torch.ones(2))]), k=2)

    def closure() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert optimizer.steps == 0


def test_slow_weights_within_slow_weights() -> None:
    mine = parameters()
    optimizer = Lookahead(AdamW(mine), k=5)
    give_gradients(mine, seed=0)
    optimizer.step()
    fast = [p.detach().clone() for p in mine]
    with optimizer.slow_weights(), optimizer.slow_weights():
        pass
    assert all(torch.equal(a, b) for a, b in zip(mine, fast, strict=True))


def test_copies_and_pickles() -> None:
    mine = parameters()
    optimizer = Lookahead(AdamW(mine), k=2)
    give_gradients(mine, seed=0)
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        theirs = other.param_groups[0]["params"]
        give_gradients(theirs, seed=1)
        other.step()
    give_gradients(mine, seed=1)
    optimizer.step()
    assert_equal(mine, theirs, tolerance=0.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optimizer": nn.Linear(2, 2)}, TypeError, "must be a torch.optim.Optimizer, not Linear"),
        ({"k": 0}, ValueError, "k must be an integer of at least 1, not 0"),
        ({"k": 2.5}, ValueError, "k must be an integer of at least 1, not 2.5"),
        ({"alpha": 1.5}, ValueError, "alpha must lie between 0 and 1, not 1.5"),
        ({"pullback": "all"}, ValueError, "one of none, reset, pullback, not 'all'"),
        ({"slow_dtype": torch.int8}, ValueError, "slow_dtype must be"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)}
    with pytest.raises(error, match=message):
        Lookahead(**{**good, **arguments})


def test_it_stands_at_the_top_level() -> None:
    assert optcpu.Lookahead is Lookahead


def test_a_checkpoint_brings_its_options_and_momenta() -> None:
    mine, yours = twins()
    saved = Lookahead(SGD(yours, momentum=0.5), k=3, alpha=0.25, pullback="pullback")
    optimizer = Lookahead(SGD(mine, momentum=0.5), k=1, alpha=0.75, pullback="pullback")
    give_gradients(mine, yours, seed=0)
    optimizer.step()  # it has momenta to pull back to, which the checkpoint has not
    saved.step()
    optimizer.load_state_dict(saved.state_dict())
    assert (optimizer.k, optimizer.alpha, optimizer.steps) == (3, 0.25, 1)
    assert optimizer.state_dict()["lookahead"]["momenta"] == {}


def test_copies_keep_what_momenta_are_pulled_back_to() -> None:
    mine = parameters()
    optimizer = Lookahead(SGD(mine, lr=0.1, momentum=0.9), k=1, pullback="pullback")
    give_gradients(mine, seed=0)
    optimizer.step()
    other = pickle.loads(pickle.dumps(optimizer))
    for each in (optimizer, other):
        for step in (1, 2):
            give_gradients(each.param_groups[0]["params"], seed=step)
            each.step()
    assert_equal(mine, other.param_groups[0]["params"], tolerance=0.0)


def test_the_memory_order_may_change() -> None:
    weight = nn.Parameter(torch.randn(4, 3, 5, 6))
    optimizer = Lookahead(SGD([weight], lr=0.1), k=1, alpha=0.5)
    start = weight.detach().clone()
    weight.data = weight.data.to(memory_format=torch.channels_last)
    weight.grad = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last)
    expected = start - 0.5 * 0.1 * weight.grad
    optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)


def test_slow_weights_of_others_in_bf16_are_rounded_anew_each_time() -> None:
    weight = nn.Parameter(torch.ones(20_000))
    inner = torch.optim.SGD([weight], lr=2**-9)
    optimizer = Lookahead(inner, k=1, alpha=0.5, slow_dtype=torch.bfloat16)
    for _ in range(8):
        weight.grad = torch.ones(20_000)
        optimizer.step()
    slow = next(iter(optimizer.state_dict()["lookahead"]["slow"].values()))
    assert slow.mean().item() == pytest.approx(1 - 8 * 2**-10, abs=1e-3)
