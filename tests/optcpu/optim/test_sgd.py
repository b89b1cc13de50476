"""SGD: PyTorch's steps, with and without momentum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from optcpu.optim import SGD
from tests.optcpu.optim.conftest import assert_equal, give_gradients, twins


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lr=st.floats(1e-4, 1.0),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    dampening=st.sampled_from([0.0, 0.3]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    nesterov=st.booleans(),
    maximize=st.booleans(),
)
def test_fp32_steps_are_pytorchs(implementation: str, **options: Any) -> None:
    if options["nesterov"] and (options["momentum"] == 0 or options["dampening"] != 0):
        options["nesterov"] = False
    mine, yours = twins()
    optimizer = SGD(mine, state_dtype=torch.float32, **options)
    reference = torch.optim.SGD(yours, **options)
    for step in range(4):
        give_gradients(mine, yours, seed=step)
        optimizer.step()
        reference.step()
    assert_equal(mine, yours)


def test_two_steps_by_hand(implementation: str) -> None:
    weight, gradient = np.array([1.0, -2.0]), np.array([0.5, 0.25])
    parameter = nn.Parameter(torch.tensor(weight, dtype=torch.float32))
    optimizer = SGD([parameter], lr=0.1, momentum=0.5)
    for _ in range(2):
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
    expected = weight - 0.1 * gradient - 0.1 * (0.5 * gradient + gradient)
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-6)


def test_without_momentum_there_is_no_state() -> None:
    mine, _ = twins()
    optimizer = SGD(mine, lr=0.1)
    give_gradients(mine, seed=0)
    optimizer.step()
    assert not any(optimizer.state.values())


def test_sparse_gradients_are_taken_as_in_pytorch() -> None:
    mine, yours = nn.Embedding(10, 4, sparse=True), nn.Embedding(10, 4, sparse=True)
    yours.load_state_dict(mine.state_dict())
    for module, kind in ((mine, SGD), (yours, torch.optim.SGD)):
        optimizer = kind(module.parameters(), lr=0.1)
        module(torch.tensor([1, 3, 3])).sum().backward()
        optimizer.step()
    torch.testing.assert_close(mine.weight, yours.weight)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_checkpoints_go_both_ways(momentum: float) -> None:
    mine, yours = twins()
    optimizer, reference = SGD(mine, momentum=momentum), torch.optim.SGD(yours, momentum=momentum)
    give_gradients(mine, yours, seed=0)
    optimizer.step()
    reference.load_state_dict(optimizer.state_dict())
    reference.step()
    optimizer.load_state_dict(reference.state_dict())
    for one, other in zip(mine, yours, strict=True):
        if momentum:
            buffer = reference.state[other]["momentum_buffer"]
            assert torch.equal(optimizer.state[one]["momentum_buffer"], buffer.bfloat16())
