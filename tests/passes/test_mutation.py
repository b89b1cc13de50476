"""What the backward wants of an input that the forward overwrites is what it was before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captured import operators, run, step
from torch import Tensor, fx, nn

import optcpu
from passes.graph import aten
from passes.mutation import save_before_overwriting


class Counting(nn.Module):
    """The loss's weight follows a counter, which the same call moves on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.exp(-self.count * 0.5)
        loss = (self.layer(x) * weight).square().mean()
        self.count += 1
        return loss


class Scaled(nn.Module):
    """A scale of each channel that follows what was seen, read through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.register_buffer("scale", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        z = torch.tanh(y.view(-1, 2, 3) * torch.exp(self.scale.clone().view(2, 3)))
        with torch.no_grad():
            self.scale.mul_(0.5).add_(y.detach().abs().mean(0))
        return z


def spectral() -> nn.Module:
    torch.manual_seed(0)
    return nn.utils.spectral_norm(nn.Linear(4, 3))


MODELS = [Counting, Scaled, spectral]


def _assert_as_eager(model: nn.Module, reference: nn.Module, x: Tensor, call: Any) -> None:
    outputs, gradients = step(call, model, x)
    expected, expected_gradients = step(reference, reference, x)
    for ours, eager in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, eager)
    assert gradients.keys() == expected_gradients.keys()
    for name, eager in expected_gradients.items():
        torch.testing.assert_close(gradients[name], eager, rtol=1e-4, atol=1e-6)
    for ours, eager in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("make", MODELS)
def test_gradients_and_buffers_are_those_of_eager(make: Any) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(5, 4, requires_grad=True)
    torch.manual_seed(0)
    reference = make()
    reference.load_state_dict(model.state_dict())
    torch._dynamo.reset()
    outcome = run(model, x, passes=[])
    expected, gradients = step(reference, reference, x)
    torch.testing.assert_close(outcome.outputs[0], expected[0])
    for name, eager in gradients.items():
        torch.testing.assert_close(outcome.gradients[name], eager, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS)
def test_so_they_are_in_generated_code_over_several_calls(make: Any) -> None:
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(0)
    reference = make()
    reference.load_state_dict(model.state_dict())
    optcpu.optimize(model, precision="fp32", fallback=False)
    for _ in range(3):
        _assert_as_eager(model, reference, torch.randn(5, 4), model)


def _graph(returned: str) -> fx.Graph:
    graph = fx.Graph()
    buffer, x = graph.placeholder("buffer"), graph.placeholder("x")
    for node in (buffer, x):
        node.meta["val"] = torch.empty(6)
    view = graph.call_function(aten.view.default, (buffer, [2, 3]))
    view.meta["val"] = torch.empty(2, 3)
    new = graph.call_function(aten.add.Tensor, (buffer, 1))
    new.meta["val"] = torch.empty(6)
    copied = graph.call_function(aten.copy_.default, (buffer, new))
    copied.meta["val"] = torch.empty(6)
    graph.output(({"buffer": buffer, "view": view, "x": x, "new": new}[returned], x))
    return graph


@pytest.mark.parametrize("returned", ["buffer", "view"])
def test_an_input_is_copied_before_it_is_overwritten(returned: str) -> None:
    graph = _graph(returned)
    assert save_before_overwriting(graph) == 1
    graph.lint()
    assert operators(graph) == ["aten.view", "aten.add.Tensor", "aten.clone", "aten.copy_"]
    buffer = torch.arange(6.0)
    before = buffer.clone()
    saved, _ = fx.GraphModule(nn.Module(), graph)(buffer, torch.ones(6))
    assert torch.equal(saved.view(6), before)
    assert torch.equal(buffer, before + 1)


@pytest.mark.parametrize("returned", ["x", "new"])
def test_near_misses(returned: str) -> None:
    assert save_before_overwriting(_graph(returned)) == 0


def test_batch_norm_copies_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    outcome = run(model, torch.randn(2, 2, 5, 5), passes=[])
    assert "aten.clone" not in outcome.operators("forward")
