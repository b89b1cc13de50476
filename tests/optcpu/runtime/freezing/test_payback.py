"""What a freeze saves and costs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import optcpu
from optcpu.runtime.freezing.blocks import find_blocks
from optcpu.runtime.freezing.payback import Costs, Payback, share_saved
from tests.families import BY_NAME


def layers(count: int = 4) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(10, 10) for _ in range(count)))


def test_half_of_the_layers_are_a_third_of_the_step() -> None:
    model = layers()
    blocks = find_blocks(model, list(model.parameters()))
    assert share_saved(blocks, 0, 2) == pytest.approx(1 / 3)
    # From 4 + 2 * 8 = 8 / 12 of the step on, another layer takes a quarter of what is left.
    assert share_saved(blocks, 2, 3) == pytest.approx(1 / 4)


def test_a_tied_embedding_leaves_the_weight_gradients_alone() -> None:
    model = BY_NAME["tied-embeddings"].build()
    blocks = find_blocks(model, list(model.parameters()))
    frozen = sum(block.work for block in blocks.blocks[:3]) / sum(b.work for b in blocks.blocks)
    assert share_saved(blocks, 0, 3) == pytest.approx(frozen / 3)


def test_a_model_without_products_saves_nothing() -> None:
    model = nn.Sequential(nn.Embedding(3, 2), nn.Embedding(3, 2))
    assert share_saved(find_blocks(model, list(model.parameters())), 0, 1) == 0


def test_what_is_gained() -> None:
    payback = Payback(compile_seconds=10, step_seconds=0.5, saved=0.25, steps=100)
    assert payback.seconds == 2.5
    assert str(payback) == (
        "100 steps of 500 ms remain, 25.0% of each would be saved: 12.5 s, for 10 s of compiling"
    )


def test_given_costs_are_taken_as_they_are() -> None:
    model = layers()
    blocks = find_blocks(model, list(model.parameters()))
    costs = Costs(model, blocks, step_seconds=0.9, compile_seconds=7)
    costs.tick(1)
    assert costs.step_seconds(0) == 0.9
    assert costs.step_seconds(2) == pytest.approx(0.6)
    assert costs.compile_seconds() == 7


def test_the_median_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 9.0, 10.0, 14.0, 20.0, 21.0])
    monkeypatch.setattr("optcpu.runtime.freezing.payback.time.perf_counter", lambda: next(times))
    model = layers()
    costs = Costs(model, find_blocks(model, list(model.parameters())), None, None)
    assert costs.step_seconds(0) == 0
    costs.tick(1)  # 9 s: compiles
    costs.tick(1)
    costs.tick(2)  # 4 s for two steps
    assert costs.step_seconds(0) == 2
    costs.restart()
    costs.tick(1)
    assert costs.step_seconds(0) == 1


def test_compiling_costs_nothing_where_nothing_is_compiled() -> None:
    model = layers()
    blocks = find_blocks(model, list(model.parameters()))
    compiled = optcpu.optimize(layers(), precision="fp32")
    compiled(torch.randn(2, 10)).sum().backward()
    assert Costs(model, blocks, None, None).compile_seconds() == 0
    # Compiled before: what the process has spent so far.
    before = Costs(compiled, blocks, None, None).compile_seconds()
    assert before > 0
    costs = Costs(compiled, blocks, None, None)
    compiled[3].requires_grad_(False)
    torch._dynamo.reset()
    compiled(torch.randn(2, 10)).sum().backward()
    assert costs.compile_seconds() > 0
