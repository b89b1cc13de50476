"""Going on with the data: whatever they are, at any batch, the rest is what it would have been."""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
)

from optcpu.errors import OptcpuError
from optcpu.runtime.checkpoint.rng import rng_state, set_rng_state
from optcpu.runtime.data.datasets import SyntheticDataset
from optcpu.runtime.data.loaders import evaluation_batches, make_loader
from optcpu.runtime.data.loading import Feed
from optcpu.runtime.data.tokens import TokenDataset
from tests.optcpu.runtime.data.samples import Augmented


class Failing(Dataset[int]):
    def __init__(self, error: Exception, at: int = 7) -> None:
        self.error, self.at, self.broken = error, at, True

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        if index == self.at and self.broken:
            raise self.error
        return index


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


def epochs(feed: Feed, count: int) -> list[list[Any]]:
    """What is left of this epoch, then whole ones, ``count`` epochs in all."""
    result = []
    for _ in range(count):
        batches = []
        while taken := feed.take(2):
            batches += taken
        result.append(batches)
        feed.next_epoch()
    return result


def flat(batches: list[Any]) -> list[Any]:
    return [b.tolist() if isinstance(b, Tensor) else b for epoch in batches for b in epoch]


def assert_resumes_everywhere(make: Callable[[], Any], *, model_draws: bool = True) -> None:
    """At every batch of two epochs the rest, and the global generators, are as without interruption."""

    def run(feed: Feed, stop: int | None) -> tuple[list[Any], Any]:
        """Batches, and [] at the ends of epochs, until there are ``stop`` of them."""
        events: list[Any] = []
        while feed.epoch < 2 and len(events) != stop:
            taken = feed.take(1)
            events.append([batch.tolist() for batch in taken])
            if not taken:
                feed.next_epoch()
            elif model_draws:  # as dropout does
                torch.rand(3), np.random.randn(), random.random()
        return events, (copy.deepcopy(feed.state_dict()), rng_state())

    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    start = rng_state()
    expected, _ = run(Feed(make(), batch_size=4), None)
    final = torch.rand(())
    assert len({str(event) for event in expected}) == len(expected) - 1  # two epochs end
    for stop in range(len(expected) + 1):
        set_rng_state(start)
        first, (state, rng) = run(Feed(make(), batch_size=4), stop)
        torch.rand(7)
        feed = Feed(make(), batch_size=4)
        feed.load_state_dict(state)
        set_rng_state(rng)
        rest, _ = run(feed, None)
        assert first + rest == expected, stop
        assert torch.rand(()) == final


