"""Every sample once in each epoch, however often and in whatever split the run is gone on with."""

from __future__ import annotations

import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optcpu.errors import OptcpuError
from optcpu.runtime.data.sampling import Batch, Permutation, ResumableBatchSampler, permuted


def samplers(size: int, batch_size: int, world_size: int, **options: Any) -> list[Any]:
    return [
        ResumableBatchSampler(size, batch_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


def steps(ranks: list[ResumableBatchSampler]) -> list[list[list[int]]]:
    """Of each step, the batch of each rank."""
    return [list(step) for step in zip(*ranks, strict=True)]


class TestBatches:
    @given(
        size=st.integers(1, 200),
        batch_size=st.integers(1, 20),
        world_size=st.integers(1, 5),
        shuffle=st.booleans(),
    )
    def test_an_epoch_has_each_sample_once_and_no_rank_goes_without(
        self, size: int, batch_size: int, world_size: int, shuffle: bool
    ) -> None:
        world_size = min(world_size, size)
        ranks = samplers(size, batch_size, world_size, shuffle=shuffle)
        made = steps(ranks)
        assert len(made) == len(ranks[0])
        assert sorted(i for step in made for batch in step for i in batch) == list(range(size))
        sizes = [[len(batch) for batch in step] for step in made]
        assert all(min(step) > 0 and max(step) - min(step) <= 1 for step in sizes)
        assert all(step == [batch_size] * world_size for step in sizes[:-1])

    @given(size=st.integers(1, 200), batch_size=st.integers(1, 20), world_size=st.integers(1, 4))
    def test_drop_last_gives_full_steps_only(
        self, size: int, batch_size: int, world_size: int
    ) -> None:
        size += batch_size * world_size
        made = steps(samplers(size, batch_size, world_size, drop_last=True))
        assert len(made) == size // (batch_size * world_size)
        assert {len(batch) for step in made for batch in step} == {batch_size}

    def test_ranks_take_together_what_one_rank_takes_alone(self) -> None:
        together = steps(samplers(103, 5, 2))
        alone = list(ResumableBatchSampler(103, 10))
        assert [[*first, *second] for first, second in together] == alone

    def test_epochs_and_seeds_differ_and_depend_on_nothing_else(self) -> None:
        sampler = ResumableBatchSampler(50, 50, seed=3)
        first, second = [batch for _ in range(2) for batch in sampler]
        assert sorted(first) == sorted(second) == list(range(50))
        assert first != second
        assert next(iter(ResumableBatchSampler(50, 50, seed=4))) != first
        torch.manual_seed(9)
        again = ResumableBatchSampler(50, 7, seed=3)
        again.set_epoch(1)
        assert [i for batch in again for i in batch] == second

    def test_without_shuffling_they_come_in_order(self) -> None:
        assert list(ResumableBatchSampler(5, 2, shuffle=False)) == [[0, 1], [2, 3], [4]]

    def test_the_orders_of_a_seed_never_change(self) -> None:
        """A checkpoint of today must be gone on with by later versions."""
        assert next(iter(ResumableBatchSampler(10, 10, seed=5))) == SMALL
        assert next(iter(ResumableBatchSampler(10**6, 5, seed=5))) == LARGE

    def test_global_generator_is_left_alone(self) -> None:
        before = torch.get_rng_state()
        list(ResumableBatchSampler(100, 7))
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_batch_tells_its_place_also_to_another_process(self) -> None:
        batch = list(samplers(100, 5, 2)[1])[3]
        copy = pickle.loads(pickle.dumps(batch))
        assert isinstance(copy, Batch)
        assert (copy, copy.epoch, copy.start) == (batch, 0, 35)


SMALL = [8, 0, 3, 5, 6, 1, 7, 2, 9, 4]
LARGE = [613460, 907050, 345821, 897930, 275417]


class TestResume:
    @settings(max_examples=200)
    @given(data=st.data(), size=st.integers(1, 300), shuffle=st.booleans())
    def test_any_splits_one_after_the_other_cover_the_epoch_once(
        self, data: st.DataObject, size: int, shuffle: bool
    ) -> None:
        state = ResumableBatchSampler(size, 1, shuffle=shuffle).state_dict()
        seen: list[int] = []
        while state["epoch"] == 0 and state["consumed"] < size:
            world_size = data.draw(st.integers(1, min(4, size)))
            ranks = samplers(size, data.draw(st.integers(1, 30)), world_size, shuffle=shuffle)
            for rank in ranks:
                rank.load_state_dict(state)
            iterators = [iter(rank) for rank in ranks]
            for _ in range(data.draw(st.integers(1, 4))):
                shares = [rank.share(rank.consumed) for rank in ranks]
                batches = [next(iterator, None) for iterator in iterators]
                if batches[0] is None:
                    break
                for batch, share in zip(batches, shares, strict=True):
                    assert batch is not None
                    assert len(batch) == max(share.count, 1)
                    seen += batch[: share.count]
            (state,) = {str(rank.state_dict()): rank.state_dict() for rank in ranks}.values()
        assert sorted(seen) == list(range(size))

    @pytest.mark.parametrize("done", range(12))
    def test_it_goes_on_behind_what_was_done(self, done: int) -> None:
        whole = ResumableBatchSampler(23, 4)
        expected = [batch for _ in range(2) for batch in whole]
        first = ResumableBatchSampler(23, 4)
        taken = []
        while len(taken) < done:
            for batch in first:
                taken.append(batch)
                if len(taken) == done:
                    break
        second = ResumableBatchSampler(23, 4)
        second.load_state_dict(first.state_dict())
        rest: list[list[int]] = []
        while second.epoch < 2:
            rest += second
        assert taken + rest == expected

    def test_going_on_takes_no_loop_over_what_was_done(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sampler = ResumableBatchSampler(10**12, 2)
        sampler.load_state_dict({**sampler.state_dict(), "consumed": 10**12 - 3})
        asked = []
        monkeypatch.setattr(
            sampler, "share", lambda done, share=sampler.share: asked.append(done) or share(done)
        )
        assert [len(batch) for batch in sampler] == [2, 1]
        assert asked == [10**12 - 3, 10**12 - 1]

    def test_setting_the_epoch_that_is_gone_through_does_not_start_it_again(self) -> None:
        sampler = ResumableBatchSampler(10, 2)
        sampler.load_state_dict({**sampler.state_dict(), "epoch": 3, "consumed": 4})
        sampler.set_epoch(3)
        assert len(list(sampler)) == 3
        sampler.set_epoch(3)
        assert len(list(sampler)) == 5

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"size": 11}, r"data with size=11, but now size=10.*Remedy"),
            ({"seed": 1}, "seed=1, but now seed=0"),
            ({"shuffle": False}, "shuffle=False, but now shuffle=True"),
            ({"consumed": 11}, "damaged"),
            ({"epoch": -1}, "damaged"),
            ({"epoch": "1"}, "no state of a sampler"),
            ({"size": None}, "no state of a sampler"),
        ],
    )
    def test_a_state_that_does_not_fit_is_refused(
        self, change: dict[str, Any], message: str
    ) -> None:
        sampler = ResumableBatchSampler(10, 2)
        with pytest.raises(OptcpuError, match=message):
            sampler.load_state_dict({**sampler.state_dict(), "consumed": 2, **change})

    def test_between_epochs_the_data_may_grow(self) -> None:
        sampler = ResumableBatchSampler(10, 2)
        sampler.load_state_dict(ResumableBatchSampler(8, 2, seed=5).state_dict() | {"epoch": 1})
        assert len(list(sampler)) == 5


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0, 2), "the training data are empty"),
            ((10, 0), "batch_size must be positive, got 0"),
            ((10, 2, {"world_size": 0}), "world_size must be positive"),
            ((10, 2, {"rank": 2, "world_size": 2}), r"rank must be in 0\.\.1"),
            ((10, 2, {"rank": -1}), "rank must be"),
            ((1, 2, {"world_size": 2}), "1 samples cannot be shared by 2 ranks"),
            ((10, 6, {"world_size": 2, "drop_last": True}), "drop_last leaves nothing of 10"),
        ],
    )
    def test_wrong_values(self, arguments: tuple[Any, ...], message: str) -> None:
        *positional, last = arguments
        options = last if isinstance(last, dict) else {}
        if not options:
            positional.append(last)
        with pytest.raises(ValueError, match=message):
            ResumableBatchSampler(*positional, **options)

    @pytest.mark.parametrize("size", [10.0, True, "10"])
    def test_wrong_types(self, size: Any) -> None:
        with pytest.raises(TypeError, match="size must be an integer"):
            ResumableBatchSampler(size, 2)

    def test_negative_epoch(self) -> None:
        with pytest.raises(ValueError, match="epoch must not be negative"):
            ResumableBatchSampler(10, 2).set_epoch(-1)


