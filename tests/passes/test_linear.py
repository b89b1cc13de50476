"""Fused linear layers: parity with eager, exact counts, near misses, and the operators that remain."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

from passes import (
    CancelCasts,
    Canonicalize,
    FuseLinear,
    FuseLinearBackward,
    HoistDowncasts,
    InsertCasts,
    RouteProducts,
    SaveOutputsInBf16,
    SinkUpcasts,
)
from tests.passes.captured import (
    assert_bf16_parity,
    assert_parity,
    error,
    operators,
    rewritten,
    traced,
)

EXACT = (Canonicalize(), FuseLinearBackward(), FuseLinear())
IN_BF16 = (
    Canonicalize(),
    InsertCasts(),
    SinkUpcasts(),
    HoistDowncasts(),
    CancelCasts(),
    SaveOutputsInBf16(),
    FuseLinearBackward(),
    FuseLinear(),
)
NAME = "fuse-linear"

# Activation, and whether it is fused where a backward follows: ReLU and its like save their output, the
# exact GELU gains from saving its input, the others are left to generated code.
ACTIVATIONS = [
    (nn.ReLU(), True),
    (nn.Tanh(), True),
    (nn.Sigmoid(), True),
    (nn.GELU(), True),
    (nn.GELU(approximate="tanh"), False),
    (nn.SiLU(), False),
]


def two_layers(activation: nn.Module, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 20, bias=bias), activation, nn.Linear(20, 5, bias=bias))


@pytest.mark.parametrize(("activation", "fused"), ACTIVATIONS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_parity_and_count(activation: nn.Module, fused: bool, bias: bool) -> None:
    x = torch.randn(7, 12, requires_grad=True)
    run = assert_parity(two_layers(activation, bias), x, passes=EXACT)
    assert run.fired(NAME) == int(fused)


@pytest.mark.parametrize(("activation", "fused"), ACTIVATIONS, ids=str)
def test_bf16_parity_and_count(activation: nn.Module, fused: bool) -> None:
    batches = [(torch.randn(64, 12, requires_grad=True),) for _ in range(4)]
    run = assert_bf16_parity(two_layers(activation), batches, IN_BF16)
    assert run.fired(NAME) == int(fused)


@pytest.mark.parametrize(("activation", "_"), ACTIVATIONS, ids=str)
def test_every_activation_is_fused_without_gradients(activation: nn.Module, _: bool) -> None:
    model = two_layers(activation).requires_grad_(False)
    assert assert_parity(model, torch.randn(7, 12), passes=EXACT).fired(NAME) == 1


@settings(max_examples=10)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    widths=st.tuples(st.integers(1, 23), st.integers(1, 23)),
    bias=st.booleans(),
)
def test_parity_of_any_shape(shape: list[int], widths: tuple[int, int], bias: bool) -> None:
    torch._dynamo.reset()
    x = torch.randn(*shape, widths[0], requires_grad=True)
    model = nn.Sequential(nn.Linear(*widths, bias=bias), nn.ReLU())
    fired = assert_parity(model, x, passes=EXACT).fired(NAME)
    if math.prod(shape) > 1 and widths[0] > 1:  # PyTorch writes out the tiniest products itself
        assert fired == 1


def test_symbolic_sizes() -> None:
    x = torch.randn(3, 4, 12, requires_grad=True)
    assert assert_parity(two_layers(nn.ReLU()), x, passes=EXACT, dynamic=True).fired(NAME) == 1


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 12)])
def test_residual(shape: tuple[int, ...]) -> None:
    run = assert_parity(Residual(), torch.randn(*shape, requires_grad=True), passes=EXACT)
    assert run.fired(NAME) == 1
    assert "optcpu.linear_add" in run.operators("forward")


class Broadcast(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x[:1]


class PreactivationToo(Residual):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.linear(x)
        return torch.relu(h), h


class Double(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(nn.functional.linear(x.double(), self.linear.weight.double()))


class NotLinear(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x) * 2)


class Scaled(Residual):
    def forward(self, x: Tensor) -> Tensor:
        bias, weight = self.linear.bias, self.linear.weight
        return torch.relu(torch.addmm(bias, x, weight.t(), beta=0.5))


@pytest.mark.parametrize("model", [Broadcast, PreactivationToo, Double, NotLinear, Scaled])
def test_near_misses(model: type[Residual]) -> None:
    x = torch.randn(7, 12, requires_grad=True)
    fused = ("optcpu.linear", "optcpu.linear_add", "optcpu.linear_saving_input")
    forward = assert_parity(model(), x, passes=EXACT).operators("forward")
    assert [name for name in forward if name in fused] == []


def test_operators() -> None:
    x = torch.randn(7, 12, requires_grad=True)
    run = assert_parity(two_layers(nn.ReLU()), x, passes=(*EXACT, RouteProducts()))
    assert [n for n in run.operators("forward") if not n.startswith("aten.permute")] == [
        "optcpu.linear",
        "optcpu.linear",
    ]
    assert run.fired("route-products") == 1 + run.operators("backward").count("optcpu.mm")


def test_saved_input() -> None:
    x = torch.randn(7, 12, requires_grad=True)
    run = assert_parity(two_layers(nn.GELU()), x, passes=EXACT)
    assert "optcpu.linear_saving_input" in run.operators("forward")
    assert "aten.gelu" not in run.operators("forward")


aten = torch.ops.aten
M, K, N = 7, 12, 5
X, W, B = torch.randn(M, K), torch.randn(N, K), torch.randn(N)


def left_alone(function: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    """Check that nothing is fused and that the result is the same, also behind RouteProducts."""
    module = traced(function, *inputs)
    assert rewritten(FuseLinear(), module) == 0
    rewritten(RouteProducts(), module)
    torch.testing.assert_close(module(*inputs), function(*inputs), rtol=1e-5, atol=1e-5)
    return module


def test_one_bias_for_all_columns() -> None:
    module = left_alone(lambda b, x, w: torch.relu(torch.addmm(b, x, w.t())), B[:1], X, W)
    assert "aten.addmm" in operators(module.graph)


def test_a_matrix_in_place_of_the_bias() -> None:
    module = left_alone(
        lambda b, x, w: torch.relu(torch.addmm(b, x, w.t())), torch.randn(M, N), X, W
    )
    assert "aten.addmm" in operators(module.graph)


@pytest.mark.parametrize("factors", [{"beta": 2}, {"alpha": 2}])
def test_factors(factors: dict[str, int]) -> None:
    module = left_alone(lambda b, x, w: torch.relu(torch.addmm(b, x, w.t(), **factors)), B, X, W)
    assert "aten.addmm" in operators(module.graph)


@pytest.mark.parametrize(
    ("function", "residual"),
    [
        (lambda x, w, r: x[:1] @ w.t() + r, torch.randn(M, N)),  # the linear layer is repeated
        (lambda x, w, r: x @ w.t() + r, torch.randn(1, N)),  # the residual is
        (lambda x, w, r: x @ w.t() + r, torch.randn(N)),
        (lambda x, w, r: x @ w.t() + r, torch.randn(N, M).t()),  # not contiguous
        (lambda x, w, r: x @ w.t() + r, torch.randn(M, N).double()),
        (lambda x, w, r: torch.add(x @ w.t(), r, alpha=2), torch.randn(M, N)),
        (lambda x, w, r: x @ w.t() - r, torch.randn(M, N)),
    ],
)
def test_residuals_that_do_not_fit(function: Callable[..., Tensor], residual: Tensor) -> None:
    left_alone(function, X, W, residual)


def test_a_sum_with_itself() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        h = x @ w.t()
        return h + h

    left_alone(function, X, W)


def test_integers() -> None:
    left_alone(lambda x, w: torch.relu(x @ w.t()), X.long(), W.long())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
def test_operands_of_two_dtypes(dtype: torch.dtype) -> None:
    module = traced(lambda x, w: torch.relu(x @ w.t()), X, W)
    (x, _) = module.graph.find_nodes(op="placeholder")
    x.meta["val"] = x.meta["val"].to(dtype)
    assert rewritten(FuseLinear(), module) == 0
    assert rewritten(RouteProducts(), module) == 0


def test_an_unrounded_activation_that_somebody_wants() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = torch.tanh((x @ w.t()).float())
        return y.bfloat16() * y.sum()

    module = traced(function, X.bfloat16(), W.bfloat16())
    assert rewritten(FuseLinear(), module) == 0


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("activation", [torch.relu, functional.gelu, torch.sigmoid])
def test_batches_of_no_and_one_row(rows: int, activation: Callable[[Tensor], Tensor]) -> None:
    x, w = torch.randn(rows, 20), torch.randn(N, 20)
    module = traced(lambda x, w, b: activation(functional.linear(x, w, b)), x, w, B)
    assert rewritten(FuseLinear(), module) == 1
    torch.testing.assert_close(module(x, w, B), activation(functional.linear(x, w, B)))


LAYOUTS: dict[str, tuple[Tensor, Tensor, Tensor]] = {
    "transposed input": (torch.randn(K, M).t(), W, B),
    "repeated input row": (torch.randn(1, K).expand(M, K), W, B),
    "every other row": (torch.randn(2 * M, K)[::2], W, B),
    "every other column": (torch.randn(M, 2 * K)[:, ::2], W, B),
    "transposed weight": (X, torch.randn(K, N).t(), B),
    "every other column of the weight": (X, torch.randn(N, 2 * K)[:, ::2], B),
    "every other bias": (X, W, torch.randn(2 * N)[::2]),
    "repeated bias": (X, W, torch.randn(1).expand(N)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, dtype: torch.dtype) -> None:
    x, w, b = (t.to(dtype) for t in LAYOUTS[layout])
    module = traced(lambda x, w, b: torch.relu(functional.linear(x, w, b)), x, w, b)
    assert rewritten(FuseLinear(), module) == 1
    expected = torch.relu(x.float() @ w.float().t() + b.float())
    assert error(module(x, w, b), expected) < (1e-6 if dtype == torch.float32 else 5e-3)


def test_a_weight_that_is_stored_transposed() -> None:
    """As in Hugging Face's GPT-2, whose linear layer is ``addmm(bias, x, weight)``."""
    module = traced(lambda b, x, w: torch.relu(torch.addmm(b, x, w)), B, X, W.t().contiguous())
    assert rewritten(FuseLinear(), module) == 1
    assert operators(module.graph) == ["aten.permute", "optcpu.linear"]
    torch.testing.assert_close(module(B, X, W.t()), torch.relu(functional.linear(X, W, B)))


class InPlace(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.linear(x), inplace=True)


def test_in_place_activation() -> None:
    x = torch.randn(7, 12, requires_grad=True)
    assert assert_parity(InPlace(), x, passes=EXACT).fired(NAME) == 1


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters(frozen: str) -> None:
    model = two_layers(nn.ReLU())
    getattr(model[0], frozen).requires_grad_(False)
    assert assert_parity(model, torch.randn(7, 12), passes=EXACT).fired(NAME) == 1
