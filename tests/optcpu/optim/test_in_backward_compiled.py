"""Updates within compiled backward graphs: the same bits, no gradient left, nothing read too late."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optcpu
from optcpu.errors import OptcpuError
from optcpu.optim import SGD, AdamW, Lamb, Lookahead
from optcpu.optim.base import StoredOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:this processor has no BF16")

hands_over = pytest.mark.skipif(
    torch.__version__ < "2.9", reason="PyTorch 2.8 does not tell which gradient is whose"
)

STORAGE = {
    "fp32": {"precision": "fp32"},
    "split": {"precision": "bf16"},
    "bf16": {"precision": "bf16", "weights": "bf16"},
}
KINDS: dict[str, Callable[..., StoredOptimizer]] = {
    "adamw": lambda p: AdamW(p, lr=0.01),
    "lamb": lambda p: Lamb(p, lr=0.01),
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9),
}


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 16)
    )


class Tied(nn.Module):
    """A table that is looked up and multiplied by, and a layer that is called twice."""

    def __init__(self, rows: int = 16) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 32)
        self.layer = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.table((x.abs() * 7).long() % 16)
        hidden = self.norm(tokens + torch.tanh(self.layer(torch.tanh(self.layer(tokens)))))
        return (hidden @ self.table.weight.t()).mean(1)[:, :16]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 16),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.view(-1, 1, 4, 4))  # type: ignore[no-any-return]


class Layers(nn.Module):
    """Equal layers, for which code is generated once."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 4, 16)
        for layer in self.layers:
            x = layer(x)
        return x.reshape(-1, 16)


class Heads(nn.Module):
    """What several layers read has a sum of products for its gradient, which Inductor fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(16, 24)
        self.heads = nn.ModuleList(nn.Linear(24, 16, bias=bias) for bias in (True, False, True))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.trunk(x))
        first, second, gate = (head(hidden) for head in self.heads)
        return first + second * torch.sigmoid(gate)


class Aliased(nn.Module):
    """A buffer in the memory of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("view", self.outer.weight.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x) @ self.view))  # type: ignore[no-any-return]


