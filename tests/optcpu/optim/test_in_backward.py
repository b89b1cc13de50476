"""Updates during the backward pass give the same numbers, and gradients that are gone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from optcpu.errors import OptcpuError
from optcpu.optim import SGD, AdamW, Lamb, Lookahead
from optcpu.optim.base import StoredOptimizer

Make = Callable[[list[nn.Parameter]], StoredOptimizer]

KINDS: dict[str, Make] = {
    "adamw": lambda p: AdamW(p, lr=0.01),
    "lamb": lambda p: Lamb(p, lr=0.01),
    "sgd": lambda p: SGD(p, lr=0.01, momentum=0.9),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 2)
    )


def inputs(step: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_the_same_bits_as_in_step(name: str, accumulation_steps: int) -> None:
    model, twin = network(), network()
    optimizer, reference = (
        KINDS[name](list(model.parameters())),
        KINDS[name](list(twin.parameters())),
    )
    optimizer.update_in_backward(accumulation_steps)
    for step in range(4):
        for module, stepper in ((model, optimizer), (twin, reference)):
            for part in range(accumulation_steps):
                module(inputs(10 * step + part)).square().mean().backward()
            if stepper is optimizer:
                assert all(p.grad is None for p in module.parameters())
            stepper.step()
            stepper.zero_grad()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_gradients_go_one_by_one() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.update_in_backward()
    seen: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: seen.append(sum(p.grad is not None for p in model.parameters()))
        )
    model(inputs(0)).sum().backward()
    assert max(seen) == 0  # ours comes first, and has freed the gradient by then


def test_a_last_incomplete_accumulation_is_updated_in_step() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.update_in_backward(4)
    before = copy.deepcopy(model.state_dict())
    model(inputs(0)).sum().backward()
    assert torch.equal(before["0.weight"], model[0].weight)
    optimizer.step()
    assert not torch.equal(before["0.weight"], model[0].weight)


def test_a_forgotten_step_is_told() -> None:
    model = network()
    optimizer = AdamW(model.parameters())
    optimizer.update_in_backward(2)
    model(inputs(0)).sum().backward()
    model(inputs(0)).sum().backward()
    with pytest.raises(OptcpuError, match=r"more than accumulation_steps = 2 .*optimizer.step\(\)"):
        model(inputs(0)).sum().backward()


def test_global_clipping_is_refused() -> None:
    with pytest.raises(OptcpuError, match=r"max_grad_norm = 1.0 needs the gradients of all"):
        Lamb(network().parameters(), max_grad_norm=1.0).update_in_backward()


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_bad_accumulation_steps(steps: object) -> None:
    with pytest.raises(ValueError, match="accumulation_steps must be an integer of at least 1"):
        AdamW(network().parameters()).update_in_backward(steps)  # type: ignore[arg-type]


def test_it_can_be_undone() -> None:
    model = network()
    optimizer = AdamW(model.parameters())
    optimizer.update_in_backward()
    optimizer.update_in_step()
    model(inputs(0)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_within_lookahead() -> None:
    model, twin = network(), network()
    inner = AdamW(model.parameters(), lr=0.05, state_dtype=torch.float32)
    inner.update_in_backward()
    optimizer = Lookahead(inner, k=2)
    reference = Lookahead(AdamW(twin.parameters(), lr=0.05, state_dtype=torch.float32), k=2)
    for step in range(6):
        for module, stepper in ((model, optimizer), (twin, reference)):
            stepper.zero_grad()
            module(inputs(step)).square().mean().backward()
            stepper.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_autograd_knows_that_weights_have_changed() -> None:
    model = network()
    optimizer = AdamW(model.parameters())
    loss = model(inputs(0)).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_options_of_a_checkpoint_count() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.update_in_backward()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 0.0
    optimizer.load_state_dict(saved)
    before = copy.deepcopy(model.state_dict())
    model(inputs(0)).sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_frozen_parameters_are_left() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.update_in_backward()
    before = copy.deepcopy(model.state_dict())
    model(inputs(0)).sum().backward()
    optimizer.step()
    assert torch.equal(before["0.weight"], model[0].weight)
    assert not torch.equal(before["2.weight"], model[2].weight)
