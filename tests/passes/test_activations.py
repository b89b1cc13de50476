"""Activations that no fusion took are written out; outputs are saved once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captured import BF16, assert_bf16_parity, error, operators, rewritten, run, traced
from torch import Tensor, nn

from optcpu.pipeline import default_passes
from passes import (
    CancelCasts,
    Canonicalize,
    InsertCasts,
    SaveOutputsInBf16,
    SinkUpcasts,
)
from passes.activations import ACTIVATION_EXPANSIONS, expand_activations
from passes.graph import aten

FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda g, x: aten.threshold_backward(g, torch.relu(x), 0),
    "leaky threshold": lambda g, x: aten.threshold_backward(g, x, 0.25),
    "tanh": lambda g, x: aten.tanh_backward(g, torch.tanh(x)),
    "sigmoid": lambda g, x: aten.sigmoid_backward(g, torch.sigmoid(x)),
    "gelu": lambda g, x: aten.gelu_backward(g, x),
    "gelu tanh": lambda g, x: aten.gelu_backward(g, x, approximate="tanh"),
    "silu": lambda g, x: aten.silu_backward(g, x),
}
WIDE = torch.cat([torch.linspace(-30, 30, 241), torch.randn(200), torch.zeros(3)]).view(-1, 12)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORWARD)
def test_forward_formula(name: str, dtype: torch.dtype, dynamic: bool) -> None:
    x = WIDE.to(dtype)
    module = traced(FORWARD[name], x[:5], dynamic=(0,) if dynamic else ())
    if not dynamic:
        module = traced(FORWARD[name], x)
    assert expand_activations(module.graph) == 1
    module.graph.lint()
    module.recompile()
    result, reference = module(x), FORWARD[name](x)
    assert result.dtype == dtype
    _assert_close(result, reference)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BACKWARD)
def test_backward_formula(name: str, dtype: torch.dtype, dynamic: bool) -> None:
    gradient, x = torch.randn(WIDE.shape).to(dtype), WIDE.to(dtype)
    if dynamic:
        module = traced(BACKWARD[name], gradient[:5], x[:5], dynamic=(0, 1))
    else:
        module = traced(BACKWARD[name], gradient, x)
    if name == "silu" and "aten.silu_backward" not in operators(module.graph):
        pytest.skip("this version of PyTorch never traces it whole")
    assert expand_activations(module.graph) == 1
    module.graph.lint()
    module.recompile()
    result, reference = module(gradient, x), BACKWARD[name](gradient, x)
    assert result.dtype == dtype
    _assert_close(result, reference)


def _assert_close(result: Tensor, reference: Tensor) -> None:
    assert result.isfinite().all()
    ulps = 2e-7 if result.dtype == torch.float32 else 2**-8
    assert error(result, reference) < 2 * ulps
    assert torch.allclose(result.float(), reference.float(), rtol=20 * ulps, atol=20 * ulps)


def test_extreme_and_invalid_numbers() -> None:
    x = torch.tensor([[float("inf"), float("-inf"), float("nan"), 3e38, -3e38, 1e-42]])
    for name in ("relu", "tanh", "sigmoid"):
        gradient = torch.ones_like(x)
        module = traced(BACKWARD[name], gradient, x)
        expand_activations(module.graph)
        module.recompile()
        expected = BACKWARD[name](gradient, x)
        assert torch.allclose(module(gradient, x), expected, equal_nan=True), name


def test_written_out_operators_point_to_the_users_source() -> None:
    module = traced(F.silu, torch.randn(3))
    (node,) = module.graph.find_nodes(op="call_function", target=aten.silu.default)
    node.meta["stack_trace"] = "model.py, line 7"
    expand_activations(module.graph)
    calls = [n for n in module.graph.nodes if n.op == "call_function"]
    assert calls
    assert all(n.meta["stack_trace"] == "model.py, line 7" for n in calls)


def test_golden_sequence() -> None:
    module = traced(F.silu, torch.randn(3).bfloat16())
    expand_activations(module.graph)
    assert operators(module.graph) == ["cast", "aten.sigmoid", "aten.mul.Tensor", "cast"]


def test_kept_whole_reach_the_passes_and_none_is_left_for_the_code_generator() -> None:
    layers = [nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.ReLU()]
    model = nn.Sequential(*[m for layer in layers for m in (nn.Linear(6, 6), layer)])
    x = torch.randn(4, 6, requires_grad=True)
    result = run(model, x, passes=[])
    names = {str(target).removesuffix(".default") for target in ACTIVATION_EXPANSIONS}
    if torch.__version__ < "2.9":
        names.remove("aten.silu_backward")  # never traced whole
    assert names <= set(result.operators("joint"))


OUTPUTS = [InsertCasts(), SinkUpcasts(), CancelCasts(), SaveOutputsInBf16()]


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Sigmoid(), nn.ReLU()])
def test_output_is_saved_once_in_bf16(activation: nn.Module) -> None:
    """The layer norm makes the activation an FP32 one, whose BF16 copy the next layer reads."""
    model = nn.Sequential(nn.LayerNorm(6), activation, nn.Linear(6, 3))
    result = run(model, torch.randn(4, 6, requires_grad=True), passes=[Canonicalize(), *OUTPUTS])
    assert result.fired("save-outputs-in-bf16") == 1
    (backward,) = (g.initial for g in result.record.graphs if g.kind == "backward")
    assert backward is not None
    saved = [n.meta["val"] for n in backward.find_nodes(op="placeholder")]
    (activated,) = (v for v in saved if v.shape == (4, 6) and v.dtype == BF16)
    assert activated is not None


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(6, 3), nn.Tanh()),  # nobody reads a BF16 copy
        nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)),  # needs its input
    ],
)
def test_output_is_left_alone(model: nn.Module) -> None:
    result = run(model, torch.randn(4, 6), passes=OUTPUTS)
    assert result.fired("save-outputs-in-bf16") == 0


def test_saved_outputs_are_as_exact_as_autocast() -> None:
    model = nn.Sequential(
        *[nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 24), nn.Sigmoid(), nn.Linear(24, 24)],
        *[nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 4)],
    )
    batches = [(torch.randn(64, 24, requires_grad=True),) for _ in range(4)]
    result = assert_bf16_parity(model, batches, default_passes("bf16"))
    assert result.fired("save-outputs-in-bf16") == 3


def test_copies_behind_the_backward_are_not_read() -> None:
    """A BF16 copy that is made later cannot be read, whatever the order of the passes."""

    def function(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(x)
        return aten.tanh_backward(g, y), y.bfloat16()

    module = traced(function, torch.randn(3), torch.randn(3))
    assert rewritten(SaveOutputsInBf16(), module) == 0


@pytest.mark.parametrize("function", [torch.tanh, torch.sigmoid])
def test_complex_numbers_have_gradients_of_their_own(function: Callable[[Tensor], Tensor]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64) / 4)

        def forward(self, x: Tensor) -> Tensor:
            return function(x @ self.weight).abs()

    model, x = Model(), torch.randn(3, 4, dtype=torch.complex64)
    result = run(model, x, passes=default_passes("fp32"))
    model.zero_grad(set_to_none=True)
    model(x).backward(_gradient_of(result.outputs[0]))
    torch.testing.assert_close(result.gradients["weight"], model.weight.grad)


def _gradient_of(output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(output.numel()))
