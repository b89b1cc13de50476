"""The kernel computes what the rules say, for every combination of number formats."""

from __future__ import annotations

import copy
import ctypes
import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from optcpu.optim import native, rules
from optcpu.optim.formats import Format, Stored, mixed, split
from optcpu.optim.rules import Constants, Slot
from passes.halves import joined

SIZES = (1, 2, 63, 127, 128, 129, 300, 5001)
FLOAT, SPLIT, STOCHASTIC, NEAREST = Format
RULES: dict[str, Callable[[Slot], None]] = {
    "adam": rules.adam,
    "sgd": rules.sgd,
    "lamb": rules.lamb,
}


@pytest.fixture(scope="module", params=["for this processor", "without AVX512"])
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    """The kernel as it is built here, and as it is on processors with shorter vectors."""
    found = native.library_or_none()
    if request.param == "without AVX512" and found is not None:
        folder = tmp_path_factory.mktemp("portable")
        compiler = folder / "compiler"
        compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" -mno-avx512f\n')
        compiler.chmod(0o755)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("CXX", str(compiler))
            environment.setenv("XDG_CACHE_HOME", str(folder))
            found = native.library_or_none.__wrapped__()
    if found is None:
        pytest.skip("needs a C++ compiler for x86-64")
    return found


@pytest.fixture(autouse=True)
def use_library(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library_or_none", lambda: library)


def stored(numbers: Tensor, format: Format, seed: int) -> Stored:
    if format == FLOAT:
        return Stored(format, numbers.clone())
    if format == SPLIT:
        return Stored(format, *split(numbers))
    return Stored(format, numbers.bfloat16(), None, seed)


def slots(weight: Format, moments: bool, slow: Format | None, gradient: Format) -> list[Slot]:
    """One for each size, every other one with other constants; ``moments``: whether in BF16."""
    generator = torch.Generator().manual_seed(0)
    kinds = [
        Constants(
            gradient_scale=-0.5,
            shrink=0.9,
            update_decay=0.1,
            coupled_decay=decay,
            beta1=0.9,
            beta2=0.99,
            rest1=0.1,
            rest2=0.01,
            epsilon=1e-3,
            lr=0.1,
            step_size=0.2,
            root_scale=1.5,
            ratio_limit=limit,
            slow_step=0.3,
            nesterov=nesterov,
        )
        for decay, limit, nesterov in (
            (0.0, 0.7, True),
            (0.2, math.inf, False),
            (0.1, -1.0, True),
        )
    ]
    result = []
    for number, size in enumerate(SIZES):
        draws = [torch.randn(size, generator=generator) for _ in range(6)]
        seeds = [mixed(number, i) for i in range(6)]
        first, second = (NEAREST, STOCHASTIC) if moments else (FLOAT, FLOAT)
        result.append(
            Slot(
                kinds[number % len(kinds)],
                stored(draws[0], weight, seeds[0]),
                stored(draws[1], gradient, seeds[1]),
                stored(draws[2], first, seeds[2]),
                stored(draws[3].square(), second, seeds[3]),
                stored(draws[4].square(), first, seeds[4]) if number % 2 else None,
                None if slow is None else stored(draws[5], slow, seeds[5]),
            )
        )
    return result


def assert_same(ours: Stored | None, theirs: Stored | None) -> None:
    """All but equal; where FP32 differs in its last bit, BF16 may now and then be the next number."""
    if ours is None or theirs is None:
        assert ours is theirs
        return
    one, other = ours.read(), theirs.read()
    if ours.format in (FLOAT, SPLIT):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-6)
        assert (one != other).float().mean() <= 0.03


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weight", [FLOAT, SPLIT, STOCHASTIC])
@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("slow", [None, FLOAT, STOCHASTIC])
@pytest.mark.parametrize("gradient", [FLOAT, NEAREST])
def test_every_format(
    rule: str, weight: Format, moments: bool, slow: Format | None, gradient: Format
) -> None:
    ours = slots(weight, moments, slow, gradient)
    theirs = copy.deepcopy(ours)
    getattr(native, rule)(ours)
    for slot in theirs:
        RULES[rule](slot)
    for one, other in zip(ours, theirs, strict=True):
        for name in ("weight", "first", "second", "maximum", "slow"):
            if name == "second" and rule == "sgd":
                continue
            assert_same(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weight", [FLOAT, SPLIT, STOCHASTIC])
@pytest.mark.parametrize("size", [1, 31, 33, 95, 129, 513, 545])
def test_what_lies_behind_a_tensor_is_untouched(rule: str, weight: Format, size: int) -> None:
    def within_more(numbers: Tensor) -> Tensor:
        return torch.cat([numbers, torch.full((200,), 7, dtype=numbers.dtype)])[:size]

    first, second = (FLOAT, FLOAT) if weight == FLOAT else (NEAREST, STOCHASTIC)
    slot = Slot(
        Constants(lr=0.1, step_size=0.1, epsilon=1e-8, shrink=0.5, ratio_limit=1.0),
        stored(torch.randn(size), weight, 1),
        stored(torch.randn(size), FLOAT if weight == FLOAT else NEAREST, 2),
        stored(torch.randn(size), first, 3),
        stored(torch.rand(size), second, 4),
    )
    tensors = []
    for part in (slot.weight, slot.gradient, slot.first, slot.second):
        assert part is not None
        part.data = within_more(part.data)
        tensors.append(part.data)
        if part.low is not None:
            part.low = within_more(part.low)
            tensors.append(part.low)
    getattr(native, rule)([slot])
    for tensor in tensors:
        behind = tensor.as_strided((200,), (1,), size)
        assert torch.equal(behind, torch.full_like(behind, 7))


def test_ties_go_to_even() -> None:
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF], dtype=torch.int32)
    gradient = bits.view(torch.float32)
    momentum = Stored(NEAREST, torch.zeros(4, dtype=torch.bfloat16))
    # With no momentum from before, it is the gradient, rounded.
    slot = Slot(Constants(), Stored(FLOAT, torch.zeros(4)), Stored(FLOAT, gradient), momentum)
    native.sgd([slot])
    assert torch.equal(momentum.data, gradient.bfloat16())


