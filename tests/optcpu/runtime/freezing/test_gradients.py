"""Gradient norms as the optimizer sees them, once a step."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from optcpu.errors import OptcpuError
from optcpu.optim import SGD, AdamW, Lookahead
from optcpu.runtime.freezing.blocks import find_blocks
from optcpu.runtime.freezing.gradients import GradientObserver, gradient_norm


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Linear(5, 2))


def observer_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, every: int = 1
) -> GradientObserver:
    blocks = find_blocks(model, list(model.parameters())).blocks
    return GradientObserver(optimizer, blocks, every)


def give(model: nn.Module, number: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, number)


def norms(model: nn.Sequential, number: float) -> list[float]:
    """Of gradients that are ``number`` everywhere."""
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    counts = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    return [abs(number) * math.sqrt(count) for count in counts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_norm_is_that_of_all_gradients_together(dtype: torch.dtype) -> None:
    parameters = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in [(40, 50), (7,), ()]]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    parameters.append(nn.Parameter(torch.randn(3)))  # has no gradient
    everything = torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None])
    tolerance = 1e-3 if dtype == torch.bfloat16 else 1e-6
    assert gradient_norm(parameters).item() == pytest.approx(
        everything.norm().item(), rel=tolerance
    )


def test_many_small_bf16_numbers_are_not_lost() -> None:
    # Added up in BF16 itself the squares would stop to count at 256.
    parameter = nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    assert gradient_norm([parameter]).item() == pytest.approx(64, rel=1e-3)


def test_nothing_has_norm_zero() -> None:
    assert gradient_norm([nn.Parameter(torch.randn(3))]).item() == 0
    assert gradient_norm([]).item() == 0


def test_sparse_gradients_count_each_row_once() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 1, 4])).sum().backward()
    assert gradient_norm(embedding.parameters()).item() == pytest.approx(math.sqrt(3 * 4 + 3 * 1))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: AdamW(p, lr=0.1),
        lambda p: Lookahead(torch.optim.SGD(p, lr=0.1), k=2),
        lambda p: Lookahead(SGD(p, lr=0.1), k=2),
    ],
    ids=["sgd", "adamw", "optcpu", "lookahead", "lookahead-optcpu"],
)
def test_each_step_of_any_optimizer_is_seen(make: object) -> None:
    model = network()
    optimizer = make(list(model.parameters()))  # type: ignore[operator]
    observer = observer_of(model, optimizer)
    for number in (1.0, -2.0, 6.0):
        give(model, number)
        optimizer.step()
        optimizer.zero_grad()
    assert (observer.steps, observer.position) == (3, 3)
    assert observer.mean_norms() == pytest.approx(norms(model, 3.0))


def test_accumulated_gradients_are_seen_once() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    observer = observer_of(model, optimizer)
    for _ in range(4):
        model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    expected = gradient_norm(model[0].parameters()).item()
    assert observer.steps == 1
    assert observer.mean_norms()[0] == pytest.approx(expected)


def test_gradients_that_the_step_itself_computes_are_seen() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = observer_of(model, optimizer)
    give(model, 100.0)  # from before: not those of the step

    def closure() -> float:
        give(model, 2.0)
        return 0.0

    optimizer.step(closure)
    optimizer.step(closure=closure)
    assert observer.mean_norms() == pytest.approx(norms(model, 2.0))


def test_looking_at_every_third_step() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = observer_of(model, optimizer, every=3)
    for number in (1.0, 50.0, 50.0, 3.0):
        give(model, number)
        optimizer.step()
    assert observer.position == 4
    assert observer.mean_norms() == pytest.approx(norms(model, 2.0))
    observer.begin_window()
    give(model, 5.0)
    optimizer.step()
    assert observer.mean_norms() == pytest.approx(norms(model, 5.0))


def test_frozen_blocks_are_not_looked_at() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = observer_of(model, optimizer)
    observer.frozen = 1
    give(model, 1.0)
    optimizer.step()
    assert observer.mean_norms() == pytest.approx([0, *norms(model, 1.0)[1:]])


def test_updates_in_backward_are_refused_also_later() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.1)
    observer = observer_of(model, optimizer)
    optimizer.update_in_backward()
    with pytest.raises(OptcpuError, match=r"optimizer.update_in_step\(\)"):
        optimizer.step()
    for wrapped in (optimizer, Lookahead(optimizer)):
        with pytest.raises(OptcpuError, match="update_in_backward"):
            observer_of(model, wrapped)
    optimizer.update_in_step()
    optimizer.step()
    assert observer.steps == 1


def test_closed_it_looks_no_more() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = observer_of(model, optimizer)
    observer.close()
    optimizer.step()
    assert observer.steps == 0


@pytest.mark.parametrize("number", [0.1, math.nan])
def test_the_state_goes_through_json_bit_for_bit(number: float) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = observer_of(model, optimizer)
    for _ in range(3):
        give(model, number)
        optimizer.step()
    state = json.loads(json.dumps(observer.state_dict(), allow_nan=False))
    other = observer_of(model, optimizer)
    other.load_state_dict(state)
    assert other.state_dict() == observer.state_dict()
    assert str(other.mean_norms()) == str(observer.mean_norms())
