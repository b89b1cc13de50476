"""Batches of a dataset, the same in whichever process and after whatever they are fetched."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
from collections.abc import Callable, Iterable
from multiprocessing.sharedctypes import RawValue
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    Subset,
    TensorDataset,
    default_collate,
    get_worker_info,
)

from optcpu.random_state import random_state_kept
from optcpu.runtime.data.datasets import SyntheticDataset, resolved_indices
from optcpu.runtime.data.randomness import (
    generators_in,
    seed_everything,
    seed_generator,
    stream_key,
)
from optcpu.runtime.data.sampling import Batch
from optcpu.runtime.data.tokens import TokenDataset

Collate = Callable[[list[Any]], Any]

# Of these PyTorch selects no numbers by their indices.
_NOT_SELECTED = (torch.uint16, torch.uint32, torch.uint64)

_SEARCHES = 3  # for generators in each process, as that takes time


class SeededBatches(Dataset[Any]):
    """Fetches whole batches of a dataset, for a ``DataLoader`` that leaves collating to it.

    Python's, NumPy's and PyTorch's global generators, and those that dataset and ``collate_fn`` own, are
    seeded from ``seed``, the epoch and the place of the batch in it before its samples are fetched and
    collated: random augmentation depends neither on the number of worker processes nor on where a run was
    interrupted. In the main process the global generators are put back behind it.

    Datasets of which a batch can be had at once without any random number (``TensorDataset``,
    :class:`SyntheticDataset`, :class:`TokenDataset`, a ``Subset`` of one) are read in that way.

    Args:
        dataset: map-style.
        collate_fn: makes a batch of a list of samples; None is PyTorch's ``default_collate``.
        seed: of all batches.
    """

    def __init__(self, dataset: Dataset[Any], collate_fn: Collate | None, seed: int) -> None:
        self.dataset = dataset
        self.collate_fn: Collate = default_collate if collate_fn is None else collate_fn
        self.seed = seed
        self._at_once = collate_fn is None and can_batch(dataset)
        self._generators: list[Any] = []
        self._searches, self._process = 0, os.getpid()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitems__(self, batch: Batch) -> Any:
        """The collated samples of ``batch``."""
        try:
            if self._at_once:
                return batch_of(self.dataset, batch)
            if get_worker_info() is not None:
                return self._fetch(batch)
            with random_state_kept():
                return self._fetch(batch)
        except StopIteration as error:  # would pass for the end of the epoch
            raise RuntimeError("the dataset raised StopIteration") from error

    def _fetch(self, batch: Batch) -> Any:
        key = stream_key(self.seed, batch.epoch, batch.start)
        seed_everything(key)
        for number, generator in enumerate(self._own_generators(), start=1):
            seed_generator(generator, stream_key(key, number))
        samples = getattr(self.dataset, "__getitems__", None)
        if samples is not None:
            return self.collate_fn(samples(list(batch)))
        return self.collate_fn([self.dataset[index] for index in batch])

    def _own_generators(self) -> list[Any]:
        """Those of dataset and ``collate_fn``, which may make them when they fetch for the first time."""
        if self._searches < _SEARCHES or self._process != os.getpid():
            self._searches = self._searches + 1 if self._process == os.getpid() else 1
            self._process = os.getpid()
            owners = {"dataset": self.dataset, "collate_fn": self.collate_fn}
            self._generators = [*generators_in(owners).values()]
        return self._generators


def reading_at_once(batches: Iterable[Any]) -> Iterable[Any]:
    """``batches``, or a loader of the same ones that reads each at once and not sample by sample.

    That is possible for a ``DataLoader`` without processes of a dataset that :func:`batch_of` can read.
    Order and random numbers are those of the loader that was given, whose samplers and generator it uses.
    """
    if type(batches) is not DataLoader or batches.num_workers or batches.pin_memory:
        return batches
    if type(batches.batch_sampler) is not BatchSampler or batches.collate_fn is not default_collate:
        return batches
    if not can_batch(batches.dataset):
        return batches
    return DataLoader(
        _WholeBatches(batches.dataset),
        batch_sampler=batches.batch_sampler,
        collate_fn=as_it_is,
        generator=batches.generator,
    )


class _WholeBatches(Dataset[Any]):
    """Gives the batches of a dataset that :func:`batch_of` can read."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitems__(self, indices: list[Any]) -> Any:
        if all(type(index) is int for index in indices):
            return batch_of(self._dataset, indices)
        # Tensors, lists or slices, say: each is a sample to the loader.
        return default_collate([self._dataset[index] for index in indices])


def as_it_is(batch: Any) -> Any:
    """What a loader does to samples that are a batch already."""
    return batch


def can_batch(dataset: Dataset[Any]) -> bool:
    """Whether :func:`batch_of` can read the dataset."""
    if type(dataset) is Subset:
        return can_batch(dataset.dataset)
    if type(dataset) is TensorDataset:
        return all(
            type(one) is torch.Tensor
            and one.layout == torch.strided
            and one.dtype not in _NOT_SELECTED
            for one in dataset.tensors
        )
    return type(dataset) in (SyntheticDataset, TokenDataset)


def batch_of(dataset: Dataset[Any], indices: list[int]) -> list[torch.Tensor]:
    """What ``default_collate`` makes of these samples."""
    if isinstance(dataset, Subset):
        return batch_of(dataset.dataset, [dataset.indices[index] for index in indices])
    if isinstance(dataset, TensorDataset):
        rows = torch.from_numpy(resolved_indices(indices, len(dataset)))
        return [tensor.index_select(0, rows) for tensor in dataset.tensors]
    assert isinstance(dataset, (SyntheticDataset, TokenDataset))
    return list(dataset.batch(indices))


_main_ends = RawValue(ctypes.c_bool, False)  # in memory that loading processes share
# Python tells loading processes to end by one SIGTERM, and waits for them: this comes in front of it.
Finalize(None, lambda: setattr(_main_ends, "value", True), exitpriority=0)


def worker_initializer() -> Callable[[int], None]:
    """What a loading process is to do first, as the ``worker_init_fn`` of a ``DataLoader``."""
    return functools.partial(_begin_worker, _main_ends)


def _begin_worker(main_ends: Any, _: int) -> None:
    """How a loading process treats signals: what is sent to the whole group is for the main one to obey.

    That still needs batches until it stops, and ends the others then. A second SIGTERM ends this one, as
    does the first once the main process comes to its end.
    """

    def terminate(number: int, _: Any) -> None:
        if main_ends.value:
            os._exit(0)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)
