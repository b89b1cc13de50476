from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from optcpu.runtime.checkpoint.rng import rng_state, set_rng_state
from optcpu.runtime.checkpoint.state import Decoder, Encoder


def draws() -> list[Any]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        np.random.randn(),
        torch.rand(3).tolist(),
        torch.randn(1).item(),
        torch.randperm(20).tolist(),
    ]


def test_the_generators_go_on_from_where_they_stood() -> None:
    draws()  # a number of gauss() and randn() is left in store, which belongs to the state
    encoder = Encoder()
    text = json.dumps(encoder.encode(rng_state()))
    tensors = {name: tensor.clone() for name, tensor in encoder.tensors.items()}
    first = draws()
    assert draws() != first
    set_rng_state(Decoder(tensors).decode(json.loads(text)))
    assert draws() == first


@pytest.mark.parametrize("part", ["python", "numpy", "torch"])
@pytest.mark.parametrize("wrong", [None, (), {}, torch.zeros(3, dtype=torch.uint8)])
def test_another_state_is_refused_and_changes_nothing(part: str, wrong: Any) -> None:
    before = rng_state()
    draws()
    state = rng_state()
    first = draws()
    set_rng_state(state)
    with pytest.raises(
        ValueError, match=r"^this is no state of the random generators \(.+\); it must"
    ):
        set_rng_state({**before, part: wrong})
    assert draws() == first


def test_a_state_must_be_complete() -> None:
    with pytest.raises(ValueError, match="KeyError: 'torch'"):
        set_rng_state({key: part for key, part in rng_state().items() if key != "torch"})


@pytest.mark.parametrize("between", [0, 1, 2, 3])
def test_each_state_of_numpy_is_the_one_at_that_time(between: int) -> None:
    """With and without draws between two states, of which every other leaves a number in store."""
    np.random.seed(0)
    states, then = [], []
    for _ in range(4):
        states.append(rng_state())
        then.append(np.random.get_state()[2:])
        for _ in range(between):
            np.random.randn()
    for state, expected in [*zip(states, then, strict=True)] * 2:
        set_rng_state(state)
        assert np.random.get_state()[2:] == expected
        assert rng_state()["numpy"]["has_gauss"] == expected[1]


@pytest.mark.parametrize("between", [0, 1, 2, 3])
def test_each_state_of_python_is_the_one_at_that_time(between: int) -> None:
    """With and without draws between two states, of which every other leaves a number in store."""
    random.seed(0)
    states, then = [], []
    for _ in range(4):
        states.append(rng_state()["python"])
        then.append(random.getstate())
        for _ in range(between):
            random.gauss(0, 1)
    assert states == then


@pytest.mark.parametrize("draws_between", [1, 623, 624, 625, 1248])
def test_a_generator_that_has_come_round_is_seen(draws_between: int) -> None:
    """After 624 draws of a word the position is the same again."""
    random.seed(0)
    np.random.seed(0)
    rng_state()
    for _ in range(draws_between):
        random.getrandbits(32)
    np.random.randint(0, 1 << 32, size=draws_between, dtype=np.uint32)
    state = rng_state()
    assert state["python"] == random.getstate()
    assert np.array_equal(state["numpy"]["state"]["key"], np.random.get_state()[1])
    assert state["numpy"]["state"]["pos"] == np.random.get_state()[2]


def test_another_seed_is_seen() -> None:
    for seed in (1, 2, 2**31, 2**32 - 1):
        random.seed(seed)
        np.random.seed(seed)
        state = rng_state()
        assert state["python"] == random.getstate()
        assert np.array_equal(state["numpy"]["state"]["key"], np.random.get_state()[1])


def test_a_number_in_store_of_python_is_seen_beside_the_same_words() -> None:
    random.seed(0)
    version, words, _ = rng_state()["python"]
    random.setstate((version, words, 0.5))
    assert rng_state()["python"][2] == 0.5
    random.seed(0)


def test_another_generator_of_numpy() -> None:
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        state = rng_state()
        first = np.random.rand(3).tolist()
        assert rng_state()["numpy"]["state"] != state["numpy"]["state"]
        np.random.rand()
        set_rng_state(state)
        assert np.random.rand(3).tolist() == first
    finally:
        np.random.set_bit_generator(before)
