from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("optax")
import jax
import jax.numpy as jnp

from optcpu.errors import OptcpuError
from optcpu.measure.jax.program import Program, to_jax, to_torch


class OfWeight(nn.Module):
    """A function of a weight, which a batch scales."""

    def __init__(self, function: Callable[[Tensor], Any], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(shape))
        self.function = function

    def forward(self, scale: Tensor) -> Any:
        return self.function(self.x * scale)


def batch_for(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """An input, and a target that is not looked at."""
    return torch.rand(shape) + 0.5, torch.zeros(1)


def weighted_sum(output: Any, batch: Any) -> Tensor:
    """A loss whose gradient differs from place to place."""
    output = output[0] if isinstance(output, tuple) else output
    places = torch.arange(output.numel()).reshape(output.shape)
    return ((places + 1) * output).mean((0, *range(1, output.dim())))


def in_both(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and gradients in PyTorch, and in JAX."""
    loss = weighted_sum(model(batch[0]), batch)
    parameters = dict(model.named_parameters())
    expected = [loss.detach(), *torch.autograd.grad(loss, list(parameters.values()))]
    program = Program(model, weighted_sum, batch, jnp.float32)
    weights = {name: to_jax(tensor) for name, tensor in model.state_dict().items()}
    inputs = [to_jax(one) for one in batch]
    trained = {name: weights[name] for name in parameters}
    actual, gradients = jax.value_and_grad(lambda own: program({**weights, **own}, inputs)[0])(
        trained
    )
    return expected, [to_torch(actual), *(to_torch(gradients[name]) for name in parameters)]


INDICES = torch.tensor([[1, 0, 3], [3, 3, 2]])
CASES: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "add with alpha": (lambda x: torch.add(x, x * x, alpha=3), (3, 4)),
    "add a number": (lambda x: x + 2.0, (3, 4)),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x * x, x + 1.0), (2, 3, 5, 4)),
    "attention, causal, scaled": (
        lambda x: F.scaled_dot_product_attention(x, x * x, x, is_causal=True, scale=0.3),
        (2, 3, 5, 4),
    ),
    "chunk, uneven": (lambda x: x.chunk(3, dim=1)[2], (2, 7)),
    "concatenation": (lambda x: torch.cat([x, x * x], dim=1), (2, 3)),
    "cross entropy": (
        lambda x: F.cross_entropy(x, torch.tensor([1, -100, 2])).reshape(1),
        (3, 4),
    ),
    "cross entropy of images": (
        lambda x: F.cross_entropy(x, torch.tensor([[1, 0], [3, 2]])).reshape(1),
        (2, 4, 2),
    ),
    "dropout of nothing": (lambda x: F.dropout(x, 0.0, training=True), (3, 4)),
    "embedding": (lambda x: F.embedding(INDICES, x), (4, 5)),
    "embedding, padded": (lambda x: F.embedding(INDICES, x, padding_idx=3), (4, 5)),
    "expand": (lambda x: x.expand(3, -1, 4), (2, 1)),
    "flatten": (lambda x: x.flatten(1, 2), (2, 3, 4, 5)),
    "gelu": (F.gelu, (3, 4)),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), (3, 4)),
    "layer norm without weights": (lambda x: F.layer_norm(x, (3, 4)), (2, 3, 4)),
    "max pool": (lambda x: F.max_pool2d(x, 3, stride=2, padding=1), (2, 3, 7, 6)),
    "max pool, no stride": (lambda x: F.max_pool2d(x, 2), (2, 3, 6, 6)),
    "mean squared error": (lambda x: F.mse_loss(x, x * x).reshape(1), (3, 4)),
    "mean": (lambda x: x.mean(dim=1), (2, 3, 4)),
    "mean, kept": (lambda x: x.mean(dim=(1, 2), keepdim=True), (2, 3, 4)),
    "pool to one": (lambda x: F.adaptive_avg_pool2d(x, 1), (2, 3, 4, 5)),
    "relu": (F.relu, (3, 4)),
    "select": (lambda x: x.select(1, -1), (2, 3, 4)),
    "sigmoid": (torch.sigmoid, (3, 4)),
    "silu": (F.silu, (3, 4)),
    "tanh": (torch.tanh, (3, 4)),
    "times": (lambda x: x * x, (3, 4)),
    "transpose": (lambda x: x.transpose(0, 2), (2, 3, 4)),
    "view": (lambda x: x.view(2, -1), (2, 3, 4)),
}

MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (2, 5, 4)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "layer norm": (lambda: nn.LayerNorm(4), (2, 5, 4)),
    "convolution": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(1, 2), groups=2),
        (2, 4, 8, 9),
    ),
    "convolution without bias": (lambda: nn.Conv2d(4, 6, 1, bias=False), (2, 4, 3, 3)),
    "batch norm": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 2)),
    "batch norm without statistics": (
        lambda: nn.BatchNorm1d(3, affine=False, track_running_stats=False),
        (4, 3),
    ),
    "lstm of two layers": (lambda: nn.LSTM(4, 3, num_layers=2, batch_first=True), (2, 5, 4)),
    "lstm without biases, time first": (lambda: nn.LSTM(4, 3, bias=False), (5, 2, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_functions_and_their_gradients_are_those_of_pytorch(case: str) -> None:
    torch.manual_seed(0)
    function, shape = CASES[case]
    expected, actual = in_both(OfWeight(function, shape), batch_for(shape))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", MODULES)
def test_modules_and_their_gradients_are_those_of_pytorch(case: str) -> None:
    torch.manual_seed(0)
    make, shape = MODULES[case]
    model = nn.Sequential(OfWeight(lambda x: x * 1.0, shape), make()).train()
    expected, actual = in_both(model, batch_for(shape))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_sign_of_the_index_of_an_embedding_without_padding_is_not_mistaken_for_one() -> None:
    shape = (4, 5)
    last = OfWeight(lambda x: F.embedding(torch.tensor([3]), x), shape)
    expected, actual = in_both(last, batch_for(shape))
    assert actual[1][3].abs().min() > 0
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("function", "shape", "what"),
    [
        (lambda x: F.dropout(x, 0.1, training=True), (3, 4), "dropout of 0.1"),
        (lambda x: F.max_pool2d(x, 2, ceil_mode=True), (1, 1, 5, 5), "ceil_mode"),
        (lambda x: F.mse_loss(x, x, reduction="sum").reshape(1), (3, 4), "another reduction"),
        (lambda x: F.adaptive_avg_pool2d(x, 2), (1, 1, 4, 4), r"pooling to \[2, 2\]"),
        (
            lambda x: F.cross_entropy(x, torch.tensor([0]), label_smoothing=0.1).reshape(1),
            (1, 3),
            "cross entropy with options",
        ),
        (
            lambda x: F.scaled_dot_product_attention(x, x, x, x),
            (1, 1, 4, 4),
            "with a mask",
        ),
    ],
)
def test_what_is_not_there_is_refused_and_not_computed_otherwise(
    function: Callable[[Tensor], Any], shape: tuple[int, ...], what: str
) -> None:
    model, batch = OfWeight(function, shape), batch_for(shape)
    program = Program(model, weighted_sum, batch, jnp.float32)
    with pytest.raises(OptcpuError, match=what):
        program({"x": to_jax(model.x)}, [to_jax(one) for one in batch])


def test_products_are_in_bf16_where_that_is_asked_for() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    batch = batch_for((3, 4))
    program = Program(model, weighted_sum, batch, jnp.bfloat16)
    weights = {name: to_jax(parameter) for name, parameter in model.named_parameters()}
    inputs = [to_jax(one) for one in batch]
    assert "preferred_element_type=bfloat16" in str(jax.make_jaxpr(program)(weights, inputs))
    (output,) = program(weights, inputs)[1][0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(to_torch(output), model(batch[0]).float(), rtol=2e-2, atol=2e-2)
