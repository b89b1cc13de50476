"""The user's optimizer keeps its meaning when it is switched to its fused kernel."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from optcpu.update import use_fused_update

OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.Adagrad, {"lr": 0.01}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 3])
def test_same_steps(
    kind: type[torch.optim.Optimizer], options: dict[str, object], steps_before: int
) -> None:
    model = nn.Linear(7, 5)
    twin = copy.deepcopy(model)
    ours, theirs = kind(model.parameters(), **options), kind(twin.parameters(), **options)
    batches = torch.randn(8, 4, 7)
    for i, x in enumerate(batches):
        if i == steps_before:
            assert use_fused_update(ours) is ours
        for module, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    assert ours.param_groups[0]["fused"] is True
    torch.testing.assert_close(model.weight, twin.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.bias, twin.bias, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("choice", [{"fused": False}, {"foreach": True}, {"differentiable": True}])
def test_the_users_choice_stands(choice: dict[str, bool]) -> None:
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), **choice)
    before = copy.deepcopy(optimizer.defaults)
    use_fused_update(optimizer)
    assert optimizer.param_groups[0]["fused"] == before["fused"]


def test_what_it_does_not_know_is_left_alone() -> None:
    class Own(torch.optim.AdamW):
        pass

    for optimizer in (
        Own(nn.Linear(2, 2).parameters()),
        torch.optim.RMSprop(nn.Linear(2, 2).parameters()),
        torch.optim.AdamW([nn.Parameter(torch.randn(2, device="meta"))]),
    ):
        use_fused_update(optimizer)
        assert optimizer.param_groups[0].get("fused") is None


def test_the_state_loads_into_a_plain_optimizer() -> None:
    model = nn.Linear(3, 3)
    optimizer = use_fused_update(torch.optim.AdamW(model.parameters()))
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    plain = torch.optim.AdamW(model.parameters())
    plain.load_state_dict(optimizer.state_dict())
    plain.step()
