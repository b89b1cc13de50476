"""Loaders of training and validation data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from optcpu.errors import warn
from optcpu.runtime.data.fetching import (
    Collate,
    SeededBatches,
    as_it_is,
    reading_at_once,
    worker_initializer,
)
from optcpu.runtime.data.randomness import stream_key
from optcpu.runtime.data.sampling import ResumableBatchSampler
from optcpu.runtime.data.sharing import is_shared
from optcpu.runtime.data.sources import end_workers, length_of
from optcpu.runtime.data.workers import choose_workers, cores_for_loading, fetch_time

Workers = int | Literal["auto"]
SomeLoader = TypeVar("SomeLoader", bound=DataLoader[Any])


def make_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool = True,
    seed: int = 0,
    workers: Workers = "auto",
    drop_last: bool = False,
    collate_fn: Collate | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Any]:
    """A loader whose batches depend on the arguments and the epoch alone.

    Neither the number of worker processes nor an interruption changes a batch, random augmentation
    included (:class:`optcpu.runtime.data.fetching.SeededBatches`), and the global generators of this
    process are left alone. Order and split among ranks are those of :class:`ResumableBatchSampler`. Each
    worker process computes with one thread, and lives on from epoch to epoch.

    An ``IterableDataset`` decides on its order and its part for each rank and worker by itself: it gets a
    plain ``DataLoader``.

    Args:
        dataset: map-style or iterable-style.
        batch_size: samples in a batch of this rank.
        shuffle: give the samples in another order in each epoch; not for an ``IterableDataset``.
        seed: of order and augmentation.
        workers: processes that fetch batches; ``"auto"`` measures what fetching a batch takes, and
            decides by :func:`optcpu.runtime.data.workers.choose_workers` (0 for an ``IterableDataset``).
        drop_last: leave out the samples that do not fill a step of all ranks.
        collate_fn: makes a batch of a list of samples; None is PyTorch's ``default_collate``.
        rank: this process, in 0..world_size - 1.
        world_size: number of processes that share the samples.

    Raises:
        TypeError: ``dataset`` has no length, or an argument is of a wrong type.
        ValueError: there are no samples, or an argument is out of range.
    """
    if workers != "auto" and (isinstance(workers, bool) or not isinstance(workers, int)):
        raise TypeError(f'workers must be an integer or "auto", not {type(workers).__name__}')
    if workers != "auto" and workers < 0:
        raise ValueError(f'workers must be 0 or more, or "auto", got {workers}')
    if isinstance(dataset, IterableDataset):
        return DataLoader(
            dataset,
            batch_size,
            num_workers=0 if workers == "auto" else workers,
            collate_fn=collate_fn,
            drop_last=drop_last,
            worker_init_fn=worker_initializer(),
            generator=torch.Generator().manual_seed(stream_key(seed, rank)),
        )
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"a dataset needs __len__ and __getitem__, which {type(dataset).__name__} lacks; an iterable "
            "one must be a torch.utils.data.IterableDataset"
        )
    sampler = ResumableBatchSampler(
        len(dataset),  # an error in it is the dataset's own, and no lack of a length
        batch_size,
        shuffle=shuffle,
        seed=seed,
        drop_last=drop_last,
        rank=rank,
        world_size=world_size,
    )
    batches = SeededBatches(dataset, collate_fn, seed)
    if workers == "auto":
        return _loader_of(ChosenLoader, batches, sampler, _choose(batches, sampler))
    return _loader_of(DataLoader, batches, sampler, workers)


class ChosenLoader(DataLoader[Any]):
    """A loader of :func:`make_loader` whose number of processes was not given, but chosen."""

    dataset: SeededBatches
    batch_sampler: ResumableBatchSampler

    def check_worker_number_rationality(self) -> None:
        """Nothing: PyTorch warns of more processes than cores, of which those that wait take none."""

    def chosen_for(self, step_seconds: float) -> ChosenLoader:
        """One of the same batches, with the number of processes that suits such steps."""
        workers = _choose(self.dataset, self.batch_sampler, step_seconds)
        return _loader_of(ChosenLoader, self.dataset, self.batch_sampler, workers)


def _choose(
    batches: SeededBatches, sampler: ResumableBatchSampler, step_seconds: float | None = None
) -> int:
    return choose_workers(
        fetch_time(batches, sampler),
        cores=cores_for_loading(),
        threads=torch.get_num_threads(),
        step_seconds=step_seconds,
    )


def _loader_of(
    kind: type[SomeLoader], batches: SeededBatches, sampler: ResumableBatchSampler, workers: int
) -> SomeLoader:
    return kind(
        batches,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=as_it_is,
        worker_init_fn=worker_initializer(),
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(0),  # else PyTorch draws from the global one
    )


def evaluation_batches(
    data: Any, batch_size: int, collate_fn: Collate | None = None, world_size: int = 1
) -> Callable[[], Iterable[Any]]:
    """A function that gives all batches of ``data``, in order and the same each time it is called.

    Where several processes train, each goes through all of them, and the first one's results count.

    Args:
        data: a dataset, or what gives batches each time it is gone through.
        batch_size: samples in a batch, where ``data`` are a dataset.
        collate_fn: makes a batch of a list of samples, where ``data`` are a dataset.
        world_size: number of processes that train together.

    Raises:
        TypeError: ``data`` are neither, or can be gone through once only.
        ValueError: they are empty.
    """
    check_data(data)
    if isinstance(data, Iterator):
        raise TypeError(
            f"{type(data).__name__} can be gone through once only: give a list, a DataLoader or a dataset"
        )
    if length_of(data) == 0:
        raise ValueError("the data to evaluate on are empty")
    if world_size > 1 and isinstance(data, DataLoader) and is_shared(data):
        warn(
            "only the first process's part of the validation data counts, as their loader has a "
            "DistributedSampler: leave that out, or give the dataset in place of the loader"
        )
    if not is_dataset(data):
        return lambda: _begun_anew(data)
    loader = make_loader(data, batch_size, shuffle=False, workers=0, collate_fn=collate_fn)

    def batches() -> Iterable[Any]:
        if isinstance(loader.batch_sampler, ResumableBatchSampler):
            loader.batch_sampler.epoch = loader.batch_sampler.consumed = 0
        return loader

    return batches


def _begun_anew(data: Any) -> Iterable[Any]:
    """``data``, whose processes, if any, do not live on: a loader draws a seed for those that are new."""
    end_workers(data)
    return reading_at_once(data)


def check_data(data: Any) -> None:
    """Refuse what is no stream of batches, though it could be iterated over."""
    if isinstance(data, Tensor) or (
        isinstance(data, tuple) and data and all(isinstance(one, Tensor) for one in data)
    ):
        raise TypeError(
            "tensors are no stream of batches: give torch.utils.data.TensorDataset(inputs, targets), or a "
            "list of batches"
        )
    if isinstance(data, (str, bytes, Mapping)) or not (
        is_dataset(data) or hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    ):
        raise TypeError(
            "the data must be a dataset, a DataLoader or an iterable of batches, not "
            f"{type(data).__name__}"
        )


def is_dataset(data: Any) -> bool:
    """Whether ``data`` are samples: PyTorch's datasets, and those of other libraries."""
    if isinstance(data, Dataset):
        return True
    by_index = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return by_index and not isinstance(data, (Sequence, Mapping))
