from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from torch import nn
from training import small_model, small_trainer

import optcpu
from optcpu import Lamb, Lookahead, Trainer
from optcpu.cpu import capabilities
from optcpu.optim import SGD, AdamW
from optcpu.runtime import Callback
from optcpu.runtime.optimizers import make_optimizer
from optcpu.runtime.options import OptimizerOptions

FP32, BF16 = torch.float32, torch.bfloat16


def test_only_the_settings_that_an_optimizer_has_arrive() -> None:
    model = nn.Linear(3, 2)
    adamw = make_optimizer(model.parameters(), OptimizerOptions(lr=0.1, betas=(0.8, 0.9)), FP32)
    assert isinstance(adamw, AdamW)
    assert adamw.defaults["betas"] == (0.8, 0.9)
    assert (
        adamw.defaults["weight_decay"]
        == torch.optim.AdamW(model.parameters()).defaults["weight_decay"]
    )
    sgd = make_optimizer(
        model.parameters(),
        OptimizerOptions(name="sgd", lr=0.1, momentum=0.5, weight_decay=0.2),
        FP32,
    )
    assert isinstance(sgd, SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.5, 0.2)


def test_lookahead_goes_around() -> None:
    options = OptimizerOptions(name="lamb", lookahead={"k": 7, "alpha": 0.25})
    optimizer = make_optimizer(nn.Linear(3, 2).parameters(), options, BF16)
    assert isinstance(optimizer, Lookahead)
    assert isinstance(optimizer.optimizer, Lamb)
    assert (optimizer.k, optimizer.alpha) == (7, 0.25)
    assert optimizer.optimizer.state_dtype == BF16


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 2).requires_grad_(False), nn.Linear(2, 1))
    (group,) = make_optimizer(model.parameters(), OptimizerOptions(), FP32).param_groups
    assert [tuple(p.shape) for p in group["params"]] == [(1, 2), (1,)]


def _state_dtype(**given: Any) -> torch.dtype:
    optimizer: Any = small_trainer(**given).optimizer
    inner = optimizer.optimizer if isinstance(optimizer, Lookahead) else optimizer
    return inner.state_dtype


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lamb"])
@pytest.mark.parametrize("lookahead", [None, {"k": 2}])
def test_the_state_is_stored_as_optimize_would_store_it(name: str, lookahead: Any) -> None:
    given = {"optimizer": {"name": name, "lookahead": lookahead}}
    usual = BF16 if capabilities().bf16 else FP32
    assert _state_dtype(compile=True, **given) == usual
    assert _state_dtype(compile=True, precision="fp32", **given) == FP32
    assert _state_dtype(compile=True, precision="fp32", state_dtype=BF16, **given) == BF16
    assert _state_dtype(compile=False, **given) == FP32
    assert _state_dtype(compile=False, state_dtype=BF16, **given) == BF16


@pytest.mark.filterwarnings("ignore:.*BF16")
def test_the_state_is_bf16_where_products_are() -> None:
    assert _state_dtype(compile=True, precision="bf16") == BF16
    assert _state_dtype(compile=True, precision="bf16", state_dtype=FP32) == FP32
    model = optcpu.optimize(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), precision="bf16")
    assert _state_dtype(model=model, compile=True) == BF16


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="state_dtype must be"):
        small_trainer(state_dtype=torch.float16)


class _Momentum(torch.optim.Optimizer):
    """Momentum in a dtype of its own, a counter, masks in a list, a few gradients, and a word."""

    def __init__(self, parameters: Any, dtype: torch.dtype) -> None:
        super().__init__(parameters, {"lr": 0.05})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter, dtype=self.dtype)
                state["count"] = torch.zeros((), dtype=torch.int64)
                state["masks"] = [torch.ones_like(parameter, dtype=torch.bool)]
                state["last"] = deque(maxlen=2)
                state["pair"] = (torch.zeros((), dtype=torch.float64), "warm")
            state["count"] += 1
            state["masks"][0] &= parameter.grad != 0
            state["last"].append(parameter.grad.double())
            state["pair"] = (state["pair"][0] + 1 / 3, state["pair"][1])
            assert state["pair"][1] == "warm"
            state["momentum"].mul_(0.9).add_(sum(state["last"]) / state["pair"][0])
            parameter.sub_(state["momentum"] * state["masks"][0] * self.param_groups[0]["lr"])


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_resumed_optimizer_keeps_the_dtypes_of_its_state(
    dtype: torch.dtype, around: bool, tmp_path: Any
) -> None:
    class Stops(Callback):
        def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            trainer.stop()

    def run(folder: str, *callbacks: Callback) -> nn.Module:
        model = small_model()
        optimizer: Any = _Momentum(model.parameters(), dtype)
        optimizer = Lookahead(optimizer, k=2) if around else optimizer
        checkpoints = {"folder": tmp_path / folder, "every_steps": 1}
        small_trainer(
            model, optimizer=optimizer, lr=None, checkpoints=checkpoints, callbacks=callbacks
        ).train()
        return model

    whole = run("whole")
    for _ in range(5):
        resumed = run("stopped", Stops())
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_optimizer_without_a_learning_rate_is_refused() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=r"a group of the SGD has no 'lr'.*give each group one"):
        small_trainer(model, optimizer=optimizer, lr=None)
