"""Numbers come back from how they are stored: all bits, or right on average."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optcpu.optim.formats import Format, Stored, mixed, round_stochastically, split
from passes.halves import joined

ALL_BITS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64)


def from_bits(bits: list[int]) -> torch.Tensor:
    return torch.frombuffer(bytearray(struct.pack(f"<{len(bits)}I", *bits)), dtype=torch.float32)


@settings(max_examples=300)
@given(bits=ALL_BITS)
def test_split_numbers_come_back_with_every_bit(bits: list[int]) -> None:
    numbers = from_bits(bits)  # infinities, NaN of any payload, denormals and both zeros among them
    high, low = split(numbers)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    back, is_number = joined(high, low), ~numbers.isnan()
    assert torch.equal(back[is_number].view(torch.int32), numbers[is_number].view(torch.int32))
    assert back[~is_number].isnan().all()


@settings(max_examples=200)
@given(bits=ALL_BITS)
def test_the_upper_half_is_what_a_cast_gives_but_for_ties(bits: list[int]) -> None:
    numbers = from_bits(bits)
    high, low = split(numbers)
    settled = (low != -(2**15)) & numbers.isfinite()
    assert torch.equal(high[settled], numbers.bfloat16()[settled])


def test_a_tie_goes_up() -> None:
    numbers = from_bits([0x3F808000, 0xBF808000, 0x3F818000])
    high, low = split(numbers)
    assert high.view(torch.int16).tolist() == [0x3F81, 0xBF81 - 2**16, 0x3F82]
    assert low.tolist() == [-(2**15)] * 3


def test_strides_are_kept() -> None:
    numbers = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    high, low = split(numbers)
    assert high.stride() == low.stride() == numbers.stride()


def test_stochastic_rounding_is_right_on_average_and_goes_to_a_neighbour() -> None:
    number = 1 + 0.3 / 128  # three tenths of the way between two BF16 numbers
    rounded = round_stochastically(torch.full((200_000,), number), seed=7).float()
    assert set(rounded.tolist()) == {1.0, 1 + 1 / 128}
    # The mean of n draws has a standard deviation of sqrt(0.3 * 0.7 / n) / 128.
    assert abs(rounded.mean().item() - number) < 4 * (0.21 / 200_000) ** 0.5 / 128


def test_stochastic_rounding_keeps_what_bf16_can_hold() -> None:
    numbers = torch.tensor([0.0, -0.0, 1.5, -2.0, float("inf"), -float("inf")])
    for seed in range(20):
        assert torch.equal(round_stochastically(numbers, seed).float(), numbers)
    assert round_stochastically(torch.tensor([float("nan")]), 3).isnan().all()


def test_random_bits_depend_on_seed_and_place() -> None:
    numbers = torch.full((4096,), 1 + 0.5 / 128)
    first, second = (round_stochastically(numbers, seed) for seed in (1, 2))
    assert torch.equal(first, round_stochastically(numbers, 1))
    differing = (first != second).float().mean().item()
    assert 0.45 < differing < 0.55


@pytest.mark.parametrize("format", list(Format))
def test_what_is_written_is_read(format: Format) -> None:
    numbers = torch.randn(6, 4).bfloat16().float()
    if format == Format.FLOAT:
        stored = Stored(format, torch.empty(6, 4))
    else:
        low = torch.empty(6, 4, dtype=torch.int16) if format == Format.SPLIT else None
        stored = Stored(format, torch.empty(6, 4, dtype=torch.bfloat16), low, seed=5)
    stored.write(numbers)
    assert torch.equal(stored.read(), numbers)


def test_seeds_depend_on_every_number() -> None:
    seeds = {mixed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, 0x7F800001, 0x7FC00000])
def test_what_is_no_number_stays_so(bits: int) -> None:
    numbers = torch.full((6,), bits, dtype=torch.int32).view(torch.float32)
    high, low = split(numbers)
    for rounded in (high, joined(high, low), round_stochastically(numbers, seed=3)):
        assert rounded.isnan().all()
