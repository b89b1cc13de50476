"""How many processes fetch batches, and that training does not wait where more would help."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from optcpu.runtime.data import workers
from optcpu.runtime.data.loaders import make_loader
from optcpu.runtime.data.loading import Feed
from optcpu.runtime.data.workers import FetchTime, choose_workers, fetch_time
from tests.optcpu.runtime.data.samples import Augmented


class Slow(Augmented):
    """Each sample waits, as for a disk, and takes no processor."""

    def __getitem__(self, index: int) -> Tensor:
        time.sleep(0.01)
        return super().__getitem__(index)


class TestWorkers:
    @pytest.mark.parametrize(
        ("computing", "waiting", "cores", "threads", "step", "workers"),
        [
            (0.1, 0, 2, 2, None, 0),
            (25, 0, 2, 2, None, 0),
            (50, 0, 2, 2, 500, 2),
            (1000, 0, 2, 2, None, 2),
            (100, 0, 64, 64, None, 5),
            (1, 4, 2, 2, None, 0),
            (1, 10, 2, 2, None, 1),
            (1, 40, 2, 2, None, 3),
            (5, 30, 2, 2, 6, 6),
            (5, 300, 2, 2, 6, 8),
            (0, 1000, 64, 64, 6, 64),
            (30, 6, 2, 2, 6, 2),
            (1000, 0, 1, 1, None, 0),
            (0, 1000, 1, 1, None, 8),
            (3, 1, 8, 4, None, 0),
            (3, 3, 8, 4, None, 1),
            (1000, 0, 8, 4, None, 4),
            (1000, 0, 8, 4, 500, 2),
            (50, 0, 8, 4, 500, 1),
        ],
    )
    def test_how_many(
        self,
        computing: float,
        waiting: float,
        cores: int,
        threads: int,
        step: float | None,
        workers: int,
    ) -> None:
        fetching = FetchTime(computing / 1e3, waiting / 1e3)
        seconds = None if step is None else step / 1e3
        chosen = choose_workers(fetching, cores=cores, threads=threads, step_seconds=seconds)
        assert chosen == workers

    def test_waiting_is_told_from_computing(self) -> None:
        loader = make_loader(Slow(), 11, workers=0)
        fetching = fetch_time(loader.dataset, loader.batch_sampler)
        assert fetching.waiting >= 0.1 > fetching.computing

    def test_the_queue_for_a_busy_core_is_no_waiting(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        told = tmp_path / "schedstat"

        class Queued(Augmented):
            """Each sample is told to have stood in the queue for as long as it took."""

            queued = 0

            def __getitem__(self, index: int) -> Tensor:
                time.sleep(0.01)
                Queued.queued += 10**7
                told.write_text(f"0 {Queued.queued} 0")
                return super().__getitem__(index)

        loader = make_loader(Queued(), 4, workers=0)
        told.write_text("0 0 0")
        monkeypatch.setattr(workers, "_SCHEDULED", told)
        assert fetch_time(loader.dataset, loader.batch_sampler).waiting < 0.02
        monkeypatch.setattr(workers, "_SCHEDULED", tmp_path / "missing")
        assert fetch_time(loader.dataset, loader.batch_sampler).waiting > 0.03

    def test_what_training_fetches_next_is_measured_or_the_beginning_behind_the_last(self) -> None:
        fetched: list[int] = []

        class Noted(Augmented):
            def __getitem__(self, index: int) -> Tensor:
                fetched.append(index)
                return super().__getitem__(index)

        loader = make_loader(Noted(12), 4, workers=0, shuffle=False)
        for consumed, expected in ((0, [0, 4, 8]), (4, [4, 8]), (12, [0, 4, 8])):
            loader.batch_sampler.consumed = consumed
            fetched.clear()
            assert sum(fetch_time(loader.dataset, loader.batch_sampler)) > 0
            assert fetched[::4] == expected
            assert loader.batch_sampler.consumed == consumed

    def test_cheap_data_take_none(self) -> None:
        assert make_loader(TensorDataset(torch.randn(100, 4)), 10).num_workers == 0

    def test_measuring_uses_no_sample_up(self) -> None:
        loader = make_loader(Augmented(), 4)
        assert sorted(torch.cat(list(loader))[:, 0].tolist()) == list(range(23))

    def test_they_compute_with_one_thread(self) -> None:
        class Threads(Augmented):
            def __getitem__(self, index: int) -> Tensor:
                return torch.tensor(torch.get_num_threads())

        (batch,) = Feed(Threads(4), workers=1).take(1)
        assert batch.tolist() == [1] * 4


class TestAddingWorkers:
    """What is chosen for steps of the usual length may not suffice for those that turn out."""

    def test_the_rest_of_the_run_is_what_it_would_have_been(self) -> None:
        plain, feed = Feed(Slow(23), batch_size=2, workers=0), Feed(Slow(23), batch_size=2)
        for _ in range(2):
            for count in (3, 9):
                expected = torch.cat(plain.take(count))
                assert torch.equal(torch.cat(feed.take(count)), expected)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    feed.add_workers(1e-3)
            plain.next_epoch(), feed.next_epoch()
        assert workers_of(feed) == 8
        feed.end_workers()

    def test_there_is_more_of_them_and_never_fewer(self) -> None:
        feed = Feed(Slow(23), batch_size=2)
        assert workers_of(feed) == 2  # 20 ms a batch, and a little
        feed.add_workers(6e-3)
        assert workers_of(feed) == 4
        feed.add_workers(1.0)
        assert workers_of(feed) == 4
        feed.end_workers()

    def test_a_number_that_was_given_stays(self) -> None:
        feed = Feed(Slow(23), batch_size=2, workers=1)
        feed.take(2)
        feed.add_workers(1e-3)
        assert workers_of(feed) == 1
        feed.end_workers()

    def test_other_data_stay_as_they_are(self) -> None:
        feed = Feed([torch.ones(2), torch.ones(3)])
        feed.take(1)
        feed.add_workers(1e-3)
        assert [len(batch) for batch in feed.take(2)] == [3]

    def test_a_state_from_before_is_gone_on_with_behind_it(self) -> None:
        feed = Feed(Slow(23), batch_size=2)
        feed.take(2)
        state = feed.state_dict()
        expected = torch.cat(feed.take(4))
        feed.add_workers(1e-3)
        feed.load_state_dict(state)
        assert torch.equal(torch.cat(feed.take(4)), expected)
        feed.end_workers()


def workers_of(feed: Feed) -> int:
    return feed._source.loader.num_workers  # type: ignore[attr-defined]
