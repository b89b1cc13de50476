"""What is frozen stays what it is, bit for bit, and the compiled code knows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import optcpu
from optcpu.compiled_call import compiled_call
from optcpu.optim import SGD, Lamb, Lookahead
from optcpu.runtime.freezing.effects import compile_anew, freeze, is_compiled, synchronise, unfreeze

pytestmark = [
    pytest.mark.filterwarnings("ignore:this processor has no BF16"),
    pytest.mark.filterwarnings("ignore:NAdam keeps its own update"),
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()


def copies(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def equal(parameters: list[nn.Parameter], values: list[Tensor]) -> bool:
    return all(torch.equal(p.detach(), v) for p, v in zip(parameters, values, strict=True))


@pytest.mark.parametrize("weights", ["plain", "split", "bf16"])
@pytest.mark.parametrize("slow_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [SGD, Lamb, torch.optim.AdamW, torch.optim.NAdam])
def test_lookahead_leaves_frozen_weights_alone(
    inner: Callable[..., torch.optim.Optimizer],
    slow_dtype: torch.dtype,
    weights: str,
) -> None:
    model = network()
    optimizer = Lookahead(
        inner(model.parameters(), lr=0.05, weight_decay=0.1),
        k=3,
        pullback="pullback",
        slow_dtype=slow_dtype,
    )
    if weights != "plain":
        optcpu.optimize(model, optimizer, precision="bf16", weights=weights)
        model._compiled_call_impl = None  # eager is enough here, with weights that are stored so
    train(model, optimizer, 4)
    first = list(model[0].parameters())
    freeze(first, optimizer)
    values = copies(first)
    train(model, optimizer, 7)
    assert equal(first, values)
    assert all(p.grad is None for p in first)
    assert not any(optimizer.state.get(p) for p in first)
    with optimizer.slow_weights():
        assert equal(first, values)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 3)
    assert equal(first, values)

    unfreeze(first, optimizer)
    train(model, optimizer, 1)
    assert not equal(first, values)
    assert all(optimizer._slow[p].dtype == slow_dtype for p in first)


def test_lookahead_synchronises_before_a_freeze() -> None:
    model = network()
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1), k=10, alpha=0.5)
    slow = copies(list(model[0].parameters()))
    train(model, optimizer, 3)
    first, rest = list(model[0].parameters()), list(model[2].parameters())
    fast, others = copies(first), copies(rest)
    synchronise(first, optimizer)
    expected = [s.lerp(f, 0.5) for s, f in zip(slow, fast, strict=True)]
    assert equal(first, expected)
    assert equal(rest, others)
    assert all(torch.equal(optimizer._slow[p], e) for p, e in zip(first, expected, strict=True))


def test_the_state_of_an_optimizer_is_released_and_begins_anew() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, 3)
    first = list(model[0].parameters())
    freeze(first, optimizer)
    assert len(optimizer.state) == 4
    train(model, optimizer, 2)
    assert not set(first) & set(optimizer.state)
    unfreeze(first, optimizer)
    train(model, optimizer, 1)
    assert {int(optimizer.state[p]["step"]) for p in first} == {1}


COMPILED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "optimize": lambda model: optcpu.optimize(model, precision="fp32", passes=[]),
    "torch.compile": lambda model: torch.compile(model, backend="aot_eager"),  # type: ignore[return-value]
    "a part": lambda model: nn.Sequential(
        optcpu.optimize(model, precision="fp32", passes=[]), nn.Identity()
    ),
}


@pytest.mark.parametrize("kind", COMPILED)
def test_freezing_and_unfreezing_are_compiled(kind: str) -> None:
    model = network()
    called = COMPILED[kind](model)
    for module in called.modules():
        call = compiled_call(module)
        if call is not None:
            call.backend.codegen = False
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = list(model[0].parameters())
    assert is_compiled(called)
    train(called, optimizer, 2)
    for change in (
        lambda: freeze(first, optimizer),
        lambda: unfreeze(first, optimizer),
        lambda: freeze(first, optimizer),
    ):
        change()
        compile_anew(called)
        graphs = counters["stats"]["unique_graphs"]
        train(called, optimizer, 2)
        assert counters["stats"]["unique_graphs"] == graphs + 1
        frozen = not model[0].weight.requires_grad
        assert [p.grad is None for p in model.parameters()] == [frozen] * 2 + [False] * 4


def test_a_method_compiled_model_is_known() -> None:
    model = network()
    assert not is_compiled(model)
    model[2].compile(backend="aot_eager")
    assert is_compiled(model)
