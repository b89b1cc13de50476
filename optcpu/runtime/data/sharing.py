"""Whether each of several processes trains on other data, as far as that can be told."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from optcpu.errors import warn


def warn_if_not_shared(data: Any) -> None:
    """Warn where each process may go through all of the training data."""
    if isinstance(data, (list, tuple)):
        warn(
            "each process goes through all of the training data, as they are a list of batches: give each "
            "process a list of its own, or give a dataset"
        )
    samples = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(samples, IterableDataset):
        if not _knows_the_world(samples):
            _warn_of_stream(samples)
    elif isinstance(data, DataLoader) and not is_shared(data):
        warn(
            "each process goes through all of the training data, as the loader has no "
            "DistributedSampler: give one to the loader, or give the dataset in place of the loader"
        )


def is_shared(loader: DataLoader[Any]) -> bool:
    """Whether each process is to have other samples."""
    by_batch: Any = loader.batch_sampler
    return any(
        _knows_the_world(sampler)
        for sampler in (loader.sampler, by_batch, getattr(by_batch, "sampler", None))
    )


def _knows_the_world(part: Any) -> bool:
    return hasattr(part, "num_replicas") or hasattr(part, "world_size")


def _warn_of_stream(samples: IterableDataset[Any]) -> None:
    name = type(samples).__name__
    warn(
        f"each process goes through all of the training data unless {name} shares them itself, which "
        "cannot be told of an IterableDataset. Remedy, if it does not: let __iter__ give each process its "
        "part, as itertools.islice(samples, rank, None, world_size) does with RANK and WORLD_SIZE from "
        "os.environ, or give a dataset with __len__ and __getitem__. One that has an attribute "
        "world_size is taken to share them"
    )
