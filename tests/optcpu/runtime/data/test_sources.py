"""Loaders of the user's own whose workers live on: the order of the samples is what it would have been."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from optcpu.errors import OptcpuError
from optcpu.runtime.checkpoint.rng import rng_state, set_rng_state
from optcpu.runtime.data.loading import Feed


class Numbers(Dataset[int]):
    """Each sample is its number; one cannot be read while a file is there."""

    def __init__(self, broken: Path | None = None) -> None:
        self._broken = broken

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> int:
        if index == 7 and self._broken is not None and self._broken.exists():
            raise ValueError("broken")
        return index


class NoIterator(DataLoader[Any]):
    """A loader that keeps its workers, if any, where nobody can see them."""

    def __getattribute__(self, name: str) -> Any:
        if name == "_iterator":
            raise AttributeError(name)
        return super().__getattribute__(name)


def persistent(dataset: Numbers | None = None, **given: Any) -> DataLoader[Any]:
    settings = {"num_workers": 1, "persistent_workers": True, **given}
    return DataLoader(dataset or Numbers(), 4, shuffle=True, **settings)


def own_generator() -> DataLoader[Any]:
    return persistent(generator=torch.Generator().manual_seed(3))


def go(feed: Feed, stop: int | None = None) -> list[list[int]]:
    """The batches until there are ``stop``, or until three epochs have ended, each told by []."""
    events: list[list[int]] = []
    while feed.epoch < 3 and len(events) != stop:
        taken = feed.take(1)
        events += [batch.tolist() for batch in taken] or [[]]
        if not taken:
            feed.next_epoch()
    return events


def stopped_after(make: Callable[[], Any], stop: int) -> tuple[list[list[int]], Any, Any]:
    """The first ``stop`` batches and ends of epochs, and the states of data and generators then."""
    torch.manual_seed(5)
    feed = Feed(make())
    return go(feed, stop), copy.deepcopy(feed.state_dict()), rng_state()


def resumed(make: Callable[[], Any], state: Any, rng: Any) -> Feed:
    """A new one, as in a new process, that goes on from there."""
    torch.manual_seed(6)
    feed = Feed(make())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the loader has persistent_workers=True")
        feed.load_state_dict(state)
    set_rng_state(rng)
    return feed


@pytest.mark.parametrize("make", [persistent, own_generator])
def test_the_order_goes_on_at_every_batch(make: Callable[[], DataLoader[Any]]) -> None:
    torch.manual_seed(5)
    expected = go(Feed(make()))
    for stop in range(len(expected)):
        first, state, rng = stopped_after(make, stop)
        assert first + go(resumed(make, state, rng)) == expected, stop


def test_the_order_goes_on_after_two_stops() -> None:
    torch.manual_seed(5)
    expected = go(Feed(persistent()))
    first, state, rng = stopped_after(persistent, 4)
    feed = resumed(persistent, state, rng)
    second = go(feed, 5)
    again = resumed(persistent, copy.deepcopy(feed.state_dict()), rng_state())
    assert first + second + go(again) == expected


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_order_goes_on_after_an_error_in_the_same_process(tmp_path: Path, epoch: int) -> None:
    torch.manual_seed(5)
    expected = go(Feed(persistent()))
    torch.manual_seed(5)
    broken = tmp_path / "broken"
    feed = Feed(persistent(Numbers(broken)))
    events = go(feed, 4 * epoch)
    broken.touch()
    with pytest.raises(OptcpuError, match="ValueError: broken"):
        events.extend(iter(lambda: go(feed, 1)[0], []))
    broken.unlink()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the loader has persistent_workers=True")
        assert events + go(feed) == expected


def test_workers_that_are_begun_anew_are_warned_of_between_epochs() -> None:
    _, state, _ = stopped_after(persistent, 4)
    with pytest.warns(
        UserWarning, match=r"persistent_workers=True: .*random augmentation .* Remedy"
    ):
        Feed(persistent()).load_state_dict(state)


@pytest.mark.parametrize("given", [{"persistent_workers": False}, {"num_workers": 0}])
def test_an_epoch_of_workers_that_lived_on_needs_such_workers(given: dict[str, Any]) -> None:
    def others() -> DataLoader[Any]:
        return persistent(**{"persistent_workers": False, **given})

    _, state, _ = stopped_after(persistent, 5)
    with pytest.raises(OptcpuError, match=r"in the middle of epoch 1, .*persistent_workers=True"):
        Feed(others()).load_state_dict(state)
    first, state, rng = stopped_after(persistent, 1)  # the first epoch begins with new workers
    batches = first + go(resumed(others, state, rng), 2)
    assert sorted(number for batch in batches for number in batch) == list(range(9))


def test_a_checkpoint_of_old_is_read() -> None:
    _, state, _ = stopped_after(persistent, 5)
    del state["source"]["beginning"]["new_workers"]
    feed = Feed(persistent())
    with pytest.warns(UserWarning, match="persistent_workers=True"):
        feed.load_state_dict(state)
    assert feed.epoch == 1


def test_a_loader_that_hides_its_iterator_goes_on() -> None:
    def make() -> DataLoader[Any]:
        return NoIterator(Numbers(), 4, shuffle=True)

    torch.manual_seed(5)
    expected = go(Feed(make()))
    first, state, rng = stopped_after(make, 5)
    assert first + go(resumed(make, state, rng)) == expected
