"""Packed copies of weights: right products after every change, packed no more often than it pays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from copies import Copies
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optcpu.layout.native import NativePacking
from passes import call_sites, gemm, ops, packed

DTYPES = [torch.float32]
if gemm.onednn_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    DTYPES.append(torch.bfloat16)


@pytest.fixture(autouse=True)
def nothing_is_small(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packed copies for products of all sizes, and nothing remembered or kept from before."""
    monkeypatch.setattr(packed, "_KEPT", {})
    for dtype in gemm._SMALL:
        monkeypatch.setitem(gemm._SMALL, dtype, 0)
    yield
    assert not packed._KEPT, "an entry outlived its weight"


@pytest.fixture
def pays_from(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_threshold(products: int) -> None:
        monkeypatch.setattr(packed._Kept, "pays_from", lambda *_: products)

    set_threshold(2)
    return set_threshold


def test_a_copy_is_made_once_it_pays_and_once_for_each_change(pays_from: Any) -> None:
    weight, x, packing = torch.randn(6, 5), torch.randn(3, 5), Copies()
    packed.keep(weight, packing)
    made = []
    for _ in range(3):  # changes
        for _ in range(4):  # products between two of them
            result = packed.product(x, weight)
            made.append((packing.packings, result is None))
            torch.testing.assert_close(ops.linear_op(x, weight, None, "none"), x @ weight.t())
        weight.mul_(2)
    # Two products a turn: the first one comes before it is known that there is more than one.
    assert made[0] == (0, True)
    assert [count for count, _ in made[1:]] == [1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert not any(plain for _, plain in made[1:])


def test_what_is_known_of_the_future_decides_before_what_was_seen(pays_from: Any) -> None:
    weight, x, packing = torch.randn(6, 5), torch.randn(3, 5), Copies()
    packed.keep(weight, packing, products=4)
    assert packed.product(x, weight) is not None, "the first of four"
    packed.keep(weight, packing, products=1)
    for _ in range(5):
        assert packed.product(x, weight) is None
    assert packed.kept(weight).standing() == (  # type: ignore[union-attr]
        "plain",
        "packing pays from 2 products between two changes on; there are 1",
    )


def test_one_product_a_change_is_never_packed(pays_from: Any) -> None:
    weight, x, packing = torch.randn(6, 5), torch.randn(3, 5), Copies()
    packed.keep(weight, packing)
    for _ in range(4):
        assert packed.product(x, weight) is None
        weight.add_(1)
    assert packing.packings == 0


def test_the_number_of_copies_is_bounded(pays_from: Any) -> None:
    pays_from(1)
    weight, packing = torch.randn(6, 5), Copies()
    packed.keep(weight, packing)
    entry = packed.kept(weight)
    assert entry is not None
    for rows in range(1, 20):  # sequences of all lengths, and a weight that does not change
        ops.linear_op(torch.randn(rows, 5), weight, None, "none")
    assert len(entry.packed) == packed._MOST_COPIES
    for _ in range(2):
        weight.add_(1)
        packed.product(torch.randn(30, 5), weight)
    assert [rows for *_, rows in entry.packed] == [30], "the others are multiplied no more"
    assert list(entry.thresholds) == list(entry.packed)


def test_forward_and_backward_have_their_own_copies(pays_from: Any) -> None:
    pays_from(1)
    weight, packing = torch.randn(6, 5), Copies()
    x, gradient = torch.randn(3, 5), torch.randn(3, 6)
    packed.keep(weight, packing)
    for _ in range(3):
        ops.linear_op(x, weight, None, "none")
        x_gradient, *_ = ops.linear_backward(
            gradient, None, x, weight, "none", False, torch.float32
        )
        torch.testing.assert_close(x_gradient, gradient @ weight)
    assert packing.packings == 2


@pytest.mark.parametrize("activation", ["none", *ops.ACTIVATIONS])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_fused_operator_multiplies_by_the_copy(
    pays_from: Any, activation: str, bias: bool, dtype: torch.dtype
) -> None:
    pays_from(1)
    weight, x = torch.randn(37, 21).to(dtype), torch.randn(9, 21).to(dtype)
    offset = torch.randn(37) if bias else None
    residual = torch.randn(9, 37).to(dtype)

    def results() -> list[Tensor]:
        both = ops.linear_saving_input(x, weight, offset, activation)
        return [
            ops.linear_op(x, weight, offset, activation),
            *both,
            ops.linear_add(x, weight, offset, residual),
            ops.mm(x, weight.t()),
        ]

    plain = results()
    packed.keep(weight, NativePacking())
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(results(), plain, rtol=tolerance, atol=tolerance)
    entry = packed.kept(weight)
    assert entry is not None
    assert entry.standing() == ("native", "a packed copy is kept until the weight changes")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", ["mm", "linear", "linear_add", "linear_backward"])
def test_call_sites_multiply_by_the_copy(pays_from: Any, operator: str, dtype: torch.dtype) -> None:
    pays_from(1)
    x, weight, y = (torch.randn(s).to(dtype) for s in ((9, 32), (48, 32), (9, 48)))
    arguments: tuple[Any, ...] = {
        "mm": (x, weight.t()),
        "linear": (x, weight, None, "relu"),
        "linear_add": (x, weight, None, y),
        "linear_backward": (y, None, x, weight, "none", False, dtype),
    }[operator]
    site = call_sites.CallSite(operator)
    site(*arguments)  # which settles its kernels
    packed.keep(weight, NativePacking())
    entry = packed.kept(weight)
    assert entry is not None
    for _ in range(3):
        before = entry.version
        result = site(*arguments)
        assert entry.version != before, "the copy was passed over"
        torch.testing.assert_close(
            result, getattr(torch.ops.optcpu, operator).default(*arguments), rtol=0, atol=0
        )
        weight.mul_(2)
    assert len(entry.packed) == 1


def test_what_pays_is_asked_once_for_each_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        packed._Kept, "pays_from", lambda *_: asked.append(torch.get_num_threads()) or 5
    )
    weight, x, threads = torch.randn(6, 5), torch.randn(3, 5), torch.get_num_threads()
    packed.keep(weight, Copies())
    try:
        for count in (threads, threads, 1, 1):
            torch.set_num_threads(count)
            for _ in range(2):
                packed.product(x, weight)
                weight.mul_(2)
    finally:
        torch.set_num_threads(threads)
    assert asked == [threads, 1]
    gemm.adopt({})  # choices of another process come first from here on
    packed.product(x, weight)
    assert asked == [threads, 1, threads]


SIZES = st.integers(1, 70)


@settings(max_examples=60)
@given(rows=SIZES, shape=st.tuples(SIZES, SIZES), side=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_unpacking_gives_back_every_bit(
    rows: int, shape: tuple[int, int], side: bool, dtype: torch.dtype
) -> None:
    weight = torch.randn(shape).to(dtype)
    weight = weight.t() if side else weight
    packing = NativePacking()
    assert torch.equal(packing.unpack(packing.pack(weight, rows, None)), weight)


WRITES = {
    "in place": lambda w: w.mul_(-1),
    "through a view": lambda w: w[1:].zero_(),
    "through a transposed view": lambda w: w.t().add_(1),
    "part of it": lambda w: w.view(-1)[3].fill_(9.0),
    "copy_": lambda w: w.copy_(torch.randn_like(w)),
    "detached": lambda w: w.detach().sub_(3),
    "an initialiser": lambda w: torch.nn.init.ones_(w),
    "a kernel that tells": lambda w: torch.autograd.graph.increment_version([w]),
}


@settings(max_examples=40)
@given(st.lists(st.sampled_from(["product", *WRITES]), max_size=20))
def test_no_write_is_missed(sequence: list[str]) -> None:
    weight, x = torch.randn(4, 5), torch.randn(3, 5)
    packed.keep(weight, Copies(), products=9)
    entry = packed.kept(weight)
    assert entry is not None
    entry.pays_from = lambda *_: 1  # type: ignore[method-assign]
    for event in sequence:
        if event == "product":
            result = packed.product(x, weight)
            assert result is not None
            torch.testing.assert_close(result, x @ weight.t())
        else:
            WRITES[event](weight)


def test_other_weights_views_and_small_products_are_left_alone(
    pays_from: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pays_from(1)
    weight, x = torch.randn(6, 5), torch.randn(3, 5)
    packed.keep(weight, Copies())
    assert packed.product(x, weight.clone()) is None
    packed.forget(weight)
    assert packed.product(x, weight) is None
    packed.keep(weight, Copies())
    upper = packed.product(x, weight[:2])
    assert upper is not None
    torch.testing.assert_close(upper, x @ weight[:2].t())
    monkeypatch.setitem(gemm._SMALL, torch.float32, 2**21)
    assert packed.product(x, weight) is None


def test_other_memory_at_the_address_is_not_the_weight(pays_from: Any) -> None:
    pays_from(1)
    weight, x = torch.randn(6, 5), torch.randn(3, 5)
    packed.keep(weight, Copies())
    assert packed.product(x, weight) is not None
    old = weight.detach()  # goes on living at the address, where nobody counts its writes
    weight.set_(torch.randn(6, 5).untyped_storage(), 0, (6, 5), (5, 1))
    assert packed.product(x, old) is None
    assert packed.product(x, weight) is None


def test_the_threshold_is_measured_once_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"plain": 3e-3, "packed": 2e-3, "pack": 3.5e-3}
    calls = []

    def times(runs: Any) -> dict[str, float]:
        calls.append([run() for run in runs.values()])
        return taken

    monkeypatch.setattr(packed, "times", times)
    weight, x = torch.randn(6, 5), torch.randn(3, 5)
    packed.keep(weight, Copies())
    entry = packed.kept(weight)
    assert entry is not None
    assert [entry.pays_from(x, weight) for _ in range(3)] == [4, 4, 4]
    assert len(calls) == 1
    assert {k: v for k, v in gemm.choices().items() if k.startswith("copies ")} == {
        f"copies {gemm.shape_key(x, weight.t())}": "4"
    }


@pytest.mark.parametrize(
    "taken", [{"plain": 1.0, "packed": 1.0, "pack": 0.1}, {"plain": 1.0, "pack": 0.1}]
)
def test_a_packing_that_gains_nothing_is_never_used(
    monkeypatch: pytest.MonkeyPatch, taken: dict[str, float]
) -> None:
    monkeypatch.setattr(packed, "times", lambda _: taken)
    weight, x = torch.randn(6, 5), torch.randn(3, 5)
    packed.keep(weight, Copies(), products=1000)
    assert packed.product(x, weight) is None
    entry = packed.kept(weight)
    assert entry is not None
    assert "no faster" in entry.standing()[1]


def test_a_packing_that_cannot_be_is_never_used() -> None:
    class Impossible(Copies):
        def pack(self, weight: Tensor, rows: int, before: Any) -> Tensor:
            raise RuntimeError("bf16 path needs another processor")

    weight, x = torch.randn(6, 5), torch.randn(3, 5)
    packed.keep(weight, Impossible(), products=1000)
    assert packed.product(x, weight) is None
    torch.testing.assert_close(ops.linear_op(x, weight, None, "none"), x @ weight.t())
