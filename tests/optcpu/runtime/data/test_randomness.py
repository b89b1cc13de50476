"""Counters to bits, and generators that go on where they were."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optcpu.runtime.data.randomness import (
    generator_state,
    generators_in,
    is_plain,
    random_bits,
    seed_everything,
    seed_generator,
    set_generator_state,
    stream_key,
)


def test_the_bits_are_those_of_splitmix64() -> None:
    """The reference output for seed 1234567 (as in the test vectors of several implementations)."""
    bits = random_bits(1234567, np.arange(1, 4, dtype=np.uint64))
    assert bits.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.integers(), st.integers())
def test_keys_name_their_parts_in_order(first: int, second: int) -> None:
    key = stream_key(first, second)
    assert 0 <= key < 2**64
    assert key == stream_key(first, second)
    assert (key == stream_key(second, first)) == ((first - second) % 2**64 == 0)


def test_bits_are_even_and_streams_unrelated() -> None:
    counters = np.arange(20_000, dtype=np.uint64)
    bits = [random_bits(stream_key(0, number), counters) for number in range(2)]
    as_bits = [np.unpackbits(one.view(np.uint8)).reshape(-1, 64) for one in bits]
    assert abs(as_bits[0].mean(axis=0) - 0.5).max() < 0.02
    assert abs((as_bits[0] ^ as_bits[1]).mean(axis=0) - 0.5).max() < 0.02
    assert len(np.unique(bits[0])) == 20_000


def test_the_shape_of_counters_is_kept_and_they_are_not_written_to() -> None:
    counters = np.arange(6, dtype=np.uint64).reshape(2, 3)
    bits = random_bits(7, counters)
    assert bits.shape == (2, 3)
    assert counters.ravel().tolist() == list(range(6))
    assert bits[1, 2] == random_bits(7, np.array([5], dtype=np.uint64))[0]


def test_seeding_reaches_all_three_generators() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    drawn = []
    for seed in (2**64 - 1, 2**63, 2**64 - 1):
        seed_everything(seed)
        drawn.append(draw())
    assert drawn[0] == drawn[2]
    assert all(a != b for a, b in zip(drawn[0], drawn[1], strict=True))


@pytest.mark.parametrize(
    ("generator", "draw"),
    [
        (torch.Generator(), lambda g: torch.rand(3, generator=g).tolist()),
        (np.random.default_rng(1), lambda g: g.random(3).tolist()),
        (np.random.Generator(np.random.MT19937(1)), lambda g: g.random(3).tolist()),
        (np.random.RandomState(1), lambda g: g.standard_normal(3).tolist()),
        (random.Random(1), lambda g: [g.gauss(0, 1) for _ in range(3)]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_generator_goes_on_from_its_state(generator: Any, draw: Any) -> None:
    draw(generator)
    state = generator_state(generator)
    expected = draw(generator)
    set_generator_state(generator, state)
    assert draw(generator) == expected


def test_other_things_have_no_state() -> None:
    assert generator_state(7) is None


GENERATORS: list[Any] = [
    np.random.default_rng(0),
    np.random.Generator(np.random.Philox(0)),
    np.random.RandomState(0),
    random.Random(0),
    torch.Generator(),
]


@pytest.mark.parametrize("generator", GENERATORS, ids=lambda one: type(one).__name__)
def test_a_seed_decides_what_comes(generator: Any) -> None:
    def draw() -> float:
        if isinstance(generator, torch.Generator):
            return float(torch.rand((), generator=generator))
        return float(generator.random() if hasattr(generator, "random") else generator.rand())

    drawn = []
    for seed in (2**64 - 1, 5, 2**64 - 1):
        seed_generator(generator, seed)
        drawn.append((draw(), draw()))
    assert drawn[0] == drawn[2] != drawn[1]


class _Part:
    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


def test_generators_are_found_where_they_are() -> None:
    first, second, third = random.Random(), torch.Generator(), np.random.default_rng()
    transform = functools.partial(max, 1, key=_Part(generator=second))
    dataset = _Part(
        rng=first, transforms=[None, transform], again=first, inner=_Part(rng={"a": third})
    )
    dataset.inner.outer = dataset  # type: ignore[attr-defined]
    found = generators_in({"dataset": dataset})
    assert found == {
        "dataset.rng": first,
        "dataset.inner.rng.a": third,
        "dataset.transforms.1.key.generator": second,
    }


def test_generators_of_functions_are_found() -> None:
    class Collator:
        def __init__(self) -> None:
            self.rng = random.Random()

        def collate(self, samples: list[Any]) -> list[Any]:
            return self.rng.sample(samples, 2)

    enclosed, collator = np.random.default_rng(), Collator()

    def collate(samples: list[Any]) -> Any:
        return enclosed.permutation(samples)

    owners = {"method": collator.collate, "function": functools.partial(collate)}
    assert generators_in(owners) == {
        "method.self.rng": collator.rng,
        "function.func.enclosed": enclosed,
    }


def test_samples_are_not_searched() -> None:
    samples = [_Part(rng=random.Random()) for _ in range(100)]
    dataset = _Part(samples=samples, x=torch.ones(3), names=random.SystemRandom())
    assert generators_in({"dataset": dataset}) == {}


class _Odd:
    """Answers for every name, in its own way."""

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise ValueError("not now")


class _Loading(dict[str, Any]):
    def items(self) -> Any:
        raise OSError("the file is gone")


def test_what_cannot_be_looked_into_is_passed_over() -> None:
    generator = random.Random(1)
    around: list[Any] = [_Odd(), _Loading(a=1), {"deep": [_Odd(), generator]}]
    around.append(around)  # it contains itself
    assert list(generators_in({"model": around}).values()) == [generator]


def test_numbers_are_plain_and_do_not_count_as_places_to_look_at() -> None:
    generator = random.Random(1)
    numbers = {str(n): [(n, 1.5, None, "x") for _ in range(40)] for n in range(40)}
    assert list(generators_in({"a": numbers, "b": [generator]}).values()) == [generator]
    assert all(map(is_plain, (1, "x", None, (1, 2.0), {}, [torch.ones(1)])))
    assert not any(map(is_plain, (generator, [generator], {1: 2}, [[1]], list(range(100)))))
