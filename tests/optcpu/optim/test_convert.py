"""A user's optimizer is taken over as the same object, with all that hangs on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from optcpu.optim import SGD, Adam, AdamW
from optcpu.optim.convert import convert
from tests.optcpu.optim.conftest import assert_equal, give_gradients, twins

Make = Callable[[Any], torch.optim.Optimizer]

KINDS: dict[str, tuple[Make, type]] = {
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1), Adam),
    "amsgrad": (lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True), Adam),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.01), AdamW),
    "adamw-fused": (lambda p: torch.optim.AdamW(p, lr=0.01, fused=True), AdamW),
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.01), SGD),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True), SGD),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("steps_before", [0, 3])
def test_steps_go_on_as_before(name: str, steps_before: int) -> None:
    make, kind = KINDS[name]
    mine, yours = twins()
    optimizer, reference = make(mine), make(yours)
    for step in range(8):
        if step == steps_before:
            assert convert(optimizer, torch.float32) is None
            assert type(optimizer) is kind
        give_gradients(mine, yours, seed=step)
        optimizer.step()
        reference.step()
    assert_equal(mine, yours, tolerance=5e-6)
    assert optimizer.state_dict()["param_groups"] == reference.state_dict()["param_groups"]


def test_existing_state_becomes_bf16_and_comes_back() -> None:
    mine, _ = twins()
    optimizer = torch.optim.AdamW(mine)
    give_gradients(mine, seed=0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    convert(optimizer, torch.bfloat16)
    after = optimizer.state_dict()
    for key, state in before["state"].items():
        assert torch.equal(after["state"][key]["exp_avg"], state["exp_avg"].bfloat16().float())
        assert torch.equal(after["state"][key]["step"], state["step"])
    torch.optim.AdamW(mine).load_state_dict(after)


@pytest.mark.parametrize("before", [True, False])
def test_schedulers_go_on(before: bool) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    if before:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    convert(optimizer, torch.bfloat16)
    if not before:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for expected in (0.0, -0.5, -0.75):
        weight.grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
        assert weight[0].item() == expected
    assert optimizer.steps == 3  # it was our step that ran


def test_hooks_go_on() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    convert(optimizer, torch.bfloat16)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert calls == ["before", "after"]


def test_hooks_of_checkpoints_see_them_whole() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    convert(optimizer, torch.bfloat16)
    weight.grad = torch.ones(3)
    optimizer.step()

    def packed(_: object, saved: dict[str, Any]) -> dict[str, Any]:
        assert saved["state"][0]["exp_avg"].dtype == torch.float32
        return {"packed": saved}

    optimizer.register_state_dict_post_hook(packed)
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: saved["packed"])
    saved = optimizer.state_dict()
    assert set(saved) == {"packed"}
    optimizer.step()
    optimizer.load_state_dict(saved)
    assert optimizer.steps == 1  # type: ignore[attr-defined]


def test_grad_scaler_unscales_itself() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    convert(optimizer, torch.bfloat16)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    assert weight.tolist() == [0.0] * 3


def test_a_learning_rate_in_a_tensor() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=torch.tensor(0.25))
    convert(optimizer, torch.bfloat16)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert weight.tolist() == [0.75] * 3


class Own(torch.optim.AdamW):
    """A user's own; its step may mean anything."""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: torch.optim.Adagrad(p), "no update of its own"),
        (lambda p: Own(p), "no update of its own"),
        (lambda p: torch.optim.AdamW(p, differentiable=True), "differentiable=True"),
        (lambda p: torch.optim.AdamW([p[0].detach().double()]), "not FP32 on the CPU"),
    ],
)
def test_what_is_left_as_it_is(make: Make, reason: str) -> None:
    mine, _ = twins()
    optimizer = make(mine)
    kind = type(optimizer)
    told = convert(optimizer, torch.bfloat16)
    assert told is not None
    assert reason in told
    assert type(optimizer) is kind
