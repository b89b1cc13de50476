"""The outputs of a frozen prefix are computed once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optcpu.runtime.freezing.cache import PrefixCache, split
from optcpu.runtime.freezing.freezer import DynamicFreezer


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    )


def frozen(count: int) -> nn.Sequential:
    model = network()
    freezer = DynamicFreezer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    freezer.freeze(count)
    prefix, rest = freezer.split()
    assert [*prefix, *rest] == list(model)
    return prefix


def test_the_parts_are_the_model() -> None:
    model, x = network(), torch.randn(7, 2, 3)
    model[1].requires_grad_(False)
    prefix, rest = split(model)
    assert [len(prefix), len(rest)] == [3, 3]
    out = rest(PrefixCache(prefix)(torch.arange(7), x))
    torch.testing.assert_close(out, model(x))
    out.sum().backward()
    assert model[1].weight.grad is None
    assert model[3].weight.grad is not None


def test_each_sample_is_computed_once() -> None:
    prefix, x = frozen(2), torch.randn(20, 2, 3)
    cache = PrefixCache(prefix)
    for indices in ([3, 1, 4], [1, 5, 9, 3], [9, 4, 4], [2, 2]):
        chosen = torch.tensor(indices)
        torch.testing.assert_close(cache(chosen, x[chosen]), prefix(x[chosen]))
    assert cache.computed == 3 + 2 + 0 + 2
    assert cache.bytes == 6 * 4 * 4


def test_memory_is_bounded() -> None:
    prefix, x = frozen(1), torch.randn(9, 2, 3)
    cache = PrefixCache(prefix, max_bytes=3 * 5 * 4 + 1)
    for _ in range(2):
        torch.testing.assert_close(cache(torch.arange(9), x), prefix(x))
    assert cache.bytes == 60
    assert cache.computed == 9 + 6


def test_what_is_not_deterministic_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'0.weight' of the prefix is trained"):
        PrefixCache(nn.Sequential(nn.Linear(2, 2)))
    for layer in (nn.Dropout(0.5), nn.BatchNorm1d(2, affine=False)):
        with pytest.raises(ValueError, match=f"'0' of the prefix is a {type(layer).__name__}"):
            PrefixCache(nn.Sequential(layer))
        PrefixCache(nn.Sequential(layer).eval())
    PrefixCache(nn.Sequential(nn.Dropout(0)))
    attention = nn.MultiheadAttention(4, 2, dropout=0.5).requires_grad_(False)
    recurrent = nn.LSTM(4, 4, num_layers=2, dropout=0.5).requires_grad_(False)
    for layer in (attention, recurrent, nn.RReLU()):
        with pytest.raises(ValueError, match=f"is a {type(layer).__name__} in training mode"):
            PrefixCache(nn.ModuleList([layer]))
        PrefixCache(nn.ModuleList([layer]).eval())
    PrefixCache(nn.LSTM(4, 4).requires_grad_(False))
    prefix = frozen(1)
    cache = PrefixCache(prefix)
    prefix.requires_grad_(True)
    with pytest.raises(ValueError, match="is trained"):
        cache(torch.arange(2), torch.randn(2, 2, 3))
    prefix.requires_grad_(False)
    cache(torch.arange(2), torch.randn(2, 2, 3))
    prefix.requires_grad_(True)
    with pytest.raises(ValueError, match="is trained"):  # though nothing would have to be computed
        cache(torch.arange(2), torch.randn(2, 2, 3))


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(ValueError, match=r"only nn.Sequential models can be split.* Linear"):
        split(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing to split off"):
        split(network())
    with pytest.raises(ValueError, match="nothing left to train"):
        split(network().requires_grad_(False))
    cache = PrefixCache(frozen(1))
    with pytest.raises(ValueError, match=r"shape \[2\], one for each sample, not \[3\]"):
        cache(torch.arange(3), torch.randn(2, 2, 3))
