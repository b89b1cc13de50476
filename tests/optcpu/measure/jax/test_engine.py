from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

pytest.importorskip("optax")
from optcpu.compare import compare
from optcpu.errors import OptcpuError
from optcpu.measure.batches import default_loss
from optcpu.measure.engine import Engine, TorchEngine, make_engine
from optcpu.measure.jax.engine import as_optax
from optcpu.measure.payload import Payload
from optcpu.measure.variants import VARIANTS, default_other_variants

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6),
    "adam": lambda p: Adam(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
}


def payload(optimizer: Callable[[Any], Optimizer]) -> Payload:
    """A small model with running statistics and a frozen layer, on batches of two shapes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8, bias=False),  # whose gradient would be rounding noise
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.Linear(8, 3),
    )
    model[3].requires_grad_(False)
    batches = [(torch.randn(size, 6), torch.randint(3, (size,))) for size in (7, 7, 5)]

    def trained(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return optimizer([p for p in parameters if p.requires_grad])

    return Payload(model.train(), batches, default_loss, trained)


def engines(optimizer: Callable[[Any], Optimizer]) -> tuple[Engine, Engine]:
    in_pytorch = TorchEngine(VARIANTS["eager-fp32"], payload(optimizer), "fp32")
    return in_pytorch, make_engine(VARIANTS["jax"], payload(optimizer), "fp32")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_follows_that_of_pytorch(name: str, accumulation: int) -> None:
    in_pytorch, in_jax = engines(OPTIMIZERS[name])
    for step in range(6):
        batches = [(step * accumulation + one) % 3 for one in range(accumulation)]
        assert in_jax.step(batches) == pytest.approx(in_pytorch.step(batches), rel=1e-4)
    expected, actual = in_pytorch.parameters(), in_jax.parameters()
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_the_first_step_shows_output_loss_and_gradients_and_changes_nothing() -> None:
    in_pytorch, in_jax = engines(OPTIMIZERS["adamw"])
    before = in_jax.parameters()
    expected, actual = in_pytorch.first_step(1), in_jax.first_step(1)
    torch.testing.assert_close(actual.output, expected.output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.loss, expected.loss)
    assert actual.gradients.keys() == expected.gradients.keys()
    torch.testing.assert_close(actual.gradients, expected.gradients, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(in_jax.parameters(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: RMSprop(p),
        lambda p: torch.optim.LBFGS(p),  # has no maximize
        lambda p: Adam(p, amsgrad=True),
        lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
        lambda p: AdamW(p, maximize=True),
        lambda p: AdamW([{"params": p[:1]}, {"params": p[1:], "lr": 0.1}]),
    ],
)
def test_optimizers_without_a_counterpart_are_refused(
    optimizer: Callable[[Any], Optimizer],
) -> None:
    parameters = list(nn.Linear(2, 2).parameters())
    with pytest.raises(OptcpuError, match="no counterpart for"):
        as_optax(optimizer(parameters))


def test_jax_takes_part_where_it_is_named_and_nowhere_else() -> None:
    assert "jax" not in {variant.name for variant in default_other_variants()[0]}
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    batch = torch.randn(32, 8), torch.randint(4, (32,))
    result = compare(
        model,
        batch,
        variants=["jax"],
        optimizer=lambda parameters: AdamW(parameters, lr=1e-2),
        precision="fp32",
        steps=10,
        rounds=1,
        round_seconds=0.01,
        progress=False,
    )
    row = next(row for row in result.rows if row.variant == "jax")
    assert row.learned
    assert row.gradient_error is not None
    assert row.gradient_error < 1e-5


def test_a_model_that_jax_cannot_run_is_told_and_the_others_are_measured() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4))
    batch = torch.randn(32, 8), torch.randint(4, (32,))
    result = compare(
        model, batch, variants=["jax"], steps=2, rounds=1, round_seconds=0.01, progress=False
    )
    row = next(row for row in result.rows if row.variant == "jax")
    assert "no dropout of 0.5" in (row.failed or "")
