"""Which operators are moved to BF16, and which are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import (
    BF16,
    FP32,
    assert_bf16_parity,
    error,
    name_of,
    operators,
    rewritten,
    run,
    traced,
)
from torch import Tensor, fx, nn

from passes import POLICY, InsertCasts
from passes.graph import calls, dtype

MATRIX, OTHER, BIAS = torch.randn(6, 5), torch.randn(5, 4), torch.randn(4)
BATCH, SECOND = torch.randn(2, 3, 5), torch.randn(2, 5, 4)
IMAGES, KERNEL = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
QUERY = torch.randn(2, 2, 8, 16)

MOVED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "mm": (torch.mm, (MATRIX, OTHER), "aten.mm"),
    "addmm": (torch.addmm, (BIAS, MATRIX, OTHER), "aten.addmm"),
    "addmm with factors": (
        lambda b, x, w: torch.addmm(b, x, w, beta=0.5, alpha=2),
        (BIAS, MATRIX, OTHER),
        "aten.addmm",
    ),
    "bmm": (torch.bmm, (BATCH, SECOND), "aten.bmm"),
    "baddbmm": (torch.baddbmm, (torch.randn(2, 3, 4), BATCH, SECOND), "aten.baddbmm"),
    "convolution": (F.conv2d, (IMAGES, KERNEL), "aten.convolution"),
    "convolution with bias": (F.conv2d, (IMAGES, KERNEL, BIAS), "aten.convolution"),
    "attention": (
        F.scaled_dot_product_attention,
        (QUERY, QUERY, QUERY),
        "aten._scaled_dot_product_flash_attention_for_cpu",
    ),
    "attention with mask": (
        F.scaled_dot_product_attention,
        (QUERY, QUERY, QUERY, torch.randn(8, 8)),
        "aten._scaled_dot_product_flash_attention_for_cpu",
    ),
}


@pytest.mark.parametrize("name", MOVED)
def test_moved_to_bf16(name: str) -> None:
    function, inputs, operator = MOVED[name]
    module = traced(function, *inputs)
    assert rewritten(InsertCasts(), module) == 1
    (node,) = (
        n for n in module.graph.nodes if n.op == "call_function" and name_of(n.target) == operator
    )
    assert all(dtype(a) == BF16 for a in node.args if isinstance(a, fx.Node))
    result, reference = module(*inputs), function(*inputs)
    assert result.dtype == FP32
    assert 0 < error(result, reference) < 0.02
    assert rewritten(InsertCasts(), module) == 0


LEFT_ALONE: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "FP64": (torch.mm, (MATRIX.double(), OTHER.double())),
    "integers": (torch.mm, (MATRIX.long(), OTHER.long())),
    "BF16 already": (torch.mm, (MATRIX.bfloat16(), OTHER.bfloat16())),
    "norm": (lambda x: F.layer_norm(x, (5,)), (MATRIX,)),
    "softmax and loss": (lambda x: F.cross_entropy(x, torch.tensor([0, 1, 2, 3, 4, 0])), (MATRIX,)),
    "reduction": (lambda x: x.sum(0) + x.mean(), (MATRIX,)),
    "residual": (torch.add, (MATRIX, MATRIX)),
    "matrix times vector": (torch.mv, (MATRIX, torch.randn(5))),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name: str) -> None:
    function, inputs = LEFT_ALONE[name]
    module = traced(function, *inputs)
    module.graph.eliminate_dead_code()
    before = operators(module.graph)
    assert rewritten(InsertCasts(), module) == 0
    assert operators(module.graph) == before


def test_only_the_fp32_part_of_a_mixed_model_moves() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).double() @ w.double().t()

    x, w = torch.randn(4, 5), torch.randn(5, 3)
    module = traced(function, x, w)
    assert rewritten(InsertCasts(), module) == 1
    first, second = calls(module.graph, torch.ops.aten.mm.default)
    assert (dtype(first), dtype(second)) == (BF16, torch.float64)


def test_every_rule_casts_tensors_of_its_operator() -> None:
    for rule in POLICY:
        arguments = rule.target._schema.arguments
        assert all("Tensor" in str(arguments[i].type) for i in rule.arguments), rule.target


def test_backward_of_convolution_and_attention_moves() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).flatten(2).unflatten(1, (2, 4))
            return F.scaled_dot_product_attention(y, y, y)

    result = run(Model(), torch.randn(2, 3, 6, 6, requires_grad=True), passes=[InsertCasts()])
    assert result.fired("insert-casts") == 4
    assert all(g is not None and g.dtype == FP32 for g in result.gradients.values())


def test_golden_sequence() -> None:
    module = traced(torch.addmm, BIAS, MATRIX, OTHER)
    rewritten(InsertCasts(), module)
    assert operators(module.graph) == ["cast", "cast", "cast", "aten.addmm", "cast"]


def test_parity_with_autocast() -> None:
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 8))
    batches = [(torch.randn(64, 24),) for _ in range(4)]
    assert_bf16_parity(model, batches, [InsertCasts()])


def test_hidden_mask_values_stay_finite() -> None:
    """The most negative FP32 number, as masks use it, is minus infinity when rounded to BF16."""
    mask = torch.zeros(8, 8)
    mask[3] = torch.finfo(torch.float32).min
    mask[4, :4] = torch.finfo(torch.float32).min
    inputs = (QUERY, QUERY, QUERY, mask)
    module = traced(F.scaled_dot_product_attention, *inputs)
    rewritten(InsertCasts(), module)
    reference = F.scaled_dot_product_attention(*inputs)
    assert reference.isfinite().all()
    assert error(module(*inputs), reference) < 0.02
