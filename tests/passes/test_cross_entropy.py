"""A linear layer and its cross entropy in pieces: the same numbers, without all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optcpu.backend import Backend
from optcpu.pipeline import Pipeline, default_passes
from passes import Canonicalize, ChunkCrossEntropy, Pass
from passes.cross_entropy import _pieces
from tests.passes.captured import (
    Run,
    assert_bf16_parity,
    assert_parity,
    error,
    operators,
    rewritten,
    run,
    step,
    traced,
)

ROWS, WIDTH, CLASSES = 24, 7, 40
QUARTER = 4 * ROWS * CLASSES // 4  # bytes of the logits of six rows
PASSES: list[Pass] = [Canonicalize(), ChunkCrossEntropy(QUARTER)]

Loss = Callable[[Tensor, Tensor], Tensor]


class Classifier(nn.Module):
    def __init__(self, loss: Loss = F.cross_entropy, *, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, CLASSES, bias=bias)
        self.loss = loss

    def forward(self, x: Tensor, target: Tensor) -> Any:
        return self.loss(self.head(torch.tanh(self.body(x))), target)


class TiedModel(nn.Module):
    """The vocabulary's weight is that of the embedding; sequences, as language models have them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(CLASSES, WIDTH)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(torch.tanh(self.tokens(tokens)), self.tokens.weight)
        return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    target[3:6] = -100
    return torch.randn(ROWS, 5, generator=generator, requires_grad=True), target


def by_sum(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="sum") / 7


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("loss", [F.cross_entropy, by_sum])
def test_parity(loss: Loss, bias: bool) -> None:
    result = assert_parity(Classifier(loss, bias=bias), *batch(), passes=PASSES)
    assert result.fired("chunk-cross-entropy") == 1


def test_parity_of_a_language_model_with_tied_weights() -> None:
    tokens = torch.randint(CLASSES, (3, 8), generator=torch.Generator().manual_seed(2))
    result = assert_parity(TiedModel(), tokens, tokens.roll(1), passes=PASSES)
    assert result.fired("chunk-cross-entropy") == 1


def test_parity_where_no_row_counts() -> None:
    x, target = batch()
    result = run(Classifier(by_sum), x, target.fill_(-100), passes=PASSES)
    assert result.fired("chunk-cross-entropy") == 1
    assert float(result.outputs[0]) == 0
    assert all(not g.any() for g in result.gradients.values() if g is not None)


def test_large_logits_do_not_overflow() -> None:
    model = Classifier()
    with torch.no_grad():
        model.head.weight.mul_(1e4)
    assert assert_parity(model, *batch(), passes=PASSES).fired("chunk-cross-entropy") == 1


def test_parity_in_bf16() -> None:
    passes = [
        ChunkCrossEntropy(QUARTER) if isinstance(one, ChunkCrossEntropy) else one
        for one in default_passes("bf16")
    ]
    batches = [(torch.randn(ROWS, 5), batch()[1]) for _ in range(3)]
    result = assert_bf16_parity(Classifier(), batches, passes=passes)
    assert result.fired("chunk-cross-entropy") == 1


def test_parity_of_generated_code() -> None:
    model, (x, target) = Classifier(), batch()
    outputs, gradients = step(model, model, x, target)
    compiled = torch.compile(model, backend=Backend(Pipeline.of(PASSES), fallback=False))
    got, got_gradients = step(compiled, model, x, target)
    assert error(got[0], outputs[0]) < 2e-6
    for name, expected in gradients.items():
        found = got_gradients[name]
        assert (found is None) == (expected is None)
        assert found is None or expected is None or error(found, expected) < 2e-5


def _logits_held(result: Run) -> int:
    """The most rows of logits that a graph holds in one tensor."""
    shapes = [
        tuple(node.meta["val"].shape)
        for graph in result.record.graphs
        if graph.kind != "joint" and graph.final is not None
        for node in graph.final.nodes
        if isinstance(node.meta.get("val"), Tensor)
    ]
    return max((s[0] for s in shapes if s[1:] == (CLASSES,) and s[0] != WIDTH), default=0)


def test_no_tensor_holds_the_logits_of_all_rows() -> None:
    assert _logits_held(run(Classifier(), *batch(), passes=PASSES)) == ROWS // 4
    assert _logits_held(run(Classifier(), *batch(), passes=PASSES[:1])) == ROWS


def test_pieces_are_done_one_after_the_other() -> None:
    result = run(
        Classifier(bias=False), *batch(), passes=[Canonicalize(), ChunkCrossEntropy(2 * QUARTER)]
    )
    names = result.operators("forward")
    first, second = (i for i, name in enumerate(names) if name == "aten.amax")
    # Of each piece the logits and both gradients, but for what the partitioner puts into the backward.
    assert names[first - 1] == names[second - 1] == "aten.mm"
    assert "aten.eq.Tensor" in names[first:second]


def test_golden_sequence_of_inference() -> None:
    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(F.log_softmax(x @ weight.t(), 1), target)

    x, weight = torch.randn(4, WIDTH), torch.randn(CLASSES, WIDTH)
    target = torch.tensor([3, -100, 0, 39])
    module = traced(loss, x, weight, target)
    assert rewritten(ChunkCrossEntropy(4 * 2 * CLASSES), module) == 1
    piece = [
        *["aten.slice.Tensor", "aten.mm", "aten.amax", "aten.sub.Tensor", "aten.exp"],
        *[
            "aten.sum.dim_IntList",
            "aten.slice.Tensor",
            "aten.gather",
            "aten.log",
            "aten.sub.Tensor",
        ],
    ]
    names = operators(module.graph)
    start = names.index("aten.slice.Tensor")
    assert names[start : start + 21] == [*piece, *piece, "aten.cat"]
    torch.testing.assert_close(module(x, weight, target), loss(x, weight, target))


def smoothed(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=0.1)


def weighted(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, weight=torch.linspace(0.5, 2, CLASSES))


def by_row(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


def with_logits(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits, target), logits


def scaled(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits / 2, target)


@pytest.mark.parametrize("loss", [smoothed, weighted, by_row, with_logits, scaled])
def test_near_miss(loss: Any) -> None:
    result = assert_parity(Classifier(loss), *batch(), passes=PASSES)
    assert result.fired("chunk-cross-entropy") == 0


def test_near_miss_a_bias_for_each_row() -> None:
    class Residual(Classifier):
        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            hidden = torch.tanh(self.body(x))
            residual = x.sum(1, keepdim=True).expand(ROWS, CLASSES)
            return F.cross_entropy(torch.addmm(residual, hidden, self.head.weight.t()), target)

    result = assert_parity(Residual(bias=False), *batch(), passes=PASSES)
    assert result.fired("chunk-cross-entropy") == 0


def test_near_miss_small_logits() -> None:
    passes = [Canonicalize(), ChunkCrossEntropy(4 * QUARTER)]
    assert run(Classifier(), *batch(), passes=passes).fired("chunk-cross-entropy") == 0


def test_near_miss_symbolic_sizes() -> None:
    result = assert_parity(Classifier(), *batch(), passes=PASSES, dynamic=True)
    assert result.fired("chunk-cross-entropy") == 0


@given(st.integers(2, 500), st.integers(2, 40))
@settings(max_examples=100)
def test_pieces_are_all_rows(rows: int, least: int) -> None:
    least = min(least, rows)
    pieces = _pieces(rows, least)
    assert [row for start, end in pieces for row in range(start, end)] == list(range(rows))
    assert max(end - start for start, end in pieces) <= -(-rows // least)
    assert len(pieces) < 2 * least
