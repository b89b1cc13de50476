"""The fused backward of linear layers: parity, exact counts, near misses, operators."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import optcpu
from passes import Canonicalize, FuseLinear, FuseLinearBackward
from tests.passes.captured import (
    assert_bf16_parity,
    assert_parity,
    operators,
    rewritten,
    run,
    traced,
)

EXACT = (Canonicalize(), FuseLinearBackward(), FuseLinear())
NAME = "fuse-linear-backward"
ACTIVATIONS = [
    nn.ReLU(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.SiLU(),
]


def three_layers(activation: nn.Module, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(12, 20, bias=bias),
        activation,
        nn.Linear(20, 20, bias=bias),
        activation,
        nn.Linear(20, 5, bias=bias),
    )


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_parity_and_count(activation: nn.Module) -> None:
    x = torch.randn(7, 12, requires_grad=True)
    assert assert_parity(three_layers(activation), x, passes=EXACT).fired(NAME) == 3


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_bf16_parity(activation: nn.Module) -> None:
    batches = [(torch.randn(64, 12, requires_grad=True),) for _ in range(4)]
    result = assert_bf16_parity(three_layers(activation), batches, optcpu.default_passes("bf16"))
    assert result.fired(NAME) == 3


@settings(max_examples=10)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    widths=st.tuples(st.integers(1, 23), st.integers(1, 23), st.integers(1, 23)),
    bias=st.booleans(),
    needs_input=st.booleans(),
)
def test_parity_of_any_shape(
    shape: list[int], widths: tuple[int, int, int], bias: bool, needs_input: bool
) -> None:
    torch._dynamo.reset()
    x = torch.randn(*shape, widths[0], requires_grad=needs_input)
    model = nn.Sequential(
        nn.Linear(*widths[:2], bias=bias), nn.ReLU(), nn.Linear(*widths[1:], bias=bias)
    )
    # Without a bias and an input that wants a gradient, one product is all there is.
    expected = 1 + int(bias or needs_input)
    fired = assert_parity(model, x, passes=EXACT).fired(NAME)
    if math.prod(shape) > 1 and min(widths) > 1:  # PyTorch writes out the tiniest products itself
        assert fired == expected


def test_symbolic_sizes() -> None:
    x = torch.randn(3, 4, 12, requires_grad=True)
    result = assert_parity(three_layers(nn.ReLU()), x, passes=EXACT, dynamic=True)
    assert result.fired(NAME) == 3


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters(frozen: str) -> None:
    model = three_layers(nn.ReLU())
    getattr(model[2], frozen).requires_grad_(False)
    x = torch.randn(7, 12, requires_grad=True)
    run = assert_parity(model, x, passes=EXACT)
    assert run.fired(NAME) == (2 if frozen == "weight" else 3)


class TwoReaders(nn.Module):
    """The activation's gradient is wanted twice, so the mask cannot move into one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x) + self.second(x))


def test_a_mask_that_two_layers_need_stays_outside() -> None:
    x = torch.randn(7, 12, requires_grad=True)
    run = assert_parity(TwoReaders(), x, passes=EXACT)
    assert run.fired(NAME) >= 1
    assert "aten.threshold_backward" in run.operators("backward")


class Shared(nn.Module):
    """One weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.linear(x)))


def test_a_weight_used_twice() -> None:
    x = torch.randn(7, 12, requires_grad=True)
    assert assert_parity(Shared(), x, passes=EXACT).fired(NAME) == 2


def test_a_product_that_is_no_linear_layer_is_left_alone() -> None:
    class Product(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a.double() @ b.double()

    a, b = (torch.randn(6, 6, requires_grad=True) for _ in range(2))
    assert assert_parity(Product(), a, b, passes=EXACT).fired(NAME) == 0


def test_operators() -> None:
    x = torch.randn(7, 12, requires_grad=True)
    run = assert_parity(three_layers(nn.ReLU()), x, passes=EXACT)
    layout = ("aten.permute", "aten.view")
    interesting = [n for n in run.operators("backward") if not n.startswith(layout)]
    assert interesting == ["optcpu.linear_backward"] * 3


def test_bf16_weight_gradients_are_fp32_at_once() -> None:
    batches = [(torch.randn(64, 12, requires_grad=True),)]
    run = assert_bf16_parity(three_layers(nn.ReLU()), batches, optcpu.default_passes("bf16"))
    (backward,) = (g.final for g in run.record.graphs if g.kind == "backward")
    assert backward is not None
    fused = [n for n in backward.nodes if "linear_backward" in str(n.target)]
    assert [n.args[-1] for n in fused] == [torch.float32] * 3


aten = torch.ops.aten
G, X, W = torch.randn(7, 5), torch.randn(7, 12), torch.randn(5, 12)


def products(module: fx.GraphModule) -> tuple[int, int]:
    """How many plain and how many fused products a graph holds."""
    names = operators(module.graph)
    return names.count("aten.mm"), names.count("optcpu.linear_backward")


def rewrite(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> fx.GraphModule:
    """Run the pass and check that the results are the same."""
    module = traced(function, *inputs)
    rewritten(FuseLinearBackward(), module)
    for got, expected in zip(module(*inputs), function(*inputs), strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    return module


def test_two_layers_that_share_a_gradient_compute_each_product_once() -> None:
    def function(g: Tensor, x: Tensor, z: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return g @ w, g.t() @ x, g @ v, g.t() @ z, g.sum(0)

    module = rewrite(function, G, X, torch.randn(7, 12), W, torch.randn(5, 12))
    assert products(module) == (0, 2)
    fused = [n for n in module.graph.nodes if "linear_backward" in str(n.target)]
    first, second = ({n.args[3], n.args[5]} for n in fused)
    assert first != second  # each takes its own weight, one of them the bias


@pytest.mark.parametrize("axes", [[1], [0, 1], []])
def test_other_sums_are_no_bias_gradient(axes: list[int]) -> None:
    module = rewrite(lambda g, x: (g.t() @ x, g.sum(axes)), G, X)
    assert products(module) == (1, 0)


def test_a_sum_in_another_dtype_is_no_bias_gradient() -> None:
    module = rewrite(lambda g, x: (g.t() @ x, g.sum(0, dtype=torch.float64)), G, X)
    assert products(module) == (1, 0)
    module = rewrite(lambda g, x: (g.t() @ x, g.double().sum(0)), G, X)
    assert products(module) == (1, 0)


def test_rows_of_another_shape_are_no_bias_gradient() -> None:
    """The gradient's numbers in rows of another length."""
    g, x = torch.randn(6, 5), torch.randn(6, 12)
    module = rewrite(lambda g, x: (g.t() @ x, g.view(3, 10).sum(0)), g, x)
    assert products(module) == (1, 0)