class Broken(nn.Module):
    """A graph break, with the same weight on both sides of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.layer(x))
        torch._dynamo.graph_break()
        return self.layer(x)  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "tied": Tied,
    "tied-large": lambda: Tied(2**13),  # rows are added to the product
    "convolutions": Convolutions,
    "equal-layers": Layers,
    "graph-break": Broken,
    "heads": Heads,
    "aliased": Aliased,
}


def prepared(
    make: Callable[[], nn.Module] = mlp, kind: str = "adamw", **options: Any
) -> tuple[nn.Module, StoredOptimizer]:
    torch.manual_seed(1)
    model = make()
    return optcpu.optimize(model, KINDS[kind](model.parameters()), **options)


def batch(number: int, rows: int = 8) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(number))


def loss_of(model: nn.Module, number: int, rows: int = 8) -> Tensor:
    x = batch(number, rows)
    return (model(x).float() - x).square().mean()


def train(
    model: nn.Module,
    optimizer: Any,
    *,
    steps: int = 3,
    accumulation_steps: int = 1,
    rows: int = 8,
) -> list[Tensor]:
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(accumulation_steps):
            loss_of(model, 10 * step + part, rows).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@contextmanager
def updates_watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The autograd nodes in which updates are made, by name."""
    nodes: list[str] = []
    update = StoredOptimizer._update

    def watched(self: StoredOptimizer, places: list[Any]) -> None:
        node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
        nodes.extend(["none" if node is None else node.name()] * len(places))
        update(self, places)

    with monkeypatch.context() as patch:
        patch.setattr(StoredOptimizer, "_update", watched)
        yield nodes


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_as_in_step(name: str, storage: str) -> None:
    torch.set_num_threads(1)  # several add the rows of a table's gradient in any order
    model, optimizer = prepared(MODELS[name], **STORAGE[storage])
    expected = train(model, optimizer)
    torch._dynamo.reset()
    model, optimizer = prepared(MODELS[name], **STORAGE[storage])
    optimizer.update_in_backward()
    assert_same_bits(train(model, optimizer), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_every_rule_and_accumulation(kind: str, accumulation_steps: int) -> None:
    model, optimizer = prepared(kind=kind, precision="fp32")
    expected = train(model, optimizer, accumulation_steps=accumulation_steps)
    torch._dynamo.reset()
    model, optimizer = prepared(kind=kind, precision="fp32")
    optimizer.update_in_backward(accumulation_steps)
    assert_same_bits(train(model, optimizer, accumulation_steps=accumulation_steps), expected)


@pytest.mark.parametrize(
    "options", [{"activation_memory": 0.0}, {"dynamic": True}, {"layout": "none"}], ids=str
)
def test_options_of_optimize(options: dict[str, Any]) -> None:
    model, optimizer = prepared(precision="bf16", **options)
    expected = train(model, optimizer)
    torch._dynamo.reset()
    model, optimizer = prepared(precision="bf16", **options)
    optimizer.update_in_backward()
    assert_same_bits(train(model, optimizer), expected)


@hands_over
@pytest.mark.parametrize("storage", STORAGE)
def test_gradients_are_used_within_the_graph(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = prepared(**STORAGE[storage])
    optimizer.update_in_backward()
    with updates_watched(monkeypatch) as nodes:
        loss_of(model, 0).backward()
    assert nodes == ["CompiledFunctionBackward"] * 6
    assert all(parameter.grad is None for parameter in model.parameters())


PEAK = """
import re, sys, torch, optcpu
from pathlib import Path
from torch import nn
from optcpu.optim import AdamW

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(2)
model = nn.Sequential(*[layer for _ in range(5) for layer in (nn.Linear(2048, 2048), nn.ReLU())])
optimizer = AdamW(model.parameters(), lr=1e-3)
model, optimizer = optcpu.optimize(model, optimizer, precision="bf16", weights="bf16")
if sys.argv[1] == "backward":
    optimizer.update_in_backward()
for step in range(3):
    if step == 2:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
    model(torch.randn(8, 2048)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
parameters = sum(parameter.numel() for parameter in model.parameters())
print(memory("VmHWM") / parameters)
"""


@hands_over
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is told by /proc")
def test_it_takes_two_bytes_a_parameter_less() -> None:
    def peak(how: str) -> float:
        command = [sys.executable, "-W", "ignore", "-c", PEAK, how]
        runs = [
            subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(4)
        ]
        # The first compiles, which takes memory as well; what else a process does only adds to it.
        return min(float(run.stdout) for run in runs[1:])

    # A gradient that is being made is there either way: a fifth of the two bytes.
    assert peak("step") - peak("backward") > 1.0


@hands_over
def test_code_from_a_cache_hands_over_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for _ in range(2):
        torch._dynamo.reset()
        model, optimizer = prepared(precision="fp32")
        optimizer.update_in_backward()
        with updates_watched(monkeypatch) as nodes:
            results.append(train(model, optimizer))
        assert set(nodes) == {"CompiledFunctionBackward"}
    assert_same_bits(*results)


def test_it_can_begin_and_end_while_training() -> None:
    model, optimizer = prepared(precision="fp32")
    expected = train(model, optimizer, steps=3)
    torch._dynamo.reset()
    model, optimizer = prepared(precision="fp32")
    for step, begin in enumerate((False, True, False)):
        (optimizer.update_in_backward if begin else optimizer.update_in_step)()
        loss_of(model, 10 * step).backward()
        assert all((p.grad is None) == begin for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert_same_bits([p.detach() for p in model.parameters()], expected)


def test_evaluation_behind_it_compiles_nothing_anew() -> None:
    model, optimizer = prepared(precision="fp32")
    optimizer.update_in_backward()
    train(model, optimizer, steps=1)
    with torch.no_grad():
        model(batch(0))
        compiled = torch._dynamo.utils.counters["frames"]["total"]
        optimizer.update_in_step()
        model(batch(0))
    assert torch._dynamo.utils.counters["frames"]["total"] == compiled


@hands_over
def test_a_model_called_twice_is_updated_when_both_parts_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def siamese(model: nn.Module, optimizer: StoredOptimizer) -> list[Tensor]:
        for step in range(2):
            (loss_of(model, step) + loss_of(model, step + 10)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach() for parameter in model.parameters()]

    expected = siamese(*prepared(precision="fp32"))
    torch._dynamo.reset()
    model, optimizer = prepared(precision="fp32")
    optimizer.update_in_backward()
    with updates_watched(monkeypatch) as nodes:
        assert_same_bits(siamese(model, optimizer), expected)
    assert set(nodes) == {"CompiledFunctionBackward"}


@hands_over
def test_a_graph_without_a_backward_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = prepared(precision="fp32")
    optimizer.update_in_backward()
    kept = model(batch(1))  # evaluated with gradients; its backward may still come
    with updates_watched(monkeypatch) as nodes:
        loss_of(model, 0).backward()
        assert nodes == ["torch::autograd::AccumulateGrad"] * 6  # at the end of the pass
        optimizer.step()
        del kept
        nodes.clear()
        loss_of(model, 0).backward()
        assert nodes == ["CompiledFunctionBackward"] * 6


def test_other_sizes_of_batches() -> None:
    model, optimizer = prepared(precision="fp32")
    expected = [train(model, optimizer, rows=rows, steps=1) for rows in (8, 5, 8, 3)]
    torch._dynamo.reset()
    model, optimizer = prepared(precision="fp32")
    optimizer.update_in_backward()
    for rows, after in zip((8, 5, 8, 3), expected, strict=True):
        assert_same_bits(train(model, optimizer, rows=rows, steps=1), after)


@hands_over
def test_a_weight_that_is_used_outside_as_well_is_told() -> None:
    model, optimizer = prepared(precision="fp32")
    optimizer.update_in_backward()
    penalty = sum(parameter.sum() for parameter in model.parameters())
    with pytest.raises(OptcpuError, match=r"used outside of the compiled model.*update_in_step"):
        (loss_of(model, 0) + penalty).backward()


def test_with_accumulation_a_use_outside_is_counted_once() -> None:
    def penalised(model: nn.Module, optimizer: StoredOptimizer) -> list[Tensor]:
        for part in range(2):
            penalty = sum(parameter.square().sum() for parameter in model.parameters())
            (loss_of(model, part) + penalty).backward()
        optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    expected = penalised(*prepared(precision="fp32"))
    torch._dynamo.reset()
    model, optimizer = prepared(precision="fp32")
    optimizer.update_in_backward(3)
    for one, other in zip(penalised(model, optimizer), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_second_backward_is_told() -> None:
    model, optimizer = prepared(precision="fp32")
    optimizer.update_in_backward()
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@hands_over
def test_gradients_that_are_asked_for_are_refused() -> None:
    model, optimizer = prepared(precision="fp32")
    optimizer.update_in_backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(OptcpuError, match=r"autograd.grad.*update_in_step"):
        torch.autograd.grad(loss_of(model, 0), list(model.parameters()))
    assert_same_bits([p.detach() for p in model.parameters()], before)
    optimizer.update_in_step()
    gradients = torch.autograd.grad(loss_of(model, 0), list(model.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_backward_for_some_inputs_alone() -> None:
    model, optimizer = prepared(precision="fp32")
    optimizer.update_in_backward()
    first, *others = model.parameters()
    before = [parameter.detach().clone() for parameter in (first, *others)]
    loss_of(model, 0).backward(inputs=[first])
    assert not torch.equal(first, before[0])
    assert_same_bits([p.detach() for p in others], before[1:])


def test_hooks_of_parameters_see_the_gradient_first() -> None:
    def hooked(update: bool) -> list[Tensor]:
        torch._dynamo.reset()
        model, optimizer = prepared(precision="fp32")
        model[0].weight.register_hook(lambda gradient: 2 * gradient)
        if update:
            optimizer.update_in_backward()
        return train(model, optimizer)

    assert_same_bits(hooked(True), hooked(False))


@hands_over
def test_a_hook_that_comes_too_late_is_told() -> None:
    model, optimizer = prepared(precision="fp32")
    optimizer.update_in_backward()
    loss = loss_of(model, 0)
    model[0].weight.register_hook(lambda gradient: gradient)
    with pytest.raises(OptcpuError, match=r"registered .* between forward and backward"):
        loss.backward()


def test_a_parameter_of_somebody_else_keeps_its_hooks() -> None:
    model, optimizer = prepared(precision="fp32")
    optimizer.update_in_backward()
    prompt = nn.Parameter(torch.randn(8, 16))
    prompt.register_hook(lambda gradient: 2 * gradient)
    model(prompt).sum().backward()
    assert prompt.grad is not None
    plain = nn.Parameter(prompt.detach().clone())
    model, _ = prepared(precision="fp32")
    model(plain).sum().backward()
    torch.testing.assert_close(prompt.grad, 2 * plain.grad)


def test_zero_grad_begins_an_accumulation_anew() -> None:
    results = []
    for update in (False, True):
        torch._dynamo.reset()
        model, optimizer = prepared(precision="fp32")
        if update:
            optimizer.update_in_backward(3)
        loss_of(model, 9).backward()
        optimizer.zero_grad()
        results.append(train(model, optimizer, steps=1, accumulation_steps=3))
    assert_same_bits(*results)


def test_frozen_parameters_and_what_no_optimizer_has() -> None:
    model, _ = prepared(precision="fp32")
    model[0].requires_grad_(False)
    optimizer = SGD(model[2].parameters(), lr=0.1)
    optimizer.update_in_backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss_of(model, 0).backward()
    after = [parameter.detach() for parameter in model.parameters()]
    changed = [not torch.equal(*pair) for pair in zip(before, after, strict=True)]
    assert changed == [False, False, True, True, False, False]
    gradient = model[4].weight.grad
    assert gradient is not None
    loss_of(model, 0).backward(inputs=[model[4].weight])
    assert model[4].weight.grad is gradient  # added in place, in memory of its own
    optcpu.restore(model)
    copy = mlp()
    copy.load_state_dict(dict(zip(model.state_dict(), before, strict=True)))
    loss_of(copy, 0).backward()
    once = copy[4].weight.grad.clone()
    copy.zero_grad()
    copy[2].load_state_dict(model[2].state_dict())
    loss_of(copy, 0).backward()
    torch.testing.assert_close(gradient, once + copy[4].weight.grad)


def test_within_lookahead() -> None:
    results = []
    for update in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(1)
        model = mlp()
        inner = AdamW(model.parameters(), lr=0.05, state_dtype=torch.float32)
        model, optimizer = optcpu.optimize(model, Lookahead(inner, k=2), precision="fp32")
        if update:
            inner.update_in_backward()
        results.append(train(model, optimizer, steps=5))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
