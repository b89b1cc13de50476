"""Casts that are moved, cancelled and shared; every number stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captured import BF16, FP32, assert_parity, operators, rewritten, run, traced
from torch import Tensor, nn

from optcpu.backend import Backend
from optcpu.pipeline import Pipeline, default_passes
from passes import (
    CancelCasts,
    Canonicalize,
    HoistDowncasts,
    InsertCasts,
    ShareWeightCasts,
    SinkUpcasts,
)
from passes.casts import cast_counts


def _same(module: Any, function: Callable[..., Any], *inputs: Tensor) -> bool:
    results, references = module(*inputs), function(*inputs)
    if isinstance(references, Tensor):
        results, references = (results,), (references,)
    return all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(results, references, strict=True)
    )


X = torch.randn(4, 6).bfloat16()

SUNK: dict[str, tuple[Callable[[Tensor], Any], list[str], int]] = {
    "relu": (lambda x: torch.relu(x.float()), ["aten.relu", "cast"], 1),
    "permute": (lambda x: x.float().t(), ["aten.permute", "cast"], 1),
    "a chain": (
        lambda x: torch.relu(x.float().t().contiguous()[1:].unsqueeze(0).expand(2, 5, 4)),
        [
            *["aten.permute", "aten.clone", "aten.slice.Tensor", "aten.unsqueeze"],
            *["aten.expand", "aten.relu", "cast"],
        ],
        6,
    ),
    "comparison with zero": (lambda x: x.float() > 0, ["aten.gt.Scalar"], 1),
    "mask of relu": (
        lambda x: torch.ops.aten.threshold_backward(x.float(), x.float(), 0),
        ["aten.threshold_backward", "cast"],
        1,
    ),
    "selection": (lambda x: x.float().select(0, 2), ["aten.select.int", "cast"], 1),
    "the FP32 value is used as well": (
        lambda x: (torch.relu(x.float()), x.float().exp()),
        ["aten.relu", "cast", "cast", "aten.exp"],
        1,
    ),
}


@pytest.mark.parametrize("name", SUNK)
def test_sink_upcasts(name: str) -> None:
    function, expected, count = SUNK[name]
    module = traced(function, X)
    assert rewritten(SinkUpcasts(), module) == count
    assert operators(module.graph) == expected
    assert _same(module, function, X)


STAY: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: x.float() * 3,
    "comparison with a number that BF16 lacks": lambda x: x.float() > 0.1,
    "threshold that BF16 lacks": lambda x: torch.ops.aten.threshold_backward(
        x.float(), x.float(), 0.1
    ),
    "mask from an FP32 tensor": lambda x: torch.ops.aten.threshold_backward(
        x.float(), x.float().exp(), 0
    ),
    "FP64": lambda x: torch.relu(x.double()),
    "sum": lambda x: x.float().sum(0),
    "FP16": lambda x: torch.relu(x.half().float()),
}


@pytest.mark.parametrize("name", STAY)
def test_upcasts_that_stay(name: str) -> None:
    function = STAY[name]
    module = traced(function, X)
    before = operators(module.graph)
    assert rewritten(SinkUpcasts(), module) == 0
    assert operators(module.graph) == before


W = torch.randn(6, 4)

HOISTED: dict[str, tuple[Callable[[Tensor], Any], list[str], int]] = {
    "permute": (lambda w: w.t().bfloat16(), ["cast", "aten.permute"], 1),
    "view behind permute": (
        lambda w: w.view(2, 3, 4).permute(2, 0, 1).bfloat16(),
        ["cast", "aten.view", "aten.permute"],
        2,
    ),
    "the FP32 value is used as well": (
        lambda w: (w.t().bfloat16(), w.t().exp()),
        ["cast", "aten.permute", "aten.permute", "aten.exp"],
        1,
    ),
}


@pytest.mark.parametrize("name", HOISTED)
def test_hoist_downcasts(name: str) -> None:
    function, expected, count = HOISTED[name]
    module = traced(function, W)
    assert rewritten(HoistDowncasts(), module) == count
    assert operators(module.graph) == expected
    assert _same(module, function, W)


@pytest.mark.parametrize(
    "function",
    [
        lambda w: w[:2].bfloat16(),  # would convert rows that nobody reads
        lambda w: w.expand(3, 6, 4).bfloat16(),
        lambda w: w.t().double(),
        lambda w: w.exp().bfloat16(),
    ],
)
def test_downcasts_that_stay(function: Callable[[Tensor], Tensor]) -> None:
    module = traced(function, W)
    assert rewritten(HoistDowncasts(), module) == 0
    assert _same(module, function, W)


def test_cancel_pairs_and_share_equal_casts() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return x.float().bfloat16() @ w.bfloat16(), w.bfloat16().exp()

    x, w = X, torch.randn(6, 3)
    module = traced(function, x, w)
    assert rewritten(CancelCasts(), module) == 2
    assert operators(module.graph) == ["cast", "aten.mm", "aten.exp"]
    assert cast_counts(module.graph) == {"to bf16": 1, "to fp32": 0}
    assert _same(module, function, x, w)


@pytest.mark.parametrize(
    "function",
    [
        lambda w: torch.relu(w.bfloat16().float()),  # rounds
        lambda w: torch.relu(w.half().bfloat16()),
        lambda w: torch.relu(w.bfloat16()) + torch.relu(w.half()),
        lambda w: w.bfloat16().float().bfloat16(),  # the second cast is what the caller gets
    ],
)
def test_casts_that_do_not_cancel(function: Callable[[Tensor], Tensor]) -> None:
    module = traced(function, W)
    before = operators(module.graph)
    assert rewritten(CancelCasts(), module) == 0
    assert operators(module.graph) == before


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


CASTS = [
    Canonicalize(),
    InsertCasts(),
    SinkUpcasts(),
    HoistDowncasts(),
    CancelCasts(),
    ShareWeightCasts(),
]


def test_weight_casts_are_kept_for_the_backward() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    kept = run(_model(), x, passes=CASTS)
    assert kept.fired("share-weight-casts") == 3  # both weights, and the input
    (backward,) = (g.initial for g in kept.record.graphs if g.kind == "backward")
    assert backward is not None
    saved = [n.meta["val"].dtype for n in backward.find_nodes(op="placeholder")]
    assert saved == [*[BF16] * 4, FP32]  # x, w1, relu, w2; the gradient of the output


def test_nothing_is_kept_without_a_backward() -> None:
    model = _model().requires_grad_(False)
    result = run(model, torch.randn(4, 6), passes=CASTS)
    assert [g.kind for g in result.record.graphs] == ["joint", "inference"]
    assert result.fired("share-weight-casts") == 0
    assert result.operators("inference").count("cast") == 6  # x, two weights, two biases, result


def test_golden_sequences() -> None:
    result = run(_model(), torch.randn(4, 6), passes=CASTS)
    assert result.operators("forward") == [
        *["cast", "cast", "cast", "aten.permute", "aten.addmm", "aten.relu"],
        *["cast", "cast", "aten.permute", "aten.addmm", "cast"],
    ]
    assert result.operators("backward") == [
        *["cast", "aten.mm", "aten.permute", "aten.mm", "aten.sum.dim_IntList", "aten.view"],
        *["cast", "aten.threshold_backward", "cast", "aten.permute", "aten.mm"],
        *["aten.sum.dim_IntList", "aten.view", "cast"],
    ]


def test_exact_passes_leave_an_fp32_model_alone() -> None:
    exact = [SinkUpcasts(), HoistDowncasts(), CancelCasts(), ShareWeightCasts()]
    result = assert_parity(_model(), torch.randn(4, 6, requires_grad=True), passes=exact)
    assert set(result.record.counts().values()) == {0}


def test_exact_passes_keep_every_bit_of_a_bf16_model() -> None:
    model, x = _model(), torch.randn(4, 6)
    plain = run(model, x, passes=[Canonicalize(), InsertCasts()])
    torch._dynamo.reset()
    moved = run(model, x, passes=CASTS)
    assert torch.equal(plain.outputs[0], moved.outputs[0])
    for name, gradient in plain.gradients.items():
        other = moved.gradients[name]
        assert gradient is not None
        assert other is not None
        assert torch.equal(gradient, other), name


class Copies(nn.Module):
    """Hands out copies that look alike; the caller may write to each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        wide = x.to(torch.float32, copy=True).view(-1)
        weight = self.linear.weight.detach().to(torch.float32, copy=True).view(-1)
        y = self.linear(x)
        narrow = x.bfloat16()
        return wide, weight, narrow, x.t().bfloat16(), x.bfloat16().view(-1), narrow.float(), y


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_copies_given_to_the_caller_stay_copies(precision: str) -> None:
    model, x = Copies(), torch.ones(4, 4)
    before = model.linear.weight.detach().clone()
    backend = Backend(Pipeline.of(default_passes(precision)), codegen=False)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = model(x)
        results = torch.compile(model, backend=backend)(x)
        for result, reference in zip(results[:-1], expected[:-1], strict=True):
            assert torch.equal(result, reference)
            result.zero_()
    assert torch.equal(x, torch.ones(4, 4))
    assert torch.equal(model.linear.weight, before)


def test_casts_of_which_one_escapes_are_shared() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.bfloat16().view(-1), torch.neg(x.bfloat16())

    module = traced(function, torch.randn(3, 4))
    assert rewritten(CancelCasts(), module) == 1
    assert operators(module.graph).count("cast") == 1
