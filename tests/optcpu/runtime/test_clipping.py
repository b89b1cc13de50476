"""The norm of gradients of any dtype, and steps with gradients that are scaled down."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from optcpu.optim import SGD, AdamW, Lamb, Lookahead
from optcpu.runtime.clipping import scaled_step, total_norm

BF16, FP32 = torch.bfloat16, torch.float32

MAKERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, state_dtype=FP32),
    "lamb": lambda p: Lamb(p, lr=0.01, state_dtype=FP32),
    "lamb that clips": lambda p: Lamb(p, lr=0.01, max_grad_norm=0.5, state_dtype=FP32),
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, state_dtype=FP32),
    "maximise": lambda p: SGD(p, lr=0.1, maximize=True, state_dtype=FP32),
    "lookahead": lambda p: Lookahead(AdamW(p, lr=0.01, state_dtype=FP32), k=2),
    "pytorch's": lambda p: torch.optim.SGD(p, lr=0.1),
}


@given(
    st.lists(st.tuples(st.integers(1, 70), st.sampled_from([BF16, FP32])), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_the_norm_is_that_of_all_gradients(kinds: list[tuple[int, torch.dtype]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(size, 3, generator=generator).to(dtype) for size, dtype in kinds]
    exact = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert total_norm(gradients) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_shows_in_the_norm(dtype: torch.dtype, bad: float) -> None:
    gradients = [torch.ones(50).to(dtype), torch.ones(3)]
    gradients[0][17] = bad
    assert not math.isfinite(total_norm(gradients))


def test_the_norm_of_nothing_and_of_what_lies_otherwise() -> None:
    assert total_norm([]) == 0
    numbers = torch.arange(12.0).view(3, 4)
    norm = numbers.norm().item()
    assert total_norm([numbers.to(BF16).t()]) == pytest.approx(norm, rel=1e-2)
    assert total_norm([numbers.to_sparse()]) == pytest.approx(norm)


def _with_gradients(dtype: torch.dtype, factor: float) -> list[nn.Parameter]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(size)) for size in ((40, 30), (33,))]
    for parameter in parameters:
        gradient = torch.randn(parameter.shape).to(BF16).float()
        if dtype == BF16 and hasattr(parameter, "grad_dtype"):
            parameter.grad_dtype = None
        parameter.grad = (gradient * factor).to(dtype)
    return parameters


@pytest.mark.skipif(not hasattr(nn.Parameter, "grad_dtype"), reason="gradients are FP32 there")
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("factor", [0.25, 1e-7])
def test_a_scaled_step_is_that_of_scaled_gradients(name: str, factor: float) -> None:
    ours, theirs = _with_gradients(BF16, 1.0), _with_gradients(FP32, factor)
    if name == "pytorch's":
        theirs = _with_gradients(BF16, factor)
    optimizer, reference = MAKERS[name](ours), MAKERS[name](theirs)
    before = [_gradient(p).clone() for p in ours]
    for _ in range(2):
        scaled_step(optimizer, [_gradient(p) for p in ours], factor)
        reference.step()
        if name == "pytorch's":
            break  # whose gradients were multiplied in place
        assert all(map(torch.equal, before, map(_gradient, ours)))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.skipif(not hasattr(nn.Parameter, "grad_dtype"), reason="gradients are FP32 there")
@pytest.mark.parametrize("where", ["before", "behind", "globally", "around lookahead", "subclass"])
def test_who_looks_at_a_step_sees_scaled_gradients(where: str) -> None:
    parameters = _with_gradients(BF16, 1.0)
    expected = [_gradient(p) * 0.5 for p in parameters]
    seen: list[Tensor] = []

    def look(*_: object) -> None:
        seen.extend(_gradient(p).clone() for p in parameters)

    class Looks(SGD):
        def step(self, closure: Any = None) -> Any:
            look()
            return super().step(closure)

    optimizer: Optimizer = (Looks if where == "subclass" else SGD)(parameters, lr=0.1)
    if where == "around lookahead":
        optimizer = Lookahead(optimizer, k=3)
    register = {
        "before": optimizer.register_step_pre_hook,
        "behind": optimizer.register_step_post_hook,
        "globally": register_optimizer_step_post_hook,
        "around lookahead": optimizer.register_step_pre_hook,
    }.get(where)
    handle = None if register is None else register(look)
    try:
        scaled_step(optimizer, [_gradient(p) for p in parameters], 0.5)
    finally:
        if handle is not None:
            handle.remove()
    assert len(seen) == len(expected)
    assert all(map(torch.equal, seen, expected))


def test_the_next_step_is_not_scaled() -> None:
    (parameter,) = (nn.Parameter(torch.zeros(20, 10)),)
    optimizer = SGD([parameter], lr=1.0)
    with optimizer.scaling_gradients(0.5):
        parameter.grad = torch.ones(20, 10)
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.full((20, 10), -0.5))
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.full((20, 10), -1.5))