class TestOwnLoader:
    def test_it_goes_on_at_every_batch(self) -> None:
        assert_resumes_everywhere(Augmented)

    def test_at_once_in_the_last_of_many(self) -> None:
        fetched = []

        class Watched(Augmented):
            def __getitem__(self, index: int) -> Tensor:
                fetched.append(index)
                return super().__getitem__(index)

        feed = Feed(Watched(1000), batch_size=10, workers=0)
        feed.take(98)
        state = feed.state_dict()
        fetched.clear()
        again = Feed(Watched(1000), batch_size=10, workers=0)
        again.load_state_dict(state)
        assert len(again.take(5)) == 2
        assert len(fetched) == 20

    def test_workers_change_nothing(self) -> None:
        feeds = [Feed(Augmented(), batch_size=4, workers=workers) for workers in (0, 2)]
        alone, helped = (flat(epochs(feed, 2)) for feed in feeds)
        assert alone == helped

    def test_it_goes_on_with_workers(self) -> None:
        expected = flat(epochs(Feed(Augmented(), batch_size=4, workers=0), 3))
        first = Feed(Augmented(), batch_size=4, workers=2)
        taken = first.take(100)
        first.next_epoch()
        taken += first.take(2)
        second = Feed(Augmented(), batch_size=4, workers=2)
        second.load_state_dict(first.state_dict())
        assert flat([taken, *epochs(second, 2)]) == expected

    def test_generators_are_left_alone(self) -> None:
        np.random.randn()  # holds one more in store
        before = rng_state()
        epochs(Feed(Augmented(), batch_size=4), 1)
        epochs(Feed(Augmented(), batch_size=4, workers=1), 1)
        after = rng_state()
        assert str(before) == str(after)
        assert torch.equal(before["torch"], after["torch"])

    def test_batches_and_epochs_have_random_numbers_of_their_own(self) -> None:
        rows = torch.cat([b for epoch in epochs(Feed(Augmented()), 2) for b in epoch])
        for column in rows[:, 1:].T:
            assert len(column.unique()) == len(rows)

    def test_another_world_goes_on_with_the_rest(self) -> None:
        data = TensorDataset(torch.arange(101))
        feeds = [Feed(data, batch_size=6, rank=rank, world_size=2) for rank in (0, 1)]
        seen = [batch[0] for feed in feeds for batch in feed.take(3)]
        state = feeds[1].state_dict()
        assert state == feeds[0].state_dict()
        later = [Feed(data, batch_size=5, rank=rank, world_size=3) for rank in range(3)]
        lengths = []
        for feed in later:
            feed.load_state_dict(state)
            seen += [batch[0] for batch in feed.take(1000)]
            lengths.append(feed.batches_done)
        assert sorted(torch.cat(seen).tolist()) == list(range(101))
        assert len(set(lengths)) == 1

    def test_length_counts_what_was_done_and_what_is_left(self) -> None:
        feed = Feed(Augmented(), batch_size=4)
        assert len(feed) == feed.length == 6
        feed.take(9)
        assert len(feed) == 6
        feed.next_epoch()
        assert len(feed) == 6
        feed.take(2)
        larger = Feed(Augmented(), batch_size=8)
        larger.load_state_dict(feed.state_dict())
        assert len(larger) == 2 + 2

    @pytest.mark.parametrize(
        "dataset",
        [
            TensorDataset(torch.randn(23, 3), torch.arange(23)),
            Subset(
                TensorDataset(torch.randn(50, 3), torch.arange(50)),
                [*range(-1, -13, -1), *range(11)],
            ),
            SyntheticDataset(23, (2, 3), 4, noise=0.1),
            TokenDataset(torch.arange(24 * 5), 5),
        ],
        ids=lambda dataset: type(dataset).__name__,
    )
    def test_reading_a_batch_at_once_gives_what_collating_gives(self, dataset: Any) -> None:
        at_once = next(iter(make_loader(dataset, 8)))
        collated = next(iter(make_loader(dataset, 8, collate_fn=torch.utils.data.default_collate)))
        assert type(at_once) is type(collated)
        for one, other in zip(at_once, collated, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)

    def test_random_numbers_of_collating_are_exact_as_well(self) -> None:
        def masked(samples: list[Tensor]) -> Tensor:
            return torch.stack(samples) * (torch.rand(4) < 0.5)

        feeds = [
            Feed(Augmented(), batch_size=4, collate_fn=masked, workers=workers)
            for workers in (0, 1)
        ]
        assert flat(epochs(feeds[0], 1)) == flat(epochs(feeds[1], 1))

    def test_a_loader_can_be_used_alone(self) -> None:
        loader = make_loader(TensorDataset(torch.arange(10)), 4, shuffle=False, drop_last=True)
        assert len(loader) == 2
        for _ in range(2):
            assert [b[0].tolist() for b in loader] == [[0, 1, 2, 3], [4, 5, 6, 7]]

    def test_states_are_small_and_plain(self) -> None:
        feed = Feed(Augmented(), batch_size=4)
        assert json.loads(json.dumps(feed.state_dict())) == feed.state_dict()
        feed.take(3)
        assert json.loads(json.dumps(feed.state_dict())) == feed.state_dict()

    def test_other_data_are_refused(self) -> None:
        feed = Feed(Augmented(), batch_size=4)
        feed.take(1)
        with pytest.raises(OptcpuError, match="size=23, but now size=24"):
            Feed(Augmented(24)).load_state_dict(feed.state_dict())
        with pytest.raises(OptcpuError, match="'sampler', but these data go on by 'replay'"):
            Feed([torch.ones(1)]).load_state_dict(feed.state_dict())


class Lists:
    """An iterable of no known length that shuffles by a generator of its own."""

    def __init__(self) -> None:
        self.order = np.random.default_rng(3)

    def __iter__(self) -> Iterator[Tensor]:
        for index in self.order.permutation(9):
            yield torch.tensor([index, random.random()])


