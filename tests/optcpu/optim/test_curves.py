"""Training with BF16 state and stored weights ends where training in FP32 does, over five seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optcpu.data import digits
from optcpu.optim import SGD, AdamW, Lamb
from optcpu.optim.formats import Format
from optcpu.optim.storing import store_weights

SEEDS = range(5)
EPOCHS = 6

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], torch.dtype], torch.optim.Optimizer]] = {
    "adamw": lambda p, dtype: AdamW(p, lr=2e-3, state_dtype=dtype),
    "lamb": lambda p, dtype: Lamb(p, lr=1e-2, state_dtype=dtype),
    "sgd": lambda p, dtype: SGD(p, lr=0.1, momentum=0.9, state_dtype=dtype),
}
STORAGE = {"fp32": None, "bf16": Format.STOCHASTIC}  # split weights lose nothing


def trained(name: str, seed: int, state_dtype: torch.dtype, format: Format | None) -> list[float]:
    """The validation loss after every epoch."""
    torch.manual_seed(seed)
    data = digits()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    if format is not None:
        store_weights(model, model.parameters(), format)
    optimizer = OPTIMIZERS[name](list(model.parameters()), state_dtype)
    losses = []
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data.train[0])).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(data.train[0][batch]), data.train[1][batch]).backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(float(F.cross_entropy(model(data.test[0]), data.test[1])))
    return losses


def means(curves: list[list[float]]) -> Tensor:
    return torch.tensor(curves).mean(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("weights", STORAGE)
def test_curves_agree_within_the_noise_of_seeds(name: str, weights: str) -> None:
    exact = [trained(name, seed, torch.float32, None) for seed in SEEDS]
    ours = [trained(name, seed, torch.bfloat16, STORAGE[weights]) for seed in SEEDS]
    assert means(exact)[-1] < 0.3, "the task is learnt"
    for epoch in range(EPOCHS):
        noise = statistics.stdev(curve[epoch] for curve in exact)
        difference = float((means(ours) - means(exact))[epoch].abs())
        assert difference < 2 * noise + 0.01 * float(means(exact)[epoch])
