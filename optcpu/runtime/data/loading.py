"""Training data as micro-batches that can be gone on with at any of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from optcpu.errors import OptcpuError
from optcpu.random_state import random_state_kept
from optcpu.runtime.data.fetching import Collate
from optcpu.runtime.data.loaders import (
    ChosenLoader,
    Workers,
    check_data,
    is_dataset,
    make_loader,
)
from optcpu.runtime.data.sharing import warn_if_not_shared
from optcpu.runtime.data.sources import SampledSource, State, length_of, source_of

_END = object()


class Interrupted(Exception):
    """Batches were asked for, and then no longer wanted."""


class Feed:
    """The stream of micro-batches that training consumes, epoch by epoch.

    Datasets are loaded by :func:`make_loader` and gone on with at any batch, at once, also by another
    number of ranks or with another ``batch_size``. A loader with ``state_dict()`` of its own goes on by
    that. Any other iterable is begun as it was begun and passed through up to where it was
    (:class:`optcpu.runtime.data.sources.ReplayedSource` says when that is exact).

    Args:
        data: a dataset, a ``DataLoader``, or any iterable of batches; one that can be gone through only
            once has one epoch.
        batch_size: samples in a micro-batch, where ``data`` are a dataset, as all that follow.
        seed: of order and augmentation; None is 0.
        shuffle: give the samples in another order in each epoch (an ``IterableDataset`` its own).
        workers: as in :func:`make_loader`.
        drop_last: leave out an incomplete last micro-batch.
        collate_fn: makes a batch of a list of samples.
        rank: this process.
        world_size: number of processes that share the samples.

    Attributes:
        epoch: that is being gone through, counted from 0.
        batches_done: how many of its batches have been taken.
        repeated: the places of those batches, among the ones taken last, that are there only for this
            rank to take part, as there were fewer samples left than ranks: they count as no samples.

    Raises:
        TypeError: ``data`` are of another kind.
        ValueError: there are no data, or an argument is out of range.
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int = 32,
        seed: int | None = 0,
        shuffle: bool = True,
        workers: Workers = "auto",
        drop_last: bool = False,
        collate_fn: Collate | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_data(data)
        if world_size > 1 and rank == 0:
            warn_if_not_shared(data)
        if is_dataset(data):
            data = make_loader(
                data,
                batch_size,
                shuffle=shuffle,
                seed=seed or 0,
                workers=workers,
                drop_last=drop_last,
                collate_fn=collate_fn,
                rank=rank,
                world_size=world_size,
            )
        if length_of(data) == 0:
            raise ValueError("the training data are empty: give at least one batch")
        self._source = source_of(data)
        self._once = isinstance(data, Iterator)
        self.epoch = 0
        self.batches_done = 0
        self.repeated: list[int] = []
        self._batches: Iterator[Any] | None = None
        self._exhausted = False
        self._to_resume: dict[str, Any] | None = None  # after a failure

    @property
    def length(self) -> int | None:
        """Number of batches in this epoch, those that were taken included; None if unknown."""
        left = self._source.batches_left(self.batches_done)
        return None if left is None else self.batches_done + left

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the number of batches in an epoch of these data is not known")
        return self.length

    def take(
        self,
        count: int = 1,
        before: dict[str, Any] | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> list[Any]:
        """The next ``count`` batches, fewer at the end of the epoch, and none behind it.

        Args:
            count: of batches.
            before: what :meth:`state_dict` gives now, if the caller has it already.
            interrupted: asked behind each batch but the last, where the data can be gone through again.

        Raises:
            Interrupted: it said so; the caller has to put back what was taken.
            OptcpuError: fetching one raised an error, which is its cause, or there are no data. Nothing is
                taken then, and the next call tries again.
        """
        before = self.state_dict() if before is None else before
        taken: list[Any] = []
        self.repeated = []
        try:
            self._open()
            while len(taken) < count and (batch := self._next()) is not _END:
                self.repeated += [len(taken)] if self._source.passed() else []
                taken.append(batch)
                # What an iterator has given cannot be put back.
                if len(taken) < count and not self._once and interrupted():
                    raise Interrupted
        except Interrupted:
            raise
        except Exception as error:
            place = f"batch {self.batches_done} of epoch {self.epoch} (counted from 0)"
            self.put_back(before)
            raise OptcpuError(f"the training data failed at {place}: {told(error)}") from error
        if self.batches_done == 0:
            raise OptcpuError(self._nothing())
        return taken

    def put_back(self, before: dict[str, Any]) -> None:
        """Be where :meth:`state_dict` gave ``before``; batches are passed over only when more are taken."""
        # PyTorch raises the news of a dead worker wherever the main thread is: here, too.
        for _ in range(2):
            with contextlib.suppress(RuntimeError):
                self._source.end_workers()
                self._go_to(before["epoch"], before["batches_done"])
        self._go_to(before["epoch"], before["batches_done"])
        self._to_resume = before

    def end_workers(self) -> None:
        """End processes that wait to load more, if others can go on at once where they are."""
        if isinstance(self._source, SampledSource):
            self.put_back(self.state_dict())

    def add_workers(self, step_seconds: float) -> None:
        """Go on with more processes, if their number was chosen and did not suffice.

        Args:
            step_seconds: what training takes for a batch.
        """
        source = self._source
        if not isinstance(source, SampledSource) or not isinstance(source.loader, ChosenLoader):
            return
        loader = source.loader.chosen_for(step_seconds)
        if loader.num_workers <= source.loader.num_workers:
            return
        self.put_back(self.state_dict())  # which ends the processes that are there
        self._source = source_of(loader)

    def next_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self._go_to(self.epoch + 1, 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: numbers, tensors and what the data's own generators and states hold."""
        if self._to_resume is not None:
            return self._to_resume
        begun = self._batches is not None or self.batches_done > 0
        source = self._source
        return {
            "epoch": self.epoch,
            "batches_done": self.batches_done,
            "kind": source.kind,
            "begun": begun,
            "source": source.state_dict() if begun else source.state_between_epochs(),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from where a stream of the same data was.

        Data that have to be passed through move the global generators: put these back afterwards to where
        they stood when ``state`` was made.

        Raises:
            OptcpuError: the state is of other data, or they failed where they are passed through.
        """
        if state["kind"] != self._source.kind:
            raise OptcpuError(
                f"the checkpoint goes on with the training data by {state['kind']!r}, but these data go on "
                f"by {self._source.kind!r}: give the trainer data of the kind that it had (a dataset, or a "
                "DataLoader)"
            )
        self._go_to(state["epoch"], state["batches_done"])
        try:
            if state["begun"]:
                self._batches = self._source.resume(self.epoch, self.batches_done, state["source"])
            else:
                self._source.go_between_epochs(state["source"])
        except OptcpuError:
            raise
        except Exception as error:
            raise OptcpuError(
                f"the training data failed on the way back to batch {self.batches_done} of epoch "
                f"{self.epoch} (counted from 0): {told(error)}"
            ) from error

    def _open(self) -> None:
        if self._to_resume is not None:
            with random_state_kept():
                self.load_state_dict(self._to_resume)
        if self._batches is None and not self._exhausted:
            self._batches = self._source.start(self.epoch)

    def _next(self) -> Any:
        if self._exhausted or self._batches is None:
            return _END
        batch = next(self._batches, _END)
        if batch is _END:
            self._exhausted = True
        else:
            self.batches_done += 1
        return batch

    def _go_to(self, epoch: int, batches_done: int) -> None:
        self.epoch, self.batches_done = epoch, batches_done
        self._batches, self._exhausted, self._to_resume = None, False, None

    def _nothing(self) -> str:
        if self._once and self.epoch:
            return (
                "the training data could be gone through only once: give a list, a DataLoader or a "
                "dataset for more than one epoch"
            )
        return "the training data are empty: give at least one batch"


def told(error: Exception) -> str:
    """Type and message of an error; of a worker's, which carries its traceback, the last line."""
    name, lines = type(error).__name__, str(error).strip().splitlines()
    if lines and lines[0].startswith("Caught "):
        return lines[-1] if name in lines[-1] else f"{name}: {lines[-1]}"
    told = f"{name}: {lines[0]}" if lines else name
    if isinstance(error, (EOFError, ConnectionError)):  # what is left of a pipe to a dead process
        told += " (if processes load the data, one was killed or exited)"
    return told
