"""Indices out of range are an error before generated code reads by them, and all others change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import optcpu
from passes import CheckIndices
from passes.indices import checked_index
from tests.passes.captured import assert_parity, operators, rewritten, run, traced

TOKENS = torch.tensor([[0, 4, 2], [3, 3, 1]])


class Language(nn.Module):
    """Tokens in, positions counted by the model, labels for its own loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(5, 6), nn.Embedding(3, 6)
        self.head = nn.Linear(6, 7)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_the_operator_gives_a_copy(wraps: bool, kind: torch.dtype) -> None:
    index = TOKENS.to(kind)
    checked = checked_index(index, 5, wraps, "")
    assert torch.equal(checked, index)
    assert checked.dtype == kind
    assert checked.data_ptr() != index.data_ptr()
    assert checked_index(index[:0], 0, wraps, "").shape == (0, 3)


@pytest.mark.parametrize(
    ("wrong", "wraps", "told"),
    [
        (5, False, "index 5 is out of range in here: 0 to 4"),
        (-1, False, "index -1 is out of range in here: 0 to 4"),
        (5, True, "index 5 is out of range in here: -5 to 4"),
        (-6, True, "index -6 is out of range in here: -5 to 4"),
    ],
)
def test_the_operator_names_what_is_out_of_range(wrong: int, wraps: bool, told: str) -> None:
    with pytest.raises(IndexError, match=told):
        checked_index(torch.tensor([0, wrong, 1]), 5, wraps, " in here")


def test_embeddings_are_checked_also_of_counted_positions() -> None:
    def places(weight: Tensor, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, weight) + F.embedding(torch.arange(3), weight)

    module = traced(places, torch.randn(5, 4), TOKENS)
    assert rewritten(CheckIndices(), module) == 2
    assert operators(module.graph) == [
        *["optcpu.checked_index", "aten.embedding", "prims.iota", "optcpu.checked_index"],
        *["aten.embedding", "aten.add.Tensor"],
    ]


def test_each_number_is_looked_at_once_where_an_index_is_expanded() -> None:
    def pick(x: Tensor, index: Tensor) -> Tensor:
        return x.gather(1, index.unsqueeze(2).expand(2, 3, 1000))

    x = torch.randn(2, 5, 1000)
    module = traced(pick, x, TOKENS)
    assert rewritten(CheckIndices(), module) == 1
    assert operators(module.graph) == [
        *["optcpu.checked_index", "aten.unsqueeze", "aten.expand", "aten.gather"],
    ]
    assert torch.equal(module(x, TOKENS), pick(x, TOKENS))


@pytest.mark.parametrize("part", [lambda t: t[:, 0], lambda t: t[:, :-1]], ids=["one", "slice"])
def test_what_a_part_leaves_out_may_be_anything(part: Any) -> None:
    def look_up(weight: Tensor, columns: Tensor) -> Tensor:
        return F.embedding(part(columns), weight)

    weight, columns = torch.randn(5, 4), torch.tensor([[1, 2, 900], [4, 0, -100]])
    module = traced(look_up, weight, columns)
    assert rewritten(CheckIndices(), module) == 1
    assert torch.equal(module(weight, columns), look_up(weight, columns))
    with pytest.raises(IndexError, match="index 7 is out of range"):
        module(weight, torch.tensor([[1, 2, 0], [7, 0, 0]]))


def test_an_index_in_brackets_may_count_from_the_end() -> None:
    def pick(x: Tensor, rows: Tensor) -> Tensor:
        return x[:, rows]

    x, rows = torch.randn(4, 3), torch.tensor([-3, 2, 0])
    module = traced(pick, x, rows)
    assert rewritten(CheckIndices(), module) == 1
    assert torch.equal(module(x, rows), pick(x, rows))
    with pytest.raises(IndexError, match=r"index 3 is out of range.*-3 to 2"):
        module(x, torch.tensor([0, 3, 0]))


@pytest.mark.parametrize(
    "pick",
    [
        lambda x, index: x.gather(1, x.argsort(1)),
        lambda x, index: x[torch.arange(2)],
        lambda x, index: x.gather(1, x.topk(2, 1).indices),
    ],
    ids=["sorted", "counted", "largest"],
)
def test_near_miss_what_the_graph_computes_itself(pick: Any) -> None:
    module = traced(pick, torch.randn(2, 4), TOKENS)
    assert rewritten(CheckIndices(), module) == 0