class TestPermutation:
    @given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
    def test_the_network_permutes_any_range(self, size: int, key: int) -> None:
        entries = permuted(np.arange(size, dtype=np.uint64), size, key)
        assert sorted(entries.tolist()) == list(range(size))

    @given(start=st.integers(0, 10**8 - 1), count=st.integers(0, 300))
    def test_pieces_are_those_of_the_whole(self, start: int, count: int) -> None:
        size = 10**8
        stop = min(start + count, size)
        piece = Permutation(size, 1, 2).take(start, stop)
        positions = np.arange(start, stop, dtype=np.uint64)
        key = Permutation(size, 1, 2)._key
        assert piece.tolist() == permuted(positions, size, key).tolist()

    @pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1, 200_003])
    def test_read_batch_by_batch_it_is_a_permutation(self, size: int) -> None:
        order = Permutation(size, 0, 0)
        batches = [order.take(i, min(i + 1000, size)) for i in range(0, size, 1000)]
        assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(size))

    @pytest.mark.parametrize("size", [50_000, 200_000])
    def test_it_looks_random(self, size: int) -> None:
        entries = Permutation(size, 0, 0).take(0, size) / size
        other = Permutation(size, 0, 1).take(0, size) / size
        positions = np.arange(size) / size
        pairs = [(entries, positions), (entries[1:], entries[:-1]), (entries, other)]
        for first, second in pairs:
            assert abs(np.corrcoef(first, second)[0, 1]) < 5 / size**0.5
        low, _ = np.histogram(entries[:1000], bins=10, range=(0, 1))
        assert ((low - 100) ** 2 / 100).sum() < 35  # chi-squared, 9 degrees of freedom: p < 1e-4

    def test_all_orders_of_a_few_are_equally_likely(self) -> None:
        orders = [tuple(Permutation(3, seed, 0).take(0, 3).tolist()) for seed in range(6000)]
        counts = np.array([orders.count(order) for order in set(orders)])
        assert len(counts) == 6
        assert ((counts - 1000) ** 2 / 1000).sum() < 30

    def test_a_hundred_million_take_no_memory(self) -> None:
        tracemalloc.start()
        iterator = iter(ResumableBatchSampler(10**8, 256))
        for _ in range(100):
            next(iterator)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10 * 2**20
