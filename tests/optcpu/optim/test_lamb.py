"""LAMB against a step by hand, against another implementation, and its options one by one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import optcpu
from optcpu.errors import OptcpuError
from optcpu.optim import Lamb
from tests.optcpu.optim.conftest import assert_equal, give_gradients, parameters, twins


def lamb_in_numpy(
    weight: np.ndarray[Any, Any],
    gradients: list[np.ndarray[Any, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    trust_clip: float = np.inf,
    adapted: bool = True,
) -> np.ndarray[Any, Any]:
    """Algorithm 2 of arXiv 1904.00962 with bias correction, in double precision."""
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for step, gradient in enumerate(gradients, start=1):
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        corrected = first / (1 - betas[0] ** step), second / (1 - betas[1] ** step)
        update = corrected[0] / (np.sqrt(corrected[1]) + eps)
        ratio = 1.0
        if adapted:
            update = update + weight_decay * weight
            norms = np.linalg.norm(weight), np.linalg.norm(update)
            ratio = min(norms[0] / norms[1], trust_clip) if min(norms) > 0 else 1.0
        weight = weight - lr * ratio * update
    return weight


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from([(1, 1), (7, 3), (40, 60), (2, 3, 3, 3)]),
    lr=st.floats(1e-4, 0.1),
    betas=st.tuples(st.floats(0, 0.95), st.floats(0.5, 0.999)),
    weight_decay=st.floats(0, 0.5),
    trust_clip=st.sampled_from([None, 0.5, 10.0]),
    zero=st.booleans(),
    maximize=st.booleans(),
)
def test_steps_by_hand(
    implementation: str, shape: tuple[int, ...], zero: bool, maximize: bool, **options: Any
) -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal(shape) * (not zero)
    gradients = [generator.standard_normal(shape) for _ in range(4)]
    parameter = nn.Parameter(torch.tensor(weight, dtype=torch.float32))
    optimizer = Lamb([parameter], state_dtype=torch.float32, maximize=maximize, **options)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=torch.float32) * (-1 if maximize else 1)
        optimizer.step()
    clip = np.inf if options["trust_clip"] is None else options["trust_clip"]
    expected = lamb_in_numpy(weight, gradients, **{**options, "trust_clip": clip})
    np.testing.assert_allclose(
        parameter.detach().numpy(), expected, rtol=0, atol=2e-5 * np.abs(expected).max() + 1e-7
    )


def test_equal_to_another_implementation(implementation: str) -> None:
    other = pytest.importorskip("pytorch_optimizer")
    mine, yours = twins()
    for parameter in (*mine, *yours):  # the other clamps the norm of a weight at 10
        if parameter.numel():
            parameter.data.mul_(5 / max(float(parameter.detach().norm()), 1e-3))
    optimizer = Lamb(
        mine, lr=0.01, weight_decay=0.1, bias_correction=False, exclude_1d=False,
        eps=1e-8, state_dtype=torch.float32,
    )  # fmt: skip
    reference = other.Lamb(
        yours,
        lr=0.01,
        weight_decay=0.1,
        weight_decouple=False,
        eps=1e-8,
        adam_debias=True,
        foreach=False,
    )
    for step in range(5):
        give_gradients(mine, yours, seed=step)
        optimizer.step()
        reference.step()
    assert_equal(mine, yours, tolerance=1e-5)


def test_parameters_of_one_dimension_are_neither_decayed_nor_adapted(implementation: str) -> None:
    bias = nn.Parameter(torch.full((3,), 2.0))
    optimizer = Lamb([bias], lr=0.1, weight_decay=1.0, state_dtype=torch.float32)
    bias.grad = torch.ones(3)
    optimizer.step()
    expected = lamb_in_numpy(np.full(3, 2.0), [np.ones(3)], lr=0.1, adapted=False)
    np.testing.assert_allclose(bias.detach().numpy(), expected, rtol=1e-6)


def test_a_group_can_adapt_them_all_the_same(implementation: str) -> None:
    bias, other = nn.Parameter(torch.full((3,), 2.0)), nn.Parameter(torch.full((3,), 2.0))
    optimizer = Lamb(
        [{"params": [bias], "exclude_1d": False}, {"params": [other]}], lr=0.1, weight_decay=1.0
    )
    bias.grad = other.grad = torch.ones(3)
    optimizer.step()
    expected = lamb_in_numpy(np.full(3, 2.0), [np.ones(3)], lr=0.1, weight_decay=1.0)
    np.testing.assert_allclose(bias.detach().numpy(), expected, rtol=1e-2)
    assert (bias - other).abs().min() > 0.05


def test_a_zero_bias_moves() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    optimizer = Lamb([weight], lr=0.1)
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert (weight < -0.05).all()


def test_decoupled_decay_shrinks_the_weight_first(implementation: str) -> None:
    weight = torch.full((2, 2), 3.0)
    parameter = nn.Parameter(weight.clone())
    optimizer = Lamb([parameter], lr=0.1, weight_decay=0.5, decoupled_decay=True)
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    expected = lamb_in_numpy(
        weight.numpy() * (1 - 0.1 * 0.5), [np.ones((2, 2))], lr=0.1, weight_decay=0.0
    )
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-2)


def test_gradients_are_clipped_together(implementation: str) -> None:
    mine, yours = twins()
    optimizer = Lamb(mine, lr=0.01, max_grad_norm=0.5, state_dtype=torch.float32)
    reference = Lamb(yours, lr=0.01, state_dtype=torch.float32)
    for step in range(3):
        give_gradients(mine, yours, seed=step)
        nn.utils.clip_grad_norm_(yours, 0.5)
        before = [p.grad.clone() for p in mine if p.grad is not None]
        optimizer.step()
        reference.step()
        after = [p.grad for p in mine if p.grad is not None]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert_equal(mine, yours, tolerance=1e-5)


def test_gradients_below_the_norm_stay() -> None:
    mine, yours = twins()
    give_gradients(mine, yours, seed=0)
    Lamb(mine, max_grad_norm=1e6).step()
    Lamb(yours).step()
    assert_equal(mine, yours, tolerance=0.0)


def test_a_resumed_run_is_bit_exact(implementation: str) -> None:
    def trained(steps: range, start: list[nn.Parameter], saved: Any = None) -> tuple[Any, Any]:
        optimizer = Lamb(start, lr=0.01, seed=3)
        if saved is not None:
            optimizer.load_state_dict(saved)
        for step in steps:
            give_gradients(start, seed=step)
            optimizer.step()
        return start, optimizer

    through, whole = trained(range(6), parameters())
    half, optimizer = trained(range(3), parameters())
    saved = copy.deepcopy(optimizer.state_dict())
    resumed, after = trained(range(3, 6), [nn.Parameter(p.detach().clone()) for p in half], saved)
    assert after.state_dict()["param_groups"] == whole.state_dict()["param_groups"]
    for one, other in zip(through, resumed, strict=True):
        assert torch.equal(one, other)


def test_pickles_and_copies_go_on_as_the_original() -> None:
    mine = parameters()
    optimizer = Lamb(mine, lr=0.01, seed=5, max_grad_norm=1.0)
    give_gradients(mine, seed=0)
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        theirs = other.param_groups[0]["params"]
        assert (other.seed, other.steps, other.max_grad_norm) == (5, 1, 1.0)
        give_gradients(theirs, seed=1)
        other.step()
    give_gradients(mine, seed=1)
    optimizer.step()
    assert_equal(mine, theirs, tolerance=0.0)


def test_a_closure_computes_the_gradients() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([weight], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] == 4.0
    assert losses[0] > losses[1] > losses[2]


def test_schedulers_and_groups() -> None:
    one, two = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([one], lr=0.1)
    optimizer.add_param_group({"params": [two], "lr": 0.0})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    one.grad = two.grad = torch.ones(2, 2)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert not torch.equal(one, torch.ones(2, 2))
    assert torch.equal(two, torch.ones(2, 2))


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = Lamb(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(OptcpuError, match=r"shape \(10, 4\).*sparse=False"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr must be at least 0, not -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers from 0 to below 1, not \(0.9, 1.0\)"),
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"trust_clip": 0.0}, "trust_clip must be above 0, or None for no limit, not 0.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0, or None, not 0.0"),
        ({"state_dtype": torch.int8}, "state_dtype must be"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lamb([nn.Parameter(torch.ones(2))], **options)


def test_gradients_of_zero_can_be_clipped(implementation: str) -> None:
    parameter = nn.Parameter(torch.ones(4))
    optimizer = Lamb([parameter], max_grad_norm=1.0)
    parameter.grad = torch.zeros(4)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(4))


def test_a_checkpoint_of_adamw_is_taken() -> None:
    mine, yours = twins()
    reference = torch.optim.AdamW(yours, lr=0.125)
    give_gradients(mine, yours, seed=0)
    reference.step()
    optimizer = Lamb(mine, trust_clip=3.0)
    optimizer.load_state_dict(reference.state_dict())
    optimizer.step()
    assert optimizer.state[mine[0]]["step"] == 2
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["trust_clip"]) == (
        0.125,
        3.0,
    )


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\) is torch.float64 on cpu.*model.float"):
        Lamb([nn.Parameter(torch.ones(2, dtype=torch.float64))])
    optimizer = Lamb([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=r"torch\.bfloat16"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2).bfloat16())]})
    assert len(optimizer.param_groups) == 1


def test_it_stands_at_the_top_level() -> None:
    assert optcpu.Lamb is Lamb


@pytest.mark.parametrize("threads", [1, 2])
def test_the_result_does_not_depend_on_the_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    weight = nn.Parameter(torch.randn(300, 300, generator=torch.Generator().manual_seed(0)))
    reference = nn.Parameter(weight.detach().clone())
    try:
        for parameter, count in ((weight, threads), (reference, 2)):
            torch.set_num_threads(count)
            optimizer = Lamb([parameter], lr=0.1)
            give_gradients([parameter], seed=0)
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(weight, reference)


def test_a_scalar_is_excluded_as_well() -> None:
    scalar, vector = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor([2.0]))
    optimizer = Lamb([scalar, vector], lr=0.1, weight_decay=1.0, state_dtype=torch.float32)
    scalar.grad, vector.grad = torch.tensor(1.0), torch.tensor([1.0])
    optimizer.step()
    assert scalar.item() == vector.item()
