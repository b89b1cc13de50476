"""Gradients in BF16 that the kernel adds up are what autograd makes of them, to the bit."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import optcpu
from optcpu.optim import accumulation, native

BF16 = torch.bfloat16
LARGE = (160, 130)  # worth a call

needs_kernel = pytest.mark.skipif(native.library_or_none() is None, reason="needs a C++ compiler")


class Product(torch.autograd.Function):
    """``x @ weight``, whose backward gives a gradient in BF16, as that of a compiled graph does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.count = len(weights)
        return sum(x @ weight for weight in weights)  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return None, *(x.t() @ gradients[0] for _ in range(ctx.count))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the gradients that the kernel has added."""
    seen: list[int] = []
    added = accumulation._add

    def counted(total: Tensor, gradient: Tensor) -> None:
        seen.append(total.numel())
        added(total, gradient)

    monkeypatch.setattr(accumulation, "_add", counted)
    return seen


def weight(seed: int = 0) -> nn.Parameter:
    numbers = torch.randn(LARGE, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(numbers.to(BF16))


def run(weights: list[nn.Parameter], seed: int, *, faster: bool) -> Tensor:
    x = torch.randn(8, LARGE[0], generator=torch.Generator().manual_seed(seed)).to(BF16)
    output = Product.apply(x, *weights)
    for leaf in weights if faster else ():
        accumulation.add_by_kernel(leaf)
    return output.float().square().sum()


@needs_kernel
@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(1, 300))
def test_it_adds_as_pytorch_does(seed: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**15), 2**15, (2, rows, columns), generator=generator)
    total, gradient = bits.short().view(BF16)  # any numbers, infinities and NaN among them
    expected = total + gradient
    with torch.no_grad():
        accumulation.add(total, gradient)
    # PyTorch's own NaN have other bits in one half of a vector than in the other.
    assert torch.equal(total.isnan(), expected.isnan())
    assert torch.equal(total.nan_to_num(0), expected.nan_to_num(0))


@needs_kernel
@torch.no_grad()
def test_totals_that_lie_otherwise_in_memory(calls: list[int]) -> None:
    for total, gradient, times in (
        (torch.randn(LARGE).to(BF16).t(), torch.randn(LARGE).to(BF16).t(), 1),
        (torch.randn(LARGE).to(BF16).t(), torch.randn(LARGE[::-1]).to(BF16), 0),  # orders differ
        (torch.randn(200, 300).to(BF16)[:, ::2], torch.randn(200, 150).to(BF16), 0),  # gaps
        (torch.randn(LARGE), torch.randn(LARGE).to(BF16), 0),
        (torch.randn(7, 5).to(BF16), torch.randn(7, 5).to(BF16), 0),  # not worth a call
    ):
        calls.clear()
        expected = total + gradient
        accumulation.add(total, gradient)
        assert torch.equal(total, expected)
        assert len(calls) == times


@needs_kernel
def test_the_same_bits_as_from_autograd(calls: list[int]) -> None:
    ours, theirs = [weight(0), weight(1)], [weight(0), weight(1)]
    for seed in range(4):
        run(ours, seed, faster=True).backward()
        run(theirs, seed, faster=False).backward()
    assert len(calls) == 3 * 2  # the first backward finds nothing to add to
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.grad, other.grad)


@needs_kernel
def test_the_gradient_stays_the_tensor_that_it_was() -> None:
    parameter = weight()
    run([parameter], 0, faster=True).backward()
    total = parameter.grad
    version = total._version
    run([parameter], 1, faster=True).backward()
    assert parameter.grad is total
    assert total._version > version


@needs_kernel
def test_a_graph_that_is_kept_adds_again(calls: list[int]) -> None:
    ours, theirs = weight(), weight()
    for parameter, faster in ((ours, True), (theirs, False)):
        run([parameter], 0, faster=faster).backward()
        loss = run([parameter], 1, faster=faster)
        loss.backward(retain_graph=True)
        loss.backward()
    assert len(calls) == 1  # the next time only
    assert torch.equal(ours.grad, theirs.grad)


@needs_kernel
def test_parts_of_a_gradient_are_summed_before_they_are_added(calls: list[int]) -> None:
    """As autograd does it: of one node, of several, and of those that are in no compiled graph."""
    ours, theirs = weight(), weight()
    for seed in range(0, 9, 3):
        for leaf, faster in ((ours, True), (theirs, False)):
            loss = run([leaf, leaf], seed, faster=faster) + run([leaf], seed + 1, faster=faster)
            (loss + 1e-3 * leaf.float().square().sum()).backward()
    assert len(calls) == 2
    assert torch.equal(ours.grad, theirs.grad)


@needs_kernel
def test_a_leaf_that_is_frozen_before_its_backward(calls: list[int]) -> None:
    leaf, other = weight(0), weight(1)
    run([leaf, other], 0, faster=True).backward()
    before, others = leaf.grad.clone(), other.grad.clone()
    loss = run([leaf, other], 1, faster=True)
    leaf.requires_grad_(False)
    loss.backward()
    run([leaf, other], 2, faster=True).backward()
    assert torch.equal(leaf.grad, before)
    assert not torch.equal(other.grad, others)
    assert len(calls) == 2


@needs_kernel
def test_two_leaves_with_one_gradient(calls: list[int]) -> None:
    totals = []
    for faster in (True, False):
        leaves = [weight(0), weight(1)]
        leaves[0].grad = leaves[1].grad = torch.ones(LARGE, dtype=BF16)
        run(leaves, 0, faster=faster).backward()
        totals.append(leaves[0].grad)
    assert len(calls) == 2
    assert torch.equal(*totals)


@needs_kernel
def test_a_node_that_is_not_run_keeps_nothing_alive() -> None:
    leaf = weight()
    leaf.grad = torch.zeros_like(leaf)
    accumulation.add_by_kernel(leaf)  # in no graph
    gone = weakref.ref(leaf)
    run([leaf], 0, faster=True)
    del leaf
    assert gone() is None


@needs_kernel
@pytest.mark.filterwarnings("ignore")
def test_the_check_for_anomalies_sees_each_gradient() -> None:
    leaf, x = weight(), torch.ones(8, LARGE[0], dtype=BF16)
    run([leaf], 0, faster=True).backward()
    before = leaf.grad.clone()
    with torch.autograd.detect_anomaly():
        loss = Product.apply(x, leaf).float().sum()
        accumulation.add_by_kernel(leaf)
        x.data.fill_(math.nan)  # behind autograd's back: of all gradients the leaf's alone is NaN
        with pytest.raises(RuntimeError, match="nan values in its 1th"):
            loss.backward()
    assert torch.equal(leaf.grad, before)


@needs_kernel
@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_see_what_they_would_see(calls: list[int], register: str) -> None:
    seen: dict[bool, list[Tensor]] = {}
    for faster in (True, False):
        parameter = weight()
        told = seen.setdefault(faster, [])

        def tell(given: Tensor, told: list[Tensor] = told) -> None:
            told.append((given if given.grad is None else given.grad).clone())

        getattr(parameter, register)(tell)
        for seed in range(3):
            run([parameter], seed, faster=faster).backward()
    assert len(calls) == (2 if register == "register_hook" else 0)
    assert len(seen[True]) == 3
    assert all(torch.equal(a, b) for a, b in zip(seen[True], seen[False], strict=True))


@needs_kernel
def test_hooks_of_the_node_see_what_they_would_see() -> None:
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    for faster, told in seen.items():
        parameter = weight()
        node = torch.autograd.graph.get_gradient_edge(parameter).node

        def twice(gradients: Any, told: list[Tensor] = told) -> Any:
            told.append(gradients[0].clone())
            return (gradients[0] * 2,)

        node.register_prehook(twice)
        for seed in range(3):
            run([parameter], seed, faster=faster).backward()
        told.append(parameter.grad)
        del node
    assert len(seen[True]) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen[True], seen[False], strict=True))


@needs_kernel
def test_gradients_that_are_asked_for_are_returned(calls: list[int]) -> None:
    ours, left = weight(0), weight(1)
    run([ours, left], 0, faster=True).backward()
    totals = ours.grad.clone(), left.grad.clone()
    (asked,) = torch.autograd.grad(run([ours, left], 1, faster=True), [ours])
    (expected,) = torch.autograd.grad(run([ours, left], 1, faster=False), [ours])
    assert torch.equal(asked, expected)
    assert torch.equal(ours.grad, totals[0])
    run([ours, left], 1, faster=True).backward(inputs=[ours])
    assert torch.equal(ours.grad, totals[0] + expected)
    assert torch.equal(left.grad, totals[1])
    assert len(calls) == 1


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64))


@needs_kernel
@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="gradients are FP32 there")
@pytest.mark.filterwarnings("ignore:optcpu.*BF16")
@pytest.mark.parametrize("in_backward", [False, True], ids=["in step", "in backward"])
def test_an_optimized_model_accumulates_by_the_kernel(
    monkeypatch: pytest.MonkeyPatch, calls: list[int], in_backward: bool
) -> None:
    def trained() -> list[Tensor]:
        model = network()
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model, optimizer = optcpu.optimize(model, optimizer, precision="bf16", weights="bf16")
        if in_backward:
            optimizer.update_in_backward(3)
        generator = torch.Generator().manual_seed(1)
        for _ in range(2):
            for _ in range(3):
                model(torch.randn(32, 64, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [value.clone() for value in model.state_dict().values()]

    by_kernel = trained()
    assert len(calls) == 2 * 2 * 2  # two steps, two later micro-batches, two matrices
    monkeypatch.setattr(accumulation, "_fit", lambda *_: False)
    assert all(map(torch.equal, by_kernel, trained()))
