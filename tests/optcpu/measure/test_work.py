"""The work of a step, counted by hand for small models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import optcpu
from optcpu.measure.roofline import Limits
from optcpu.measure.work import Work, flop_counter, ideal_step, state_values


def flops(module: nn.Module, *inputs: Tensor) -> int:
    with flop_counter() as counted:
        output = module(*inputs)
        (output[0] if isinstance(output, tuple) else output).sum().backward()
    return int(counted.get_total_flops())


def test_a_linear_layer_has_two_products_backward() -> None:
    x = torch.randn(5, 7, requires_grad=True)
    assert flops(nn.Linear(7, 3), x) == 3 * 2 * 5 * 7 * 3


def test_the_input_needs_no_gradient() -> None:
    assert flops(nn.Linear(7, 3), torch.randn(5, 7)) == 2 * 2 * 5 * 7 * 3


def test_a_convolution() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    assert flops(nn.Conv2d(3, 4, 3), x) == 3 * 2 * (2 * 4 * 6 * 6) * (3 * 3 * 3)


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("keys", [16, 24])
def test_attention(keys: int) -> None:
    """Two products forward; backward four, and the scores anew."""
    q = torch.randn(2, 4, 16, 8, requires_grad=True)
    k, v = (torch.randn(2, 4, keys, 8, requires_grad=True) for _ in range(2))
    assert flops(Attention(), q, k, v) == (2 + 5) * 2 * (2 * 4) * 16 * keys * 8


def test_an_lstm() -> None:
    """Four gates, each with a product of the input and one of the state."""
    lstm = nn.LSTM(16, 32, num_layers=2, bidirectional=True)
    layers = 16 + 32, 2 * 32 + 32
    expected = sum(3 * 2 * (5 * 3) * (4 * 32) * width * 2 for width in layers)
    assert flops(lstm, torch.randn(5, 3, 16)) == expected


@pytest.mark.parametrize(
    ("make", "per_value"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
        (lambda p: torch.optim.AdamW(p), 2),
    ],
)
def test_state_values(make: type[torch.optim.Optimizer], per_value: int) -> None:
    model = nn.Linear(7, 3)
    optimizer = make(model.parameters())
    model(torch.randn(5, 7)).sum().backward()
    optimizer.step()
    assert state_values(optimizer, model.parameters()) == per_value * (7 * 3 + 3)


def test_bytes_of_an_update() -> None:
    """AdamW reads 4 and writes 3 numbers a value."""
    work = Work(flops=0, values_updated=10, state_values=20)
    assert work.update_bytes("fp32") == 10 * 28
    assert work.update_bytes("bf16") == 10 * 14


def test_the_ideal_step() -> None:
    limits = Limits(2, {"fp32": {"aten": 200e9, "onednn": 100e9}}, 28e9, None, None)
    work = Work(flops=2e9, values_updated=10_000_000, state_values=20_000_000)
    ideal = ideal_step(work, limits, "fp32", batches=4)
    assert ideal.library == "aten"
    assert ideal.product_ms == pytest.approx(40)
    assert ideal.update_ms == pytest.approx(10)
    assert ideal.step_ms == pytest.approx(50)


def test_the_graphs_of_a_model_have_the_work_of_its_step() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))
    x = torch.randn(2, 1, 8, 8)
    graphs = {graph.kind: graph.flops for graph in optcpu.inspect(model, x).graphs}
    assert graphs["joint"] == graphs["forward"] + graphs["backward"] == flops(model, x)
