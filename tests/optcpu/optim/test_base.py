"""What all optimizers share: random bits, memory orders, groups, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from optcpu.optim import SGD, AdamW, Lamb, Lookahead
from optcpu.optim.formats import Format
from optcpu.optim.storing import store_weights
from optcpu.optim.weights import StoredWeight
from tests.optcpu.optim.conftest import assert_equal, give_gradients, twins


def weights_in_bf16(seeds: list[int], steps: int = 1) -> list[torch.Tensor]:
    """BF16 weights that SGD has moved by less than their last bit, each optimizer with its seed."""
    result = []
    for seed in seeds:
        layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(2))
        for layer in layers:
            nn.init.ones_(layer.weight)
        store_weights(layers, layers.parameters(), Format.STOCHASTIC)
        optimizer = SGD(layers.parameters(), lr=2**-10, seed=seed)
        for _ in range(steps):
            for parameter in layers.parameters():
                parameter.grad = torch.ones(64, 64)
            optimizer.step()
        result += [parameter.detach().clone() for parameter in layers.parameters()]
    return result


def test_random_bits_differ_between_seeds_and_parameters_and_come_again() -> None:
    one, neighbour, other, _, again, _ = weights_in_bf16([1, 2, 1])
    assert 0.05 < (one < 1).float().mean() < 0.45  # a quarter of the way to the next number
    for different in (neighbour, other):
        assert (one != different).float().mean() > 0.1
    assert torch.equal(one, again)


def test_moments_and_weights_are_rounded_by_bits_of_their_own() -> None:
    """A second moment and a weight that both lie half-way: that one goes up says nothing of the other."""
    layer = nn.Linear(64, 64, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    store_weights(layer, layer.parameters(), Format.STOCHASTIC)
    optimizer = AdamW(layer.parameters(), lr=2**-9, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)
    gradient = (1 + 2**-8) ** 0.5  # whose square is half-way between two BF16 numbers
    layer.weight.grad = torch.full((64, 64), gradient)
    optimizer.step()
    moment = optimizer.state[layer.weight]["exp_avg_sq"].float() > 1
    moved = layer.weight.detach().clone() < 1
    assert 0.4 < moment.float().mean() < 0.6
    assert 0.3 < moved.float().mean() < 0.7
    assert 0.3 < (moment == moved).float().mean() < 0.7


def test_slow_weights_are_rounded_by_bits_of_their_own() -> None:
    layer = nn.Linear(64, 64, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    store_weights(layer, layer.parameters(), Format.STOCHASTIC)
    inner = SGD(layer.parameters(), lr=2**-9)
    optimizer = Lookahead(inner, k=1, alpha=1.0, slow_dtype=torch.bfloat16)
    layer.weight.grad = torch.ones(64, 64)
    optimizer.step()
    slow = next(iter(optimizer.state_dict()["lookahead"]["slow"].values()))
    assert 0.3 < (layer.weight.detach().clone() == slow).float().mean() < 0.7


@pytest.mark.parametrize("kind", [AdamW, SGD, Lamb])
def test_memory_orders_may_differ_and_change(implementation: str, kind: type) -> None:
    options = {"momentum": 0.9} if kind is SGD else {}
    numbers = torch.randn(4, 3, 5, 6)
    mine, yours = nn.Parameter(numbers.clone()), nn.Parameter(numbers.clone())
    optimizer = kind([mine], lr=0.1, state_dtype=torch.float32, **options)
    reference = kind([yours], lr=0.1, state_dtype=torch.float32, **options)
    for step in range(4):
        if step == 2:
            mine.data = mine.data.to(memory_format=torch.channels_last)
        gradient = torch.randn(4, 3, 5, 6)
        mine.grad = gradient.to(memory_format=torch.channels_last)
        yours.grad = gradient
        optimizer.step()
        reference.step()
    torch.testing.assert_close(mine.detach(), yours.detach(), rtol=1e-5, atol=1e-6)


def test_groups_differ_and_may_be_added_later() -> None:
    mine, yours = twins()
    optimizer, reference = (
        kind(
            [{"params": p[:2], "lr": 0.1}, {"params": p[2:4], "betas": (0.5, 0.6)}], lr=0.01, **more
        )
        for kind, p, more in (
            (AdamW, mine, {"state_dtype": torch.float32}),
            (torch.optim.AdamW, yours, {}),
        )
    )
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": mine[4:], "maximize": True})
            reference.add_param_group({"params": yours[4:], "maximize": True})
        give_gradients(mine, yours, seed=step)
        optimizer.step()
        reference.step()
    assert_equal(mine, yours)


@pytest.mark.parametrize("kind", [AdamW, Lamb])
def test_copies_and_pickles_go_on_alike(kind: type) -> None:
    mine, _ = twins()
    optimizer = kind(mine, lr=0.01, seed=5, **({"max_grad_norm": 0.1} if kind is Lamb else {}))
    give_gradients(mine, seed=0)
    optimizer.step()
    others = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    for each in (optimizer, *others):
        give_gradients(each.param_groups[0]["params"], seed=1)
        each.step()
    for other in others:
        assert_equal(mine, other.param_groups[0]["params"], tolerance=0.0)


def test_a_stored_weight_is_updated_where_it_lies() -> None:
    layer = nn.Linear(4, 4)
    store_weights(layer, layer.parameters(), Format.SPLIT)
    weight = layer.weight
    assert isinstance(weight, StoredWeight)
    address = weight.high.data_ptr()
    optimizer = AdamW(layer.parameters())
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert weight.high.data_ptr() == address
