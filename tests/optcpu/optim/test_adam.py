"""Adam and AdamW: PyTorch's steps in FP32, close to them in BF16, and a second moment that decays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from optcpu.optim import Adam, AdamW
from tests.optcpu.optim.conftest import assert_equal, give_gradients, twins

KINDS = [(Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)]


@pytest.mark.parametrize(("ours", "theirs"), KINDS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lr=st.floats(1e-4, 0.1),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0.5, 0.9999)),
    eps=st.sampled_from([1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
)
def test_fp32_steps_are_pytorchs(
    implementation: str, ours: type, theirs: type, **options: Any
) -> None:
    mine, yours = twins()
    optimizer, reference = (
        ours(mine, state_dtype=torch.float32, **options),
        theirs(yours, **options),
    )
    for step in range(5):
        give_gradients(mine, yours, seed=step)
        optimizer.step()
        reference.step()
    assert_equal(mine, yours, tolerance=1e-5)


def test_a_step_by_hand(implementation: str) -> None:
    weight, gradient = np.array([1.0, -2.0, 0.5]), np.array([0.1, 0.2, -0.3])
    parameter = nn.Parameter(torch.tensor(weight, dtype=torch.float32))
    optimizer = AdamW([parameter], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5)
    expected, first, second = weight.copy(), np.zeros(3), np.zeros(3)
    for step in (1, 2):
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        corrected = first / (1 - 0.9**step), second / (1 - 0.99**step)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=5e-3)


@pytest.mark.parametrize(("ours", "theirs"), KINDS)
def test_bf16_steps_are_close(implementation: str, ours: type, theirs: type) -> None:
    mine, yours = twins()
    optimizer, reference = ours(mine, lr=1e-2), theirs(yours, lr=1e-2)
    for step in range(20):
        give_gradients(mine, yours, seed=step)
        optimizer.step()
        reference.step()
    for state in optimizer.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    # Twenty steps of 0.01, each off by at most the rounding of two moments.
    for one, other in zip(mine, yours, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=20 * 1e-2 * 2**-7)


def test_the_second_moment_decays_as_in_fp32(implementation: str) -> None:
    """With beta2 = 0.999, where rounding to nearest would stop it: variance 1, then 1/100."""
    size, steps = (20_000, 2000) if implementation == "kernel" else (2000, 2000)
    parameter = nn.Parameter(torch.zeros(size))
    optimizer = AdamW([parameter], lr=0.0, betas=(0.9, 0.999))
    exact, nearest = torch.zeros(size), torch.zeros(size, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        gradient = torch.randn(size, generator=generator) * (1.0 if step < 500 else 0.1)
        parameter.grad = gradient
        optimizer.step()
        exact.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        nearest.copy_(nearest.float().mul_(0.999).addcmul_(gradient, gradient, value=0.001))
    stored = optimizer.state[parameter]["exp_avg_sq"].float()
    assert abs(stored.mean() / exact.mean() - 1) < 0.05
    assert nearest.float().mean() / exact.mean() > 1.3  # what is avoided


@pytest.mark.parametrize(("ours", "theirs"), KINDS)
def test_checkpoints_go_both_ways(ours: type, theirs: type) -> None:
    mine, yours = twins()
    optimizer, reference = ours(mine), theirs(yours)
    give_gradients(mine, yours, seed=0)
    optimizer.step()
    reference.step()

    saved = optimizer.state_dict()
    reference.load_state_dict(saved)
    for index, parameter in enumerate(yours):
        state = reference.state[parameter]
        assert state["exp_avg"].dtype == torch.float32
        assert torch.equal(state["exp_avg"], saved["state"][index]["exp_avg"])
        assert float(state["step"]) == 1
    reference.step()

    optimizer.load_state_dict(reference.state_dict())
    for one, other in zip(mine, yours, strict=True):
        assert torch.equal(
            optimizer.state[one]["exp_avg"], reference.state[other]["exp_avg"].bfloat16()
        )
        assert optimizer.state[one]["step"] == 2


def test_bias_corrections_count_each_parameters_own_steps() -> None:
    late = nn.Parameter(torch.ones(3))
    early = nn.Parameter(torch.ones(3))
    optimizer = AdamW([late, early], lr=0.1, weight_decay=0.0, state_dtype=torch.float32)
    early.grad = torch.ones(3)
    optimizer.step()
    late.grad = torch.ones(3)
    optimizer.step()
    # The first step of Adam is lr, whatever the gradient.
    assert math.isclose(late[0].item(), 0.9, rel_tol=1e-5)


def test_state_of_another_shape_is_refused() -> None:
    saved = AdamW([nn.Parameter(torch.ones(4))])
    saved.param_groups[0]["params"][0].grad = torch.ones(4)
    saved.step()
    parameter = nn.Parameter(torch.ones(40_000))
    optimizer = AdamW([parameter])
    optimizer.load_state_dict(saved.state_dict())
    parameter.grad = torch.ones(40_000)
    with pytest.raises(ValueError, match=r"'exp_avg' of .* shape \(40000,\) has shape \(4,\)"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "learning rate"),
        ({"state_dtype": torch.float16}, "state_dtype must be torch.bfloat16 or torch.float32"),
        ({"seed": "x"}, "seed must be an integer, not 'x'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW([nn.Parameter(torch.ones(2))], **options)
