"""Data that each of several processes may go through alone are warned of, once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from optcpu.runtime.data.loading import Feed


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


class Sharing(Stream):
    world_size = 2


def samples() -> TensorDataset:
    return TensorDataset(torch.arange(10))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Stream, r"unless Stream shares them itself.* Remedy.*islice\(samples, rank"),
        (lambda: DataLoader(Stream(), 4), "unless Stream shares them itself"),
        (lambda: DataLoader(samples(), 4), "no DistributedSampler"),
        (lambda: [torch.ones(2)], "a list of batches"),
    ],
)
def test_processes_that_may_not_share_the_data_are_warned_of_once(
    make: Callable[[], Any], message: str
) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        [Feed(make(), batch_size=4, rank=rank, world_size=3) for rank in range(3)]
    assert len(caught) == 1


@pytest.mark.parametrize(
    "make",
    [
        Sharing,
        lambda: DataLoader(Sharing(), 4),
        samples,
        lambda: DataLoader(samples(), 4, sampler=DistributedSampler(samples(), 2, 0)),
    ],
)
def test_those_that_do_are_not(make: Callable[[], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Feed(make(), batch_size=4, world_size=2)
        Feed(Stream(), batch_size=4)