ROWS = torch.tensor([0, 3, 1])


@pytest.mark.parametrize(
    "write",
    [
        lambda x, rows: torch.zeros_like(x).index_put((torch.arange(3), rows), x[:, 0]),
        lambda x, rows: torch.zeros(4, 4).index_add(0, rows, x),
        lambda x, rows: torch.zeros_like(x).scatter(1, rows[:, None], 2.0) * x,
        lambda x, rows: torch.zeros_like(x).scatter(1, rows[:, None], x[:, :1]),
        lambda x, rows: torch.zeros_like(x).scatter_add(1, rows[:, None].expand(-1, 2), x[:, :2]),
        lambda x, rows: x.scatter_reduce(1, rows[:, None], x[:, :1], "amax"),
        lambda x, rows: x.index_fill(1, rows, 0.0),
        lambda x, rows: torch.zeros(4, 4).index_copy(0, rows, x),
    ],
)
def test_what_is_written_at_an_index_is_checked(write: Any) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, rows: Tensor) -> Tensor:
            return write(self.layer(x), rows)

    x = torch.randn(3, 4)
    result = assert_parity(Writes(), x, ROWS, passes=[CheckIndices()])
    assert result.fired("check-indices") == 1
    assert "optcpu.checked_index" not in result.operators("backward")
    model = optcpu.optimize(Writes(), keep_memory=False, fallback=False)
    model(x, ROWS).sum().backward()
    with pytest.raises(IndexError, match="index 4 is out of range"):
        model(x, torch.tensor([0, 4, 1]))


def test_the_error_names_the_line_of_the_model_that_runs() -> None:
    """Models that differ in nothing else do not share what was compiled."""

    class ByWord(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 6))

        def forward(self, word: Tensor) -> Tensor:
            return self.table[word]

    class ByPlace(ByWord):
        def forward(self, place: Tensor) -> Tensor:
            return self.table[place]

    for kind, name in ((ByWord, "word"), (ByPlace, "place")):
        model = optcpu.optimize(kind(), keep_memory=False, fallback=False)
        with pytest.raises(IndexError, match=rf"in `return self.table\[{name}\]`"):
            model(torch.tensor([0, 5]))


def test_near_miss_a_mask_is_no_index() -> None:
    graph = fx.Graph()
    x, mask, rows = (graph.placeholder(name) for name in ("x", "mask", "rows"))
    picked = graph.call_function(torch.ops.aten.index.Tensor, (x, [mask, rows]))
    graph.output(picked)
    module = fx.GraphModule({}, graph)
    values = torch.randn(1, 3, 4), torch.ones(1, 3, dtype=torch.uint8), torch.tensor([3, 0, 9])
    for kind in (torch.bool, torch.uint8):
        for node, value in zip((x, mask, rows), values, strict=True):
            node.meta["val"] = value.to(kind) if node is mask else value
        assert rewritten(CheckIndices(), module) == 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_parity(dynamic: bool) -> None:
    result = assert_parity(
        Language(), TOKENS, torch.tensor([[0, 6, -100], [2, 2, 1]]), passes=[CheckIndices()],
        dynamic=dynamic,
    )  # fmt: skip
    assert result.fired("check-indices") == 3
    assert result.operators("forward").count("optcpu.checked_index") == 3
    assert "optcpu.checked_index" not in result.operators("backward")


def test_inference_is_checked_too() -> None:
    with torch.no_grad():
        result = run(Language(), TOKENS, TOKENS, passes=[CheckIndices()])
    assert result.operators("inference").count("optcpu.checked_index") == 3


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_goes_on_after_the_error(dynamic: bool) -> None:
    model = optcpu.optimize(Language(), keep_memory=False, dynamic=dynamic, fallback=False)
    right = model(TOKENS, TOKENS)
    with pytest.raises(IndexError, match="index 9 is out of range in Embedding 'tokens': 0 to 4"):
        model(TOKENS.masked_fill(TOKENS == 4, 9), TOKENS)
    with pytest.raises(IndexError, match=r"index 7 is out of range in .*cross_entropy.*: 0 to 6"):
        model(TOKENS, TOKENS.masked_fill(TOKENS == 4, 7))
    longer = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(IndexError, match="index 3 is out of range in Embedding 'places': 0 to 2"):
        model(longer, longer)
    assert torch.equal(model(TOKENS, TOKENS), right)