@pytest.mark.parametrize("rule", ["adam", "lamb"])
@pytest.mark.parametrize("gradient", [0.0, 1e-25, 1e-12, 1e-3, 1e15, 3e19, 1e20, 3e38])
def test_from_nothing_to_what_overflows(rule: str, gradient: float) -> None:
    """Root and quotient are those of the rule; an infinite second moment leaves the weight as it is."""
    results = []
    for update in (getattr(native, rule), lambda slots: RULES[rule](slots[0])):
        weight = torch.linspace(-1, 1, 70)
        slot = Slot(
            Constants(step_size=0.1, lr=0.1, root_scale=3.0, epsilon=1e-8, rest1=0.1, rest2=0.01),
            stored(weight, SPLIT, 1),
            stored(torch.full((70,), gradient), FLOAT, 2),
            stored(torch.zeros(70), FLOAT, 3),
            stored(torch.zeros(70), FLOAT, 4),
        )
        slot.constants.beta2 = 0.99
        update([slot])
        slot.gradient = stored(torch.ones(70), FLOAT, 2)
        update([slot])
        results.append(joined(slot.weight.data, slot.weight.low))
    assert results[0].isfinite().all()
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weight", [FLOAT, SPLIT, STOCHASTIC])
@pytest.mark.parametrize("moments", [FLOAT, NEAREST])
@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, 0x7F800001, 0x7FC00000])
def test_no_number_becomes_one(rule: str, weight: Format, moments: Format, bits: int) -> None:
    """Rounded as others are, the NaN whose bits are all ones would be zero."""
    size = 70
    gradient = torch.full((size,), bits, dtype=torch.int32).view(torch.float32)
    assert gradient.isnan().all()
    constants = Constants(
        beta1=0.9, beta2=0.9, rest1=0.1, rest2=0.1, epsilon=1e-3, lr=0.1, step_size=0.1
    )
    second = STOCHASTIC if moments == NEAREST else FLOAT
    slot = Slot(
        constants,
        stored(torch.ones(size), weight, 1),
        stored(gradient, FLOAT, 2),
        stored(torch.zeros(size), moments, 3),
        stored(torch.zeros(size), second, 4),
    )
    getattr(native, rule)([slot])
    written = [slot.weight, slot.first] if rule == "sgd" else [slot.weight, slot.first, slot.second]
    for one in written:
        assert one is not None
        assert (
            one.data.isnan().all()
        )  # of split numbers the upper halves, with which products compute
        assert one.read().isnan().all()


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_of_what_overflows(nesterov: bool) -> None:
    weight, gradient = torch.ones(70), torch.full((70,), torch.inf)
    constants = Constants(beta1=0.9, rest1=1.0, step_size=0.1, nesterov=nesterov)
    slot = Slot(constants, Stored(FLOAT, weight), Stored(FLOAT, gradient))
    slot.first = Stored(FLOAT, torch.zeros(70))
    native.sgd([slot])
    assert (weight == -torch.inf).all()


def test_gradient_squares() -> None:
    ours = slots(FLOAT, False, None, FLOAT)
    exact = sum(float(slot.gradient.data.double().square().sum()) for slot in ours)
    assert native.gradient_squares(ours) == pytest.approx(exact, rel=1e-6)
    strided = Slot(Constants(), Stored(FLOAT, torch.ones(8)[::2]), Stored(FLOAT, torch.ones(4)))
    assert native.gradient_squares([*ours, strided]) == pytest.approx(exact + 4, rel=1e-6)


def test_squares_that_fp32_cannot_hold() -> None:
    large = Slot(Constants(), Stored(FLOAT, torch.ones(40)), Stored(FLOAT, torch.full((40,), 1e20)))
    assert native.gradient_squares([large]) == pytest.approx(40e40, rel=1e-6)
    large.gradient.data[17] = torch.inf
    assert native.gradient_squares([large]) == torch.inf


def test_tensors_with_gaps_are_updated_in_python() -> None:
    memory = torch.ones(8)
    slot = Slot(Constants(step_size=1.0), Stored(FLOAT, memory[::2]), Stored(FLOAT, torch.ones(4)))
    native.sgd([slot])
    assert memory.tolist() == [0.0, 1.0] * 4


@pytest.mark.parametrize("weight_zero", [True, False])
def test_a_trust_ratio_without_a_norm_is_one(weight_zero: bool) -> None:
    constants = Constants(
        beta1=0.0, beta2=0.0, lr=0.5, step_size=1.0, epsilon=1.0, ratio_limit=math.inf
    )
    value, gradient = (0.0, 1.0) if weight_zero else (3.0, 0.0)
    zeros = torch.zeros(4)
    slot = Slot(
        constants,
        Stored(FLOAT, torch.full((4,), value)),
        Stored(FLOAT, torch.full((4,), gradient)),
        Stored(FLOAT, zeros.clone()),
        Stored(FLOAT, zeros.clone()),
    )
    other = copy.deepcopy(slot)
    native.lamb([slot])
    rules.lamb(other)
    expected = torch.full((4,), -0.25 if weight_zero else 3.0)  # half of 1 / (1 + 1)
    torch.testing.assert_close(slot.weight.data, expected)
    torch.testing.assert_close(other.weight.data, expected)
