"""The ways in which data can be gone on with in the middle of an epoch."""

from __future__ import annotations

import abc
import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeGuard, cast

from torch.utils.data import DataLoader, Dataset, IterableDataset

from optcpu.errors import OptcpuError, warn
from optcpu.random_state import random_state_kept
from optcpu.runtime.checkpoint.rng import rng_state, set_rng_state
from optcpu.runtime.data.fetching import SeededBatches, reading_at_once
from optcpu.runtime.data.randomness import generator_state, generators_in, set_generator_state
from optcpu.runtime.data.sampling import ResumableBatchSampler

logger = logging.getLogger("optcpu.trainer")

State = Mapping[str, Any]

_NEW_WORKERS = "new_workers"


class Source(abc.ABC):
    """Data that can be gone through epoch by epoch.

    Attributes:
        kind: of the source, as a checkpoint names it.
    """

    kind: str

    @abc.abstractmethod
    def start(self, epoch: int) -> Iterator[Any]:
        """The batches of an epoch."""

    @abc.abstractmethod
    def resume(self, epoch: int, done: int, state: State) -> Iterator[Any]:
        """The batches of an epoch without the first ``done``; ``state`` is from behind those."""

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What :meth:`resume` needs to know besides the numbers of epoch and batch."""

    @abc.abstractmethod
    def batches_left(self, done: int) -> int | None:
        """How many batches of the epoch come after ``done``; None if unknown."""

    def state_between_epochs(self) -> dict[str, Any]:
        """What :meth:`go_between_epochs` needs to know."""
        return {}

    def go_between_epochs(self, state: State) -> None:  # noqa: B027 (most have nothing to do)
        """Make ready for the next epoch as it was when ``state`` was made."""

    def end_workers(self) -> None:  # noqa: B027 (most have none)
        """End worker processes that live on from epoch to epoch, one of which may be dead."""

    def passed(self) -> bool:
        """Take note that a batch was given to training; whether it only repeats another rank's sample."""
        return False


class SampledSource(Source):
    """A loader of :func:`optcpu.runtime.data.loaders.make_loader`: the sampler begins wherever it is told.

    Attributes:
        loader: of :class:`SeededBatches`, with a :class:`ResumableBatchSampler`.
    """

    kind = "sampler"

    def __init__(self, loader: DataLoader[Any]) -> None:
        assert isinstance(loader.batch_sampler, ResumableBatchSampler)
        self.loader, self._sampler = loader, loader.batch_sampler
        # The sampler's own state is ahead of training where worker processes fetch ahead of time.
        self._state = self._sampler.state_dict()

    def start(self, epoch: int) -> Iterator[Any]:
        return self._from({**self._state, "epoch": epoch, "consumed": 0})

    def resume(self, epoch: int, done: int, state: State) -> Iterator[Any]:
        self._sampler.load_state_dict(state)  # refuses what does not fit
        return self._from({**self._state, "epoch": epoch, "consumed": state["consumed"]})

    def _from(self, state: dict[str, Any]) -> Iterator[Any]:
        self._state = state
        self._sampler.load_state_dict(state)
        return iter(self.loader)

    def end_workers(self) -> None:
        end_workers(self.loader)

    def passed(self) -> bool:
        share = self._sampler.share(self._state["consumed"])
        self._state["consumed"] += share.total
        return share.count == 0

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def batches_left(self, done: int) -> int:
        return self._sampler.steps_after(self._state["consumed"] if done else 0)


class StatefulSource(Source):
    """A loader with ``state_dict()`` and ``load_state_dict()``, as torchdata's ``StatefulDataLoader``.

    It goes on as exactly as those two are: torchdata's (0.11) with worker processes goes on with the
    right samples, but not with the random numbers that the workers' global generators would have given.
    """

    kind = "loader"

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        # Asking a loader that was not iterated over for its state draws random numbers: this is it.
        self._between: dict[str, Any] | None = {}

    def start(self, epoch: int) -> Iterator[Any]:
        _set_epoch(self._loader, epoch)
        self._between = None
        with random_state_kept():  # torchdata's draws twice where it goes on between epochs
            return iter(self._loader)

    def resume(self, epoch: int, done: int, state: State) -> Iterator[Any]:
        _set_epoch(self._loader, epoch)
        self._loader.load_state_dict(state["loader"])
        self._between = None
        return iter(self._loader)

    def state_dict(self) -> dict[str, Any]:
        return {"loader": self._loader.state_dict()}

    def state_between_epochs(self) -> dict[str, Any]:
        return self.state_dict() if self._between is None else self._between

    def go_between_epochs(self, state: State) -> None:
        self._between = dict(state)
        if "loader" in state:
            self._loader.load_state_dict(state["loader"])

    def batches_left(self, done: int) -> int | None:
        length = length_of(self._loader)
        return None if length is None else max(0, length - done)


