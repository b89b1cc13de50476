"""Batches of a dataset, the same in whichever process and after whatever they are fetched."""

from __future__ import annotations

import copy
import math
import os
import signal
import time
from collections.abc import Callable
from itertools import islice
from typing import Any, cast

import torch
from torch.utils.data import (
    Dataset,
    Subset,
    TensorDataset,
    default_collate,
    get_worker_info,
)

from optcpu.cpu import capabilities
from optcpu.random_state import random_state_kept
from optcpu.runtime.data.datasets import SyntheticDataset
from optcpu.runtime.data.randomness import seed_everything, stream_key
from optcpu.runtime.data.sampling import Batch, ResumableBatchSampler
from optcpu.runtime.data.tokens import TokenDataset

Collate = Callable[[list[Any]], Any]

_WORTH_A_SPARE_CORE, _WORTH_A_BUSY_CORE, _USUAL_STEP = 2e-3, 10e-3, 20e-3  # seconds
_PROBES, _PROBE_SECONDS = 3, 0.2


class SeededBatches(Dataset[Any]):
    """Fetches whole batches of a dataset, for a ``DataLoader`` that leaves collating to it.

    Python's, NumPy's and PyTorch's global generators are seeded from ``seed``, the epoch and the place of
    the batch in it before its samples are fetched and collated: random augmentation depends neither on the
    number of worker processes nor on where a run was interrupted. In the main process the generators
    are put back behind it.

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
        seed_everything(stream_key(self.seed, batch.epoch, batch.start))
        samples = getattr(self.dataset, "__getitems__", None)
        if samples is not None:
            return self.collate_fn(samples(list(batch)))
        return self.collate_fn([self.dataset[index] for index in batch])


def can_batch(dataset: Dataset[Any]) -> bool:
    """Whether :func:`batch_of` can read the dataset."""
    if type(dataset) is Subset:
        return can_batch(dataset.dataset)
    return type(dataset) in (TensorDataset, SyntheticDataset, TokenDataset)


def batch_of(dataset: Dataset[Any], indices: list[int]) -> list[torch.Tensor]:
    """What ``default_collate`` makes of these samples."""
    if isinstance(dataset, Subset):
        return batch_of(dataset.dataset, [dataset.indices[index] for index in indices])
    if isinstance(dataset, TensorDataset):
        rows = torch.tensor(indices)
        return [tensor.index_select(0, rows) for tensor in dataset.tensors]
    assert isinstance(dataset, (SyntheticDataset, TokenDataset))
    return list(dataset.batch(indices))


def begin_worker(_: int) -> None:
    """How a loading process treats signals: Ctrl-C is for the main one, which ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def choose_workers(
    batch_seconds: float, *, cores: int, threads: int, step_seconds: float | None = None
) -> int:
    """How many processes shall fetch batches.

    A worker on a core of its own hides what fetching takes, and costs the transfer of each batch. A worker
    that takes a core from training makes the other threads wait at the end of each parallel loop. With a
    small network on two cores that both trained, one worker made steps 1.8 times as slow where a batch took
    1 to 5 ms of NumPy work, and two were about even or a little better at 20 ms. That was one run of three
    rounds on cores that other programs used as well: the limit for busy cores is a guess between those,
    and the one for spare cores was not measured.

    Args:
        batch_seconds: that the main process takes to fetch one.
        cores: that this process may use.
        threads: that training computes with.
        step_seconds: that training takes for one; None if unknown.
    """
    spare = cores - threads
    if batch_seconds < (_WORTH_A_SPARE_CORE if spare > 0 else _WORTH_A_BUSY_CORE):
        return 0
    wanted = math.ceil(batch_seconds / (step_seconds or _USUAL_STEP))
    return min(wanted, spare if spare > 0 else cores)


def cores_for_loading() -> int:
    """Physical cores that this process may use, if all that torchrun started here take the same share."""
    shared_by = os.environ.get("LOCAL_WORLD_SIZE", "1")
    processes = int(shared_by) if shared_by.isdigit() and int(shared_by) else 1
    return max(1, capabilities().physical_cores // processes)


def seconds_per_batch(batches: SeededBatches, sampler: ResumableBatchSampler) -> float:
    """Measured seconds for fetching a batch in this process: the least of up to three.

    0 if that fails: the error is to come up in training, where its place can be told.
    """
    times: list[float] = []
    try:
        for batch in islice(copy.copy(sampler), _PROBES):  # the sampler itself stays where it is
            started = time.perf_counter()
            batches.__getitems__(cast(Batch, batch))
            times.append(time.perf_counter() - started)
            if sum(times) > _PROBE_SECONDS:
                break
    except Exception:
        return 0.0
    return min(times)
