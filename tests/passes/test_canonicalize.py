"""One form for every graph, bit for bit the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from captured import assert_parity, operators, rewritten, traced
from torch import Tensor, nn

from passes import Canonicalize

CASES: dict[str, tuple[Callable[[Tensor], Tensor], list[str], int]] = {
    "view of a view": (
        lambda x: torch.relu(x.view(4, 6).view(8, 3)),
        ["aten.view", "aten.relu"],
        1,
    ),
    "view to the same shape": (lambda x: torch.relu(x.view(2, 12)), ["aten.relu"], 1),
    "view back": (lambda x: torch.relu(x.view(24).view(2, 12)), ["aten.relu"], 1),
    "permutations that cancel": (lambda x: torch.relu(x.t().t()), ["aten.relu"], 1),
    "permutations that merge": (
        lambda x: torch.relu(x.view(2, 3, 4).permute(1, 2, 0).permute(-2, 0, 2)),
        ["aten.view", "aten.permute", "aten.relu"],
        1,
    ),
    "permutation that keeps the order": (lambda x: torch.relu(x.permute(0, -1)), ["aten.relu"], 1),
    "alias": (lambda x: torch.relu(torch.ops.aten.alias(x)), ["aten.relu"], 1),
    "expand to the same shape": (lambda x: torch.relu(x.expand(2, 12)), ["aten.relu"], 1),
    "cast to the same dtype": (
        lambda x: torch.relu(torch.ops.prims.convert_element_type(x, torch.float32)),
        ["aten.relu"],
        1,
    ),
}
NEAR_MISSES: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "the result is an output": (lambda x: x.view(4, 6).view(4, 6), ["aten.view", "aten.view"]),
    "views of a tensor that is not contiguous": (
        lambda x: torch.relu(x.t().view(3, 4, 2).view(3, 2, 2, 2)),
        ["aten.permute", "aten.view", "aten.view", "aten.relu"],
    ),
    "an expansion": (
        lambda x: torch.relu(x[:1].expand(3, 12)),
        ["aten.slice.Tensor", "aten.expand", "aten.relu"],
    ),
    "a cast": (lambda x: torch.relu(x.double()), ["cast", "aten.relu"]),
    "a permutation": (lambda x: torch.relu(x.t()), ["aten.permute", "aten.relu"]),
}


@pytest.mark.parametrize("name", CASES)
def test_rewrites(name: str) -> None:
    function, expected, count = CASES[name]
    x = torch.randn(2, 12)
    module = traced(function, x)
    assert rewritten(Canonicalize(), module) == count
    assert operators(module.graph) == expected
    assert torch.equal(module(x), function(x))


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    function, expected = NEAR_MISSES[name]
    x = torch.randn(2, 12)
    module = traced(function, x)
    rewritten(Canonicalize(), module)
    assert operators(module.graph) == expected
    assert torch.equal(module(x), function(x))


def test_symbolic_sizes() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.shape[0]
        same = x.view(rows, 3, 4).view(rows, 12)
        other = x.view(rows * 3, 4).view(rows, 6, 2)
        return torch.relu(same), torch.relu(other)

    x = torch.randn(5, 12)
    module = traced(function, torch.randn(2, 12), dynamic=(0,))
    assert rewritten(Canonicalize(), module) == 2
    assert operators(module.graph).count("aten.view") == 1
    for got, expected in zip(module(x), function(x), strict=True):
        assert torch.equal(got, expected)


def test_empty_and_single_row() -> None:
    for rows in (0, 1):
        x = torch.randn(rows, 12)
        module = traced(lambda x: torch.relu(x.view(12, -1).view(x.shape).t().t()), x)
        assert rewritten(Canonicalize(), module) == 2
        assert torch.equal(module(x), torch.relu(x))


class InPlace(nn.Module):
    """In-place operators, buffers that are written, outputs that alias each other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.seen.add_(x.detach().sum(0))
        h = self.linear(x)
        h.relu_()
        return h, h.view(-1), h.t()


def test_mutation_and_aliases_survive() -> None:
    model = InPlace()
    x = torch.randn(4, 6, requires_grad=True)
    result = assert_parity(model, x, passes=[Canonicalize()])
    assert torch.allclose(model.seen, 2 * x.detach().sum(0))
    assert result.fired("canonicalize") > 0


def test_golden_sequence() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    result = assert_parity(model, torch.randn(4, 6), passes=[Canonicalize()])
    (joint,) = (g.initial for g in result.record.graphs if g.kind == "joint")
    assert joint is not None
    aliases = operators(joint).count("aten.detach") + operators(joint).count("aten.alias")
    assert aliases >= 1  # how many depends on the version of PyTorch
    assert result.fired("canonicalize") == 1 + aliases
    assert result.operators("joint") == [
        *["aten.permute", "aten.addmm", "aten.relu", "aten.permute", "aten.addmm"],
        *["aten.mm", "aten.permute", "aten.mm", "aten.permute", "aten.sum.dim_IntList"],
        *["aten.view", "aten.permute", "aten.threshold_backward", "aten.permute", "aten.mm"],
        *["aten.permute", "aten.sum.dim_IntList", "aten.view", "aten.permute"],
    ]
