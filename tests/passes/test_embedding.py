"""The gradient of an embedding, added to what is there: the same numbers, without a table of zeros."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optcpu.backend import Backend
from optcpu.optim.formats import Format
from optcpu.optim.storing import store_weights
from optcpu.pipeline import Pipeline, default_passes
from passes import AddEmbeddingGradient, Canonicalize, Pass, embedding, lower
from passes.embedding import (
    EMBEDDING_BACKWARD,
    add_in_place,
    add_rows,
    add_rows_,
    add_to_zeros,
)
from tests.passes.captured import (
    BF16,
    assert_bf16_parity,
    assert_parity,
    error,
    operators,
    rewritten,
    run,
    step,
    traced,
)

ROWS, WIDTH = 12, 8
TOKENS = torch.tensor([[0, 4, 4, 11], [4, 3, 0, 7]])
PASSES: list[Pass] = [Canonicalize(), AddEmbeddingGradient(1)]

has_bf16_gradients = pytest.mark.skipif(
    not hasattr(Tensor, "grad_dtype"), reason="this PyTorch has FP32 gradients only"
)


class Tied(nn.Module):
    def __init__(self, padding: int | None = None, *, by_frequency: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(
            ROWS, WIDTH, padding_idx=padding, scale_grad_by_freq=by_frequency
        )
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.tokens(tokens)))
        return nn.functional.linear(hidden, self.tokens.weight)


class Untied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(tokens)))  # type: ignore[no-any-return]


def bf16_passes() -> list[Pass]:
    return [
        AddEmbeddingGradient(1) if isinstance(one, AddEmbeddingGradient) else one
        for one in default_passes("bf16")
    ]


@given(
    st.lists(st.integers(0, ROWS - 1), max_size=20),
    st.integers(-1, ROWS - 1),
    st.sampled_from([torch.float32, BF16]),
    st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=60, deadline=None)
def test_rows_are_added_by_hand(
    rows: list[int], padding: int, dtype: torch.dtype, kind: torch.dtype
) -> None:
    table, values = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(len(rows), WIDTH)
    expected = table.double()
    for row, value in zip(rows, values, strict=True):
        if row != padding:
            expected[row] += value
    index = torch.tensor(rows, dtype=kind)
    before = table.clone()
    result = add_rows(table, index, values, padding)
    assert torch.equal(table, before)
    add_rows_(table, index, values, padding)
    assert torch.equal(result, table)
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    assert torch.all((result - expected).abs() <= rounding * expected.abs() + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_order_of_adding_is_always_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, values = torch.randint(50, (4096,)), torch.randn(4096, 64)
    table = torch.randn(50, 64).to(dtype)
    first = add_rows(table, rows, values, -1)
    assert all(torch.equal(add_rows(table, rows, values, -1), first) for _ in range(5))


@pytest.mark.parametrize("padding", [None, 0, 4])
def test_parity_of_a_tied_weight(padding: int | None) -> None:
    result = assert_parity(Tied(padding), TOKENS, passes=PASSES)
    assert result.fired("add-embedding-gradient") == 1
    names = result.operators("backward")
    assert names[-1] == "optcpu.add_rows"
    assert "aten.embedding_dense_backward" not in names


def test_parity_with_symbolic_sizes() -> None:
    result = assert_parity(Tied(), TOKENS, passes=PASSES, dynamic=True)
    assert result.fired("add-embedding-gradient") == 1


@pytest.mark.parametrize("model", [Tied(4), Untied()], ids=["tied", "untied"])
def test_parity_in_bf16(model: nn.Module) -> None:
    model = copy.deepcopy(model)
    store_weights(model, model.parameters(), Format.SPLIT)
    batches = [(torch.randint(ROWS, (4, 16)),) for _ in range(3)]
    result = assert_bf16_parity(model, batches, passes=bf16_passes())
    is_added_up = isinstance(model, Tied)
    assert result.fired("add-embedding-gradient") == (is_added_up or hasattr(Tensor, "grad_dtype"))


@has_bf16_gradients
def test_the_table_of_zeros_is_bf16_where_the_gradient_is() -> None:
    model = Untied()
    store_weights(model, model.parameters(), Format.SPLIT)
    result = run(model, TOKENS, passes=bf16_passes())
    (graph,) = (g.final for g in result.record.graphs if g.kind == "backward")
    assert graph is not None
    (added,) = graph.find_nodes(op="call_function", target=add_rows)
    assert added.args[0].target is torch.ops.aten.full.default
    assert added.meta["val"].dtype == BF16


@pytest.mark.parametrize("model", [Tied(4), Untied()], ids=["tied", "untied"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parity_of_generated_code(model: nn.Module, precision: Any) -> None:
    model = copy.deepcopy(model)
    if precision == "bf16":
        store_weights(model, model.parameters(), Format.SPLIT)
    passes = PASSES if precision == "fp32" else bf16_passes()
    outputs, gradients = step(model, model, TOKENS)
    compiled = torch.compile(model, backend=Backend(Pipeline.of(passes), fallback=False))
    rounding = 2e-5 if precision == "fp32" else 3e-2
    for _ in range(2):
        got, got_gradients = step(compiled, model, TOKENS)
        assert error(got[0], outputs[0]) < rounding
        for name, expected in gradients.items():
            found = got_gradients[name]
            assert found is not None
            assert expected is not None
            assert error(found, expected) < rounding, name


def test_near_miss_a_gradient_by_frequency() -> None:
    result = assert_parity(Tied(by_frequency=True), TOKENS, passes=PASSES)
    assert result.fired("add-embedding-gradient") == 0


def test_near_miss_small_tables_and_fp32_tables_of_their_own() -> None:
    small = assert_parity(Tied(), TOKENS, passes=[AddEmbeddingGradient(ROWS * WIDTH + 1)])
    assert small.fired("add-embedding-gradient") == 0
    untied = assert_parity(Untied(), TOKENS, passes=PASSES)
    assert untied.fired("add-embedding-gradient") == 0


def test_a_new_table_is_written_in_place() -> None:
    def total(x: Tensor, values: Tensor, rows: Tensor) -> Tensor:
        backward = torch.ops.aten.embedding_dense_backward(values, rows, ROWS, -1, False)
        return torch.mm(x.t(), x[:, :WIDTH]) + backward

    inputs = torch.randn(5, ROWS), torch.randn(8, WIDTH), TOKENS.flatten()
    module = traced(total, *inputs)
    assert rewritten(AddEmbeddingGradient(1), module) == 1
    assert add_in_place(module.graph) == 1
    module.recompile()
    assert operators(module.graph)[-2:] == ["aten.mm", "optcpu.add_rows_"]
    torch.testing.assert_close(module(*inputs), total(*inputs))


def test_two_lookups_are_added_to_one_table() -> None:
    class Twice(Tied):
        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.tokens(tokens) + self.tokens(tokens.flip(1))
            return nn.functional.linear(torch.tanh(hidden), self.tokens.weight)

    model = Twice()
    result = assert_parity(model, TOKENS, passes=PASSES)
    assert result.fired("add-embedding-gradient") == 2
    (graph,) = (g.final for g in result.record.graphs if g.kind == "backward")
    assert graph is not None
    assert add_in_place(graph) == 2
    _, gradients = step(model, model, TOKENS)
    compiled = torch.compile(model, backend=Backend(Pipeline.of(PASSES), fallback=False))
    _, got = step(compiled, model, TOKENS)
    torch.testing.assert_close(got, gradients)


@pytest.mark.parametrize(
    "function",
    [
        lambda table, values, rows: add_rows(table, rows, values, -1),
        lambda table, values, rows: add_rows(table[1:], rows, values, -1),
        lambda table, values, rows: (lambda t: add_rows(t, rows, values, -1) + t)(table.exp()),
    ],
    ids=["input", "view", "used again"],
)
def test_near_miss_a_table_of_others_is_copied(function: Any) -> None:
    table, values, rows = torch.randn(ROWS, WIDTH), torch.randn(3, WIDTH), torch.tensor([1, 1, 0])
    module, before = traced(function, table, values, rows), table.clone()
    assert add_in_place(module.graph) == 0
    torch.testing.assert_close(module(table, values, rows), function(table, values, rows))
    assert torch.equal(table, before)


def test_what_is_left_is_written_out() -> None:
    def backward(values: Tensor, rows: Tensor) -> Tensor:
        return EMBEDDING_BACKWARD(values, rows, ROWS, 4, False)  # type: ignore[no-any-return]

    values, rows = torch.randn(2, 4, WIDTH), TOKENS
    module = traced(backward, values, rows)
    assert operators(module.graph) == ["aten.embedding_dense_backward"]
    lower(module.graph)
    module.recompile()
    assert "aten.embedding_dense_backward" not in operators(module.graph)
    torch.testing.assert_close(module(values, rows), backward(values, rows))


def _backward(
    values: Tensor, rows: Tensor, padding: int = -1, by_frequency: bool = False
) -> Tensor:
    return EMBEDDING_BACKWARD(values, rows, ROWS, padding, by_frequency)  # type: ignore[no-any-return]


@pytest.mark.parametrize("padding", [-1, 4])
def test_a_gradient_by_itself_is_added_to_zeros(
    padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_LEAST_NUMBERS", 1)
    values, rows = torch.randn(2, 4, WIDTH), TOKENS
    module = traced(lambda values, rows: _backward(values, rows, padding), values, rows)
    assert add_to_zeros(module.graph) == 1
    assert operators(module.graph) == ["aten.full", "optcpu.add_rows_"]
    module.recompile()
    for _ in range(2):  # each time to new zeros
        torch.testing.assert_close(module(values, rows), _backward(values, rows, padding))


def test_near_misses_of_adding_to_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    values, rows = torch.randn(2, 4, WIDTH), TOKENS
    small = traced(_backward, values, rows)
    assert add_to_zeros(small.graph) == 0
    monkeypatch.setattr(embedding, "_LEAST_NUMBERS", 1)
    by_frequency = traced(lambda v, r: _backward(v, r, by_frequency=True), values, rows)
    assert add_to_zeros(by_frequency.graph) == 0
    narrow = traced(_backward, values.to(BF16), rows)
    assert add_to_zeros(narrow.graph) == 0
