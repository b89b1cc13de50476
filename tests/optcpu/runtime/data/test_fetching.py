"""Batches that are read at once, in place of a loader that reads sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from optcpu.runtime.checkpoint.rng import rng_state
from optcpu.runtime.data.fetching import reading_at_once
from optcpu.runtime.data.loaders import evaluation_batches
from optcpu.runtime.data.loading import Feed

DATA = TensorDataset(torch.randn(23, 3, 2), torch.arange(23))


class CountedTensors(TensorDataset):
    """Says how often a sample was read."""

    reads = 0

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.reads += 1
        return super().__getitem__(index)


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "in order": lambda: DataLoader(DATA, 4),
    "shuffled": lambda: DataLoader(DATA, 4, shuffle=True, drop_last=True),
    "own generator": lambda: DataLoader(
        DATA, 4, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "weighted": lambda: DataLoader(
        DATA, 5, sampler=WeightedRandomSampler(torch.rand(23).tolist(), 40)
    ),
    "subset": lambda: DataLoader(Subset(DATA, [*range(-3, 0), 5, 7, 9]), 2, shuffle=True),
    "indices as tensors": lambda: DataLoader(DATA, 4, sampler=torch.randperm(23)),  # type: ignore[arg-type]
    "indices of one number": lambda: DataLoader(
        DATA,
        3,
        sampler=[torch.tensor([1]), torch.tensor([2])],  # type: ignore[arg-type]
    ),
    "lists of indices": lambda: DataLoader(DATA, 2, sampler=[[1, 2], [3, 4], [5, 6]]),  # type: ignore[arg-type]
    "slices": lambda: DataLoader(DATA, 2, sampler=[slice(0, 2), slice(4, 6)]),  # type: ignore[arg-type]
    "channels last": lambda: DataLoader(
        TensorDataset(torch.randn(9, 3, 4, 4).contiguous(memory_format=torch.channels_last)), 2
    ),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_the_batches_and_what_is_drawn_for_them_are_the_loaders(
    make: Callable[[], DataLoader[Any]],
) -> None:
    torch.manual_seed(0)
    plain = make()
    expected, after = [*plain, *plain], rng_state()
    torch.manual_seed(0)
    loader = make()
    at_once = reading_at_once(loader)
    assert at_once is not loader
    given = [*at_once, *at_once]
    assert torch.equal(rng_state()["torch"], after["torch"])
    assert len(given) == len(expected)
    for batch, other in zip(given, expected, strict=True):
        assert type(batch) is type(other)
        for one, two in zip(batch, other, strict=True):
            assert one.dtype == two.dtype
            assert one.stride() == two.stride()
            assert torch.equal(one, two)


class Loader(DataLoader[Any]):
    """One of the user's own."""


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(CountedTensors(torch.randn(9, 2)), 3),
        DataLoader(DATA, 4, collate_fn=lambda samples: default_collate(samples)),
        DataLoader(DATA, batch_size=None),
        DataLoader(DATA, batch_sampler=[[0, 1], [2]]),
        DataLoader(DATA, 4, num_workers=1),
        DataLoader(TensorDataset(torch.eye(4).to_sparse()), 2),
        DataLoader(TensorDataset(torch.ones(4).to(torch.uint16)), 2),
        Loader(DATA, 4),
        [torch.randn(2)],
    ],
    ids=[
        "dataset",
        "collate_fn",
        "samples",
        "batch_sampler",
        "worker",
        "sparse",
        "unsigned",
        "class",
        "list",
    ],
)
def test_what_may_differ_is_left_as_it_is(loader: Any) -> None:
    assert reading_at_once(loader) is loader


def test_an_index_out_of_range_is_told() -> None:
    loader = DataLoader(DATA, 4, sampler=[0, 1, 99])
    with pytest.raises(IndexError, match="index 99 is out of range for a data set of 23"):
        list(reading_at_once(loader))


def test_training_and_validation_read_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, index: int) -> None:
        raise AssertionError("a sample was read by itself")

    monkeypatch.setattr(TensorDataset, "__getitem__", fail)
    loader = DataLoader(DATA, 4, sampler=RandomSampler(DATA))
    feed = Feed(loader)
    assert len(feed.take(3)) == 3
    other = Feed(loader)
    other.load_state_dict(feed.state_dict())
    assert torch.equal(other.take()[0][1], feed.take()[0][1])
    assert len(list(evaluation_batches(loader, 4)())) == 6