class ReplayedSource(Source):
    """Any other iterable: the epoch is begun as it was begun, and what was used is passed over.

    What is remembered are Python's, NumPy's and PyTorch's global generators and the generators that are
    attributes of the loader, its samplers and its dataset, as they stood when the epoch began. Batches
    that were used are fetched again, which may take a while, and moves the global generators.

    That is exact if what is fetched depends on those generators, and its order not on random numbers
    that fetching takes from a global generator in turn with the model. Workers that live on from epoch
    to epoch (``persistent_workers``) keep generators that nobody can see: there is a warning. Their
    loader draws a seed for new workers and none for those that live on, in front of what its sampler
    draws: whether an epoch begins with new ones is remembered as well.

    Args:
        batches: the iterable.
    """

    kind = "replay"

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self._beginning: dict[str, Any] | None = None

    def start(self, epoch: int) -> Iterator[Any]:
        _set_epoch(self._batches, epoch)
        sizes = self._sizes()  # those of this epoch
        self._beginning = {"rng": rng_state(), **self.state_between_epochs(), "sizes": sizes}
        return iter(reading_at_once(self._batches))

    def resume(self, epoch: int, done: int, state: State) -> Iterator[Any]:
        beginning = state["beginning"]
        new_workers = beginning.get(_NEW_WORKERS)
        if new_workers is None and epoch and _workers_live_on(self._batches):
            _warn_of_workers()
        if done and new_workers is False and not _workers_live_on(self._batches):
            raise OptcpuError(
                f"the checkpoint is in the middle of epoch {epoch}, whose samples were drawn by a loader "
                "with persistent_workers=True, but now the loader has no such workers and draws others: "
                "go on with persistent_workers=True, or start from a checkpoint between epochs"
            )
        self._begin_workers(new_workers)
        _set_epoch(self._batches, epoch)
        self._set_generators(beginning["generators"])
        if done:
            self._check_alike(beginning.get("sizes", {}))
        set_rng_state(beginning["rng"])
        self._beginning = beginning
        if done:
            logger.info("passing over the %d batches of epoch %d that were used", done, epoch)
        iterator = iter(reading_at_once(self._batches))
        passed = sum(1 for _ in islice(iterator, done))
        if passed < done:
            raise OptcpuError(
                f"the checkpoint is behind batch {done} of epoch {epoch}, but the training data now end "
                f"after {passed}: go on with the same data"
            )
        return iterator

    def end_workers(self) -> None:
        end_workers(self._batches)

    def state_dict(self) -> dict[str, Any]:
        return {"beginning": self._beginning}

    def _sizes(self) -> dict[str, int | None]:
        batch_size = getattr(self._batches, "batch_size", None)
        return {
            "batches in an epoch": length_of(self._batches),
            "batch_size": batch_size if isinstance(batch_size, int) else None,
        }

    def _check_alike(self, saved: dict[str, int | None]) -> None:
        """Refuse batches of which others would have been used by now."""
        for name, now in self._sizes().items():
            if saved.get(name, now) != now:
                raise OptcpuError(
                    f"the checkpoint is in the middle of an epoch over data with {name}={saved[name]}, but "
                    f"now {name}={now}: which samples are left cannot be told. Remedy: go on with the same "
                    "data, or start from a checkpoint between epochs"
                )

    def state_between_epochs(self) -> dict[str, Any]:
        generators = _generators(self._batches)
        states = {name: generator_state(one) for name, one in generators.items()}
        if not _keeps_iterator(self._batches):
            return {"generators": states}
        return {"generators": states, _NEW_WORKERS: self._batches._iterator is None}

    def go_between_epochs(self, state: State) -> None:
        self._begin_workers(state.get(_NEW_WORKERS))
        self._set_generators(state["generators"])

    def _begin_workers(self, new: bool | None) -> None:
        """Let the epoch that comes next begin with new worker processes, or with some that are there.

        That may move generators, and the samplers.

        Args:
            new: which of the two; None, as in checkpoints of old, leaves it.
        """
        if new is None or not _keeps_iterator(self._batches):
            return
        if new:
            end_workers(self._batches)
        elif _workers_live_on(self._batches):
            _warn_of_workers()
            if self._batches._iterator is None:
                _set_epoch(self._batches, 0)  # so were those begun that lived on
                iter(self._batches)

    def _set_generators(self, saved: Mapping[str, Any]) -> None:
        generators = _generators(self._batches)
        if set(generators) < set(saved):
            _fetch_a_sample(self._batches)
            generators = _generators(self._batches)
        if set(generators) != set(saved):
            raise OptcpuError(
                f"the checkpoint has the generators {sorted(saved)} of the training data, which now have "
                f"{sorted(generators)}: go on with the same data"
            )
        for name, generator in generators.items():
            set_generator_state(generator, saved[name])

    def batches_left(self, done: int) -> int | None:
        length = length_of(self._batches)
        return None if length is None else max(0, length - done)


