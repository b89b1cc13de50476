"""Which samples make up which batch, as a function of seed, epoch and position alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from optcpu.errors import OptcpuError
from optcpu.runtime.data.randomness import UInt64, random_bits, stream_key

_SORTED_UP_TO = 1 << 16
_BLOCK = 1 << 14
_ROUNDS = 6


class Batch(list[int]):
    """The samples of one rank's next batch, and where in the epoch they stand.

    Attributes:
        epoch: counted from 0.
        start: how many samples of the epoch come before the first of these.
    """

    def __init__(self, indices: list[int], epoch: int, start: int) -> None:
        super().__init__(indices)
        self.epoch = epoch
        self.start = start

    def __reduce__(self) -> tuple[Any, ...]:  # travels to worker processes
        return type(self), (list(self), self.epoch, self.start)


@dataclass(frozen=True)
class Share:
    """One rank's part of the samples that all ranks take in one step.

    Attributes:
        start: how many samples of the epoch come before this rank's.
        count: samples of this rank; 0 for a rank that repeats one to take part.
        total: samples of all ranks together.
    """

    start: int
    count: int
    total: int


class ResumableBatchSampler(Sampler[list[int]]):
    """The batches of an epoch for one rank, to be gone on with at any sample, in any other split.

    The order of an epoch depends on ``(size, seed, epoch)`` alone. One step takes the next
    ``batch_size * world_size`` samples of it, rank 0 the first ``batch_size`` of them, and so on: two ranks
    with batches of 64 take, step by step, the samples of one rank with batches of 128.

    All ranks make the same number of steps, as collective operations need. The samples that are left for
    the last step are split over the ranks as evenly as possible, which need not be equally: gradients are
    right if each batch counts by its size. Fewer samples than ranks are added to the step before, so that
    no rank is without any. (A run that goes on with more ranks may find fewer samples left than those; a
    rank without any then repeats one, and its :class:`Share` says 0.)

    Memory does not grow with the number of steps, and not with ``size`` beyond 2**16 samples (see
    :class:`Permutation`).

    Going through all batches of an epoch begins the next one. A loader with worker processes asks for
    batches ahead of time, so that :meth:`state_dict` of its sampler is ahead of training as well:
    :class:`optcpu.runtime.data.loading.Feed` counts what was really handed out.

    Args:
        size: number of samples.
        batch_size: samples of one rank in one step.
        shuffle: permute the samples anew in each epoch; otherwise they come as they are numbered.
        seed: of the permutations.
        drop_last: leave out the samples that do not fill a step of all ranks.
        rank: this process, in 0..world_size - 1.
        world_size: number of processes that share the samples.

    Raises:
        ValueError: there are no samples, none are left with ``drop_last``, or a number is out of range.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value in {"batch_size": batch_size, "world_size": world_size}.items():
            if _integer(name, value) < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= _integer("rank", rank) < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1} (world_size - 1), got {rank}")
        if _integer("size", size) < 1:
            raise ValueError("the training data are empty: there is no sample to take batches from")
        if size < world_size:
            raise ValueError(f"{size} samples cannot be shared by {world_size} ranks")
        if drop_last and size < batch_size * world_size:
            raise ValueError(
                f"drop_last leaves nothing of {size} samples: a step takes {batch_size * world_size} "
                f"(batch_size {batch_size} on {world_size} ranks); remedy: a smaller batch_size or "
                "drop_last=False"
            )
        self.size = size
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = _integer("seed", seed)
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.consumed = 0
        self._order: Permutation | None = None

    def __len__(self) -> int:
        """Number of batches in a whole epoch, the same for all ranks."""
        return self.steps_after(0)

    def __iter__(self) -> Iterator[list[int]]:
        """What is left of the epoch. Each batch counts as consumed as soon as it is given."""
        epoch, order = self.epoch, self._permutation()
        for _ in range(self.steps_after(self.consumed)):
            share = self.share(self.consumed)
            indices = order.take(share.start, share.start + max(share.count, 1))
            self.consumed += share.total
            yield Batch(indices.tolist(), epoch, share.start)
        self.epoch, self.consumed = epoch + 1, 0

    def steps_after(self, consumed: int) -> int:
        """How many batches of an epoch are left once ``consumed`` samples have been taken."""
        full, tail = divmod(self.size - consumed, self.batch_size * self.world_size)
        if self.drop_last or tail == 0 or (full and tail < self.world_size):
            return full
        return full + 1

    def share(self, consumed: int) -> Share:
        """This rank's part of the step that comes after ``consumed`` samples of an epoch."""
        left, full = self.size - consumed, self.batch_size * self.world_size
        total = min(full, left)
        if 0 < left - full < self.world_size and not self.drop_last:
            total = left
        first = total * self.rank // self.world_size
        count = total * (self.rank + 1) // self.world_size - first
        return Share(start=consumed + min(first, total - 1), count=count, total=total)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; the one that is being gone through goes on where it is.

        Raises:
            ValueError: ``epoch`` is negative.
        """
        if _integer("epoch", epoch) < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        if epoch != self.epoch:
            self.epoch, self.consumed = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch is: plain numbers, the same on all ranks, for any split of the samples."""
        return {
            "epoch": self.epoch,
            "consumed": self.consumed,
            "size": self.size,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another sampler was, with whatever ``batch_size`` and ``world_size``.

        Raises:
            OptcpuError: the state is damaged, or is in the middle of an epoch whose samples or order are
                others here.
        """
        try:
            epoch, consumed = _integer("epoch", state["epoch"]), _integer("", state["consumed"])
            present = {name: state[name] for name in ("size", "seed", "shuffle")}
            valid = epoch >= 0 and 0 <= consumed <= present["size"]
        except (KeyError, TypeError) as error:
            raise OptcpuError(f"this is no state of a sampler: {state!r}") from error
        if not valid:
            raise OptcpuError(f"this state of a sampler is damaged: {state!r}")
        for name, value in present.items():
            if consumed and getattr(self, name) != value:
                raise OptcpuError(
                    f"the checkpoint is in the middle of an epoch over data with {name}={value}, but now "
                    f"{name}={getattr(self, name)}: which samples are left cannot be told. Remedy: go on "
                    f"with the same data and {name}={value}, or start from a checkpoint between epochs"
                )
        self.epoch, self.consumed = epoch, consumed

    def _permutation(self) -> Permutation:
        if self._order is None or self._order.epoch != self.epoch:
            self._order = Permutation(self.size, self.seed, self.epoch, shuffle=self.shuffle)
        return self._order


class Permutation:
    """A random order of ``0..size - 1``, made of ``(size, seed, epoch)``, read piece by piece.

    Up to 2**16 samples it is made at once, by sorting random keys: any order may come out. Beyond that it
    is computed where it is read, by a generalised Feistel network over ``a * b >= size`` with cycle walking
    (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002), which takes 0.1 us a sample
    and no memory, where shuffling 10**8 samples takes 800 MB. PyTorch's ``randperm`` may also give another
    order in another version of PyTorch, with which a checkpoint could not be gone on with.

    Args:
        size: number of samples.
        seed: of the order.
        epoch: of the order.
        shuffle: False gives ``0..size - 1`` as they are.
    """

    def __init__(self, size: int, seed: int, epoch: int, *, shuffle: bool = True) -> None:
        self.size = size
        self.epoch = epoch
        self.shuffle = shuffle
        self._key = stream_key(seed, epoch)
        self._start = 0
        self._block: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def take(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Its entries ``start`` to ``stop - 1``, int64."""
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
        if not self._start <= start <= stop <= self._start + len(self._block):
            self._start, self._block = self._block_from(start, stop)
        return self._block[start - self._start : stop - self._start]

    def _block_from(self, start: int, stop: int) -> tuple[int, npt.NDArray[np.int64]]:
        if self.size <= _SORTED_UP_TO:
            keys = random_bits(self._key, np.arange(self.size, dtype=np.uint64))
            return 0, np.argsort(keys)  # no two keys are the same, so that any sort gives one order
        stop = min(max(stop, start + _BLOCK), self.size)
        entries = permuted(np.arange(start, stop, dtype=np.uint64), self.size, self._key)
        return start, entries.astype(np.int64)


def permuted(positions: UInt64, size: int, key: int) -> UInt64:
    """What a pseudo-random permutation of ``0..size - 1`` has at ``positions``, uint64 ``[n]``.

    A position is written as ``left * b + right`` with ``left < a``, ``right < b``; in turn, a random
    function of one is added to the other. That permutes ``0..a * b - 1``; a result beyond ``size`` is
    permuted again until it is inside.
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    results = _feistel(positions, a, b, key)
    outside = np.flatnonzero(results >= size)
    while len(outside):
        results[outside] = _feistel(results[outside], a, b, key)
        outside = outside[results[outside] >= size]
    return results


def _feistel(values: UInt64, a: int, b: int, key: int) -> UInt64:
    left, right = np.divmod(values, np.uint64(b))
    for number in range(0, _ROUNDS, 2):
        left = (left + random_bits(stream_key(key, number), right) % np.uint64(a)) % np.uint64(a)
        right = (right + random_bits(stream_key(key, number + 1), left) % np.uint64(b)) % np.uint64(
            b
        )
    results: UInt64 = left * np.uint64(b) + right
    return results


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    return int(value)