class TestOtherData:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: DataLoader(Augmented(), 4, shuffle=True),
            lambda: DataLoader(Augmented(), 4, shuffle=True, generator=torch.Generator()),
            lambda: DataLoader(
                Augmented(), 4, sampler=RandomSampler(Augmented(), generator=torch.Generator())
            ),
            lambda: DataLoader(Augmented(), 4, sampler=DistributedSampler(Augmented(), 1, 0)),
            Lists,
        ],
        ids=["shuffle", "generator", "sampler", "distributed", "iterable"],
    )
    def test_they_go_on_at_every_batch(self, make: Callable[[], Any]) -> None:
        assert_resumes_everywhere(make)

    def test_they_go_on_with_workers(self) -> None:
        def make() -> DataLoader[Tensor]:
            return DataLoader(Augmented(9), 4, shuffle=True, num_workers=2)

        assert_resumes_everywhere(make, model_draws=False)

    def test_a_list_of_batches(self) -> None:
        feed = Feed([torch.ones(2), torch.zeros(2)])
        assert len(feed) == 2
        assert [len(epoch) for epoch in epochs(feed, 3)] == [2, 2, 2]

    def test_their_own_state_is_preferred(self) -> None:
        class Stateful:
            def __init__(self) -> None:
                self.at = self.loads = 0

            def __iter__(self) -> Iterator[int]:
                while self.at < 5:
                    self.at += 1
                    yield self.at
                self.at = 0

            def state_dict(self) -> dict[str, int]:
                return {"at": self.at}

            def load_state_dict(self, state: dict[str, int]) -> None:
                self.at, self.loads = state["at"], self.loads + 1

        feed = Feed(Stateful())
        assert feed.take(3) == [1, 2, 3]
        loader = Stateful()
        again = Feed(loader)
        again.load_state_dict(feed.state_dict())
        assert epochs(again, 2) == [[4, 5], [1, 2, 3, 4, 5]]
        assert loader.loads == 1

    def test_the_epoch_is_told_to_samplers(self) -> None:
        sampler = DistributedSampler(Augmented(), 1, 0)
        first, second = epochs(Feed(DataLoader(Augmented(), 23, sampler=sampler)), 2)
        assert sampler.epoch == 1
        assert first[0][:, 0].tolist() != second[0][:, 0].tolist()

    def test_persistent_workers_are_warned_of(self) -> None:
        def make() -> Feed:
            return Feed(DataLoader(Augmented(8), 4, num_workers=1, persistent_workers=True))

        feed = make()
        epochs(feed, 1)
        feed.take(1)
        with pytest.warns(UserWarning, match="persistent_workers=True"):
            make().load_state_dict(feed.state_dict())

    def test_data_that_became_shorter_are_told(self) -> None:
        feed = Feed([torch.ones(1)] * 5)
        feed.take(4)
        with pytest.raises(
            OptcpuError, match=r"batches in an epoch=5, but now .*=3: which samples"
        ):
            Feed([torch.ones(1)] * 3).load_state_dict(feed.state_dict())

    def test_a_stream_that_became_shorter_is_told(self) -> None:
        class Batches:
            def __init__(self, count: int) -> None:
                self._count = count

            def __iter__(self) -> Iterator[Tensor]:
                return iter([torch.ones(1)] * self._count)

        feed = Feed(Batches(5))
        feed.take(4)
        with pytest.raises(OptcpuError, match=r"behind batch 4 of epoch 0, .* end after 3"):
            Feed(Batches(3)).load_state_dict(feed.state_dict())

    def test_what_can_be_gone_through_once_has_one_epoch(self) -> None:
        feed = Feed(iter([torch.ones(1)] * 3))
        assert len(feed.take(9)) == 3
        assert feed.take(1) == []
        assert feed.length is None
        feed.next_epoch()
        with pytest.raises(OptcpuError, match="could be gone through only once"):
            feed.take(1)

    def test_an_iterable_dataset_is_batched(self) -> None:
        feed = Feed(Stream(), batch_size=4)
        assert flat(epochs(feed, 1)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        with pytest.raises(TypeError, match="not known"):
            len(feed)

    def test_samples_of_another_library_are_a_dataset(self) -> None:
        class Table:
            """As the datasets library has them: no ``Dataset`` of PyTorch, and iterable."""

            def __len__(self) -> int:
                return 10

            def __getitem__(self, index: int) -> int:
                return index

            def __iter__(self) -> Iterator[int]:
                return iter(range(10))

        feed = Feed(Table(), batch_size=4, shuffle=False)
        assert flat(epochs(feed, 1)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]

    def test_processes_that_share_the_data_to_validate_on_are_warned_of(self) -> None:
        loader = DataLoader(Augmented(), 4, sampler=DistributedSampler(Augmented(), 2, 0))
        with pytest.warns(
            UserWarning, match="only the first process's part of the validation data"
        ):
            evaluation_batches(loader, 4, world_size=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            evaluation_batches(loader, 4)
            evaluation_batches(DataLoader(Augmented(), 4), 4, world_size=2)


class TestFailures:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_an_error_names_its_place_and_cause(self, workers: int) -> None:
        feed = Feed(Failing(KeyError("label")), batch_size=3, shuffle=False, workers=workers)
        with pytest.raises(
            OptcpuError,
            match=r"failed at batch 2 of epoch 0 \(counted from 0\): KeyError: 'label'$",
        ) as caught:
            feed.take(4)
        assert isinstance(caught.value.__cause__, KeyError)

    @pytest.mark.parametrize("foreign", [False, True])
    def test_nothing_is_lost(self, foreign: bool) -> None:
        dataset = Failing(OSError(5, "Input/output error"))
        data: Any = DataLoader(dataset, 3) if foreign else dataset
        feed = Feed(data, batch_size=3, shuffle=False, workers=0)
        first = feed.take(1)
        before = feed.state_dict()
        for _ in range(2):
            with pytest.raises(OptcpuError, match="at batch 2 of epoch 0"):
                feed.take(3)
            assert feed.state_dict() == before
        dataset.broken = False
        assert flat([first, feed.take(9)]) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]

    def test_stop_iteration_in_a_dataset_does_not_end_the_epoch(self) -> None:
        with pytest.raises(OptcpuError, match="the dataset raised StopIteration"):
            Feed(Failing(StopIteration()), batch_size=3).take(9)

    def test_a_worker_that_dies(self, tmp_path: Path) -> None:
        # In a process of its own: PyTorch raises the news wherever the main thread is just then.
        script = tmp_path / "script.py"
        script.write_text(
            "import os, signal\n"
            "from torch.utils.data import Dataset\n"
            "from optcpu.errors import OptcpuError\n"
            "from optcpu.runtime.data.loading import Feed\n"
            "class Deadly(Dataset):\n"
            "    def __len__(self):\n"
            "        return 12\n"
            "    def __getitem__(self, index):\n"
            "        if index == 7:\n"
            "            os.kill(os.getpid(), signal.SIGKILL)\n"
            "        return index\n"
            "feed = Feed(Deadly(), batch_size=3, shuffle=False, workers=1)\n"
            "try:\n"
            "    feed.take(9)\n"
            "except OptcpuError as error:\n"
            "    print(error, flush=True)\n"
            "    os._exit(0)\n"
        )
        ended = subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, timeout=120
        )
        assert re.search(r"failed at batch \d of epoch 0 .*(killed|exited)", ended.stdout), ended

    def test_a_second_error_while_the_first_is_handled(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        feed = Feed(Failing(ValueError("broken"), at=4), batch_size=3, shuffle=False)
        go_to, interrupted = feed._go_to, []

        def interrupted_once(epoch: int, batches_done: int) -> None:
            if not interrupted:
                interrupted.append(True)
                raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
            go_to(epoch, batches_done)

        monkeypatch.setattr(feed, "_go_to", interrupted_once)
        with pytest.raises(OptcpuError, match=r"failed at batch 1 of epoch 0 .*broken"):
            feed.take(9)
        assert feed.batches_done == 0
        assert interrupted

    def test_a_length_that_is_no_integer_is_told(self) -> None:
        class Halved(list[Any]):
            def __len__(self) -> int:
                return super().__len__() / 2  # type: ignore[return-value]

        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            Feed(Halved([torch.zeros(2)]))

    @pytest.mark.parametrize("wrong", [lambda: 7 / 2, lambda: len(None)], ids=["float", "none"])  # type: ignore
    def test_an_error_in_the_length_within_a_loader_is_told(self, wrong: Any) -> None:
        class Wrong(Failing):
            def __len__(self) -> int:
                return wrong()  # type: ignore[no-any-return]

        with pytest.raises((TypeError, OptcpuError), match=r"as an integer|has no len"):
            Feed(DataLoader(Wrong(ValueError()), batch_size=2)).take(1)

    def test_an_error_in_the_length_of_a_dataset_is_told_as_it_is(self) -> None:
        class Unread(Failing):
            files: Any = None

            def __len__(self) -> int:
                return len(self.files)

        with pytest.raises(TypeError, match="'NoneType' has no len"):
            make_loader(Unread(ValueError()), 4)

    def test_measuring_fails_in_training_only(self) -> None:
        feed = Feed(Failing(ValueError("broken"), at=0), batch_size=12)
        with pytest.raises(OptcpuError, match="broken"):
            feed.take(1)

    @pytest.mark.parametrize(
        "data", [[], TensorDataset(torch.empty(0)), DataLoader([])], ids=["list", "set", "loader"]
    )
    def test_no_data(self, data: Any) -> None:
        with pytest.raises(ValueError, match="the training data are empty"):
            Feed(data)
        with pytest.raises(ValueError, match="empty"):
            evaluation_batches(data, 4)

    def test_no_batch_though_the_length_was_unknown(self) -> None:
        with pytest.raises(OptcpuError, match="the training data are empty"):
            Feed(map(str, [])).take(1)

    @pytest.mark.parametrize(
        "data",
        [torch.ones(3), (torch.ones(3), torch.ones(3)), "digits", {"a": 1}, 7, None],
        ids=lambda data: type(data).__name__,
    )
    def test_no_stream_of_batches(self, data: Any) -> None:
        with pytest.raises(TypeError, match=r"stream of batches|must be a dataset"):
            Feed(data)

    @pytest.mark.parametrize(
        ("workers", "error"), [(-1, ValueError), (1.5, TypeError), ("two", TypeError)]
    )
    def test_workers(self, workers: Any, error: type[Exception]) -> None:
        with pytest.raises(error, match="workers must be"):
            Feed(Augmented(), workers=workers)