def source_of(batches: Iterable[Any]) -> Source:
    """The most exact way to go through ``batches`` that they allow."""
    if isinstance(batches, DataLoader) and isinstance(batches.dataset, SeededBatches):
        return SampledSource(batches)
    if all(callable(getattr(batches, name, None)) for name in ("state_dict", "load_state_dict")):
        return StatefulSource(batches)
    return ReplayedSource(batches)


def length_of(batches: Any) -> int | None:
    """Number of batches in an epoch; None if unknown.

    Raises:
        TypeError: ``__len__`` gives no integer.
        ValueError: ``__len__`` gives a negative number.
    """
    read = getattr(type(batches), "__len__", None)
    if read is None:
        return None
    # TypeError from __len__ means "no length" in Python (operator.length_hint), as in a DataLoader over an
    # IterableDataset; samplers and streams without an end raise NotImplementedError by custom.
    # A mistake of a dataset's that looks the same is met by the loader's iterator, and told as it is.
    try:
        read(batches)
    except (TypeError, NotImplementedError):
        return None
    return len(batches)  # out of the try: what is no length is the object's own mistake


def parts_of(batches: Any) -> dict[str, Any]:
    """The objects of a loader that may hold generators or want to know the epoch, by name."""
    parts = {"loader": batches}
    if isinstance(batches, DataLoader):
        parts["sampler"], parts["collate_fn"] = batches.sampler, batches.collate_fn
        parts["batch_sampler"] = batches.batch_sampler
        parts["batch_sampler.sampler"] = getattr(batches.batch_sampler, "sampler", None)
        name, dataset = "dataset", cast(Any, batches.dataset)
        while isinstance(dataset, Dataset):
            parts[name] = dataset
            name, dataset = f"{name}.dataset", getattr(dataset, "dataset", None)
    return parts


def _generators(batches: Any) -> dict[str, Any]:
    """The generators of the parts and of what they consist of, each once, by name."""
    return generators_in(parts_of(batches))


def _set_epoch(batches: Any, epoch: int) -> None:
    for part in parts_of(batches).values():
        if isinstance(part, ResumableBatchSampler):
            part.epoch, part.consumed = epoch, 0
        elif callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)


def _keeps_iterator(batches: Any) -> TypeGuard[DataLoader[Any]]:
    """Whether this is a loader that says where it keeps worker processes that live on."""
    return isinstance(batches, DataLoader) and hasattr(batches, "_iterator")


def end_workers(batches: Any) -> None:
    if _keeps_iterator(batches):
        batches._iterator = None  # which ends those that are there


def _fetch_a_sample(batches: Any) -> None:
    """Let a dataset make the generators that it makes when it fetches for the first time."""
    if not isinstance(batches, DataLoader) or isinstance(batches.dataset, IterableDataset):
        return
    # What does not go here is told where the epoch is gone through.
    with random_state_kept(), contextlib.suppress(Exception):
        batches.collate_fn([batches.dataset[0]])


def _workers_live_on(batches: Any) -> bool:
    return (
        isinstance(batches, DataLoader) and batches.num_workers > 0 and batches.persistent_workers
    )


def warn_if_not_exact(batches: Any) -> None:
    """Warn where a run that will be interrupted could not be gone on with to the bit."""
    if _workers_live_on(batches):
        _warn_of_workers()


def _warn_of_workers() -> None:
    warn(
        "the loader has persistent_workers=True: where a run is interrupted and gone on with, random "
        "augmentation in the worker processes does not go on as it would have. Remedy: "
        "persistent_workers=False from the start, or give the dataset in place of the loader"
    )