@pytest.mark.parametrize("axes", [[0, 1], [-2, 0]])
def test_a_bias_gradient_of_higher_rank(axes: list[int]) -> None:
    def function(g: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return g.view(6, 5).t() @ x, g.sum(axes), g.sum(axes, keepdim=True)

    module = rewrite(function, torch.randn(2, 3, 5), torch.randn(6, 12))
    assert products(module) == (0, 1)
    assert operators(module.graph).count("aten.sum.dim_IntList") == 1  # the second one stays


def test_an_input_that_comes_from_the_other_product() -> None:
    """What looks like the input's gradient goes into what looks like the weight's."""

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        h = x @ w
        return x.t() @ torch.tanh(h), h

    x, w = torch.randn(7, 5), torch.randn(5, 12)
    assert products(rewrite(function, x, w)) == (2, 0)


def test_a_gram_matrix() -> None:
    assert products(rewrite(lambda x: (x.t() @ x,), X)) == (1, 0)


def test_a_product_with_itself_transposed_twice() -> None:
    """A permutation that keeps the order is no transposition."""
    square, x = torch.randn(6, 6), torch.randn(6, 6)

    def function(g: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return aten.permute(g, [0, 1]) @ x, g.sum(0)

    assert products(rewrite(function, square, x)) == (1, 0)


def test_another_threshold_stays_outside() -> None:
    def function(dy: Tensor, y: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        g = aten.threshold_backward(dy, y, 0.5)
        return g @ w, g.t() @ x, g.sum(0)

    module = rewrite(function, G, torch.randn(7, 5), X, W)
    assert products(module) == (0, 1)
    assert "aten.threshold_backward" in operators(module.graph)


def test_a_masked_gradient_that_is_an_output_stays_outside() -> None:
    def function(dy: Tensor, y: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        g = aten.threshold_backward(dy, y, 0)
        return g @ w, g.t() @ x, g.sum(0), g

    module = rewrite(function, G, torch.randn(7, 5), X, W)
    assert products(module) == (0, 1)
    assert "aten.threshold_backward" in operators(module.graph)


class BiasTwice(nn.Module):
    """The bias is used by two layers, so its gradient is a sum of two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))) + self.first.bias


def test_a_bias_used_twice() -> None:
    x = torch.randn(7, 12, requires_grad=True)
    assert assert_parity(BiasTwice(), x, passes=EXACT).fired(NAME) == 2


@pytest.mark.parametrize("rows", [0, 1])
def test_batches_of_no_and_one_row(rows: int) -> None:
    x = torch.randn(rows, 12, requires_grad=True)
    assert_parity(three_layers(nn.ReLU()), x, passes=EXACT)


def test_inference_has_no_backward_to_fuse() -> None:
    model = three_layers(nn.ReLU()).requires_grad_(False)
    assert assert_parity(model, torch.randn(7, 12), passes=EXACT).fired(NAME) == 0


class NarrowLinear(nn.Module):
    """Multiplies in BF16 by itself, and adds an FP32 bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 24))
        self.bias = nn.Parameter(torch.zeros(24))

    def forward(self, x: Tensor) -> Tensor:
        product = nn.functional.linear(x.bfloat16(), self.weight.bfloat16())
        return (product.float() + self.bias) * torch.linspace(0.1, 1.3, 24)


@pytest.mark.parametrize("rounded", [False, True])
def test_an_fp32_bias_gradient_is_rounded_only_on_demand(rounded: bool) -> None:
    model, x = NarrowLinear(), torch.randn(32, 24, requires_grad=True)
    step = FuseLinearBackward(rounded_bias=rounded)
    assert step.changes_numerics == rounded
    result = run(model, x, passes=[Canonicalize(), step])
    assert result.fired(NAME) == 1
    model.zero_grad(set_to_none=True)
    model(x).backward(_upstream(result.outputs[0]))
    got, expected = result.gradients["bias"], model.bias.grad
    assert got is not None
    assert expected is not None
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5) == (not rounded)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-1)


def _upstream(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(output.numel())
    return torch.randn(output.shape, generator=generator)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x @ (x.t() @ y),
        lambda x, y: x @ torch.relu(x.t() @ y),
        lambda x, y: (x @ y.t()) @ ((x @ y.t()).t() @ y),
    ],
)
def test_products_of_products_make_no_cycle(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.linear(function(x, y))

    x, y = torch.randn(8, 6, requires_grad=True), torch.randn(8, 6, requires_grad=True)
    assert_parity(Model(), x, y, passes=EXACT)
