"""FusedLinearReLU computes what a linear layer and a ReLU do under BF16 autocast."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optcpu
from optcpu import FusedLinearReLU


def gradients(layer: nn.Module, x: Tensor, gradient: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The result of ``layer`` and the gradients of its parameters and of the input."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    result = layer(x)
    result.backward(gradient.to(result.dtype))
    return result.detach(), [*(p.grad for p in layer.parameters()), x.grad]


class Reference(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: Tensor = super().forward(x)
        return result


@settings(max_examples=30)
@given(
    rows=st.lists(st.integers(0, 9), max_size=2),
    width=st.integers(1, 70),
    out=st.integers(1, 70),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_parity_with_autocast(
    rows: list[int], width: int, out: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(width, out, bias=bias)
    x, gradient = torch.randn(*rows, width, dtype=dtype), torch.randn(*rows, out)
    layer = FusedLinearReLU.of(copy.deepcopy(linear))
    ours, ours_gradients = gradients(layer, x, gradient)
    theirs, theirs_gradients = gradients(Reference(linear, nn.ReLU()), x, gradient)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-2, atol=1e-2)
    for one, other in zip(ours_gradients, theirs_gradients, strict=True):
        assert one is not None
        assert other is not None
        assert one.dtype == other.dtype
        torch.testing.assert_close(
            one, other, rtol=2e-2, atol=2e-2 * (float(gradient.abs().sum()) or 1)
        )


def test_it_saves_the_output_and_not_what_goes_into_the_relu() -> None:
    layer = FusedLinearReLU(32, 64)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(tuple(t.shape)) or t, lambda t: t
    ):
        layer(torch.randn(8, 32, requires_grad=True))
    assert sorted(saved) == [(8, 32), (8, 64), (64, 32)]


def test_parts_without_a_gradient() -> None:
    layer = FusedLinearReLU(8, 4)
    layer.weight.requires_grad_(False)
    x = torch.randn(3, 8)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_it_is_a_linear_layer_to_checkpoints_copies_and_pickles() -> None:
    linear = nn.Linear(6, 3)
    layer = FusedLinearReLU(6, 3)
    layer.load_state_dict(linear.state_dict())
    x = torch.randn(2, 6)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        FusedLinearReLU.of(linear),
    ):
        assert torch.equal(other(x), layer(x))
    assert FusedLinearReLU.of(linear).weight is linear.weight


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.filterwarnings("ignore:this processor has no BF16")
def test_within_an_optimized_model(precision: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(FusedLinearReLU(16, 32), nn.Linear(32, 4))
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters())
    optcpu.optimize(model, optimizer, precision=precision, fallback=False)
    x, gradient = torch.randn(8, 16), torch.randn(8, 4)
    ours, theirs = gradients(model, x, gradient), gradients(plain, x, gradient)
    torch.testing.assert_close(ours[0], theirs[0], rtol=2e-2, atol=2e-2)
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert one is not None
        torch.testing.assert_close(one.float(), other, rtol=5e-2, atol=5e-2)
    optimizer.step()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.ones(2, 5),
            ValueError,
            r"shape \(2, 5\); its last dimension must be in_features = 4",
        ),
        (torch.ones(2, 4, dtype=torch.float64), TypeError, "not torch.float64"),
        (torch.ones(2, 4, dtype=torch.int64), TypeError, "not torch.int64"),
        (torch.tensor(1.0), ValueError, "its last dimension"),
    ],
)
def test_bad_input(x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FusedLinearReLU(4, 4)(x)


def test_of_takes_a_linear_layer() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Linear, not ReLU"):
        FusedLinearReLU.of(nn.ReLU())  # type: ignore[arg-type]
