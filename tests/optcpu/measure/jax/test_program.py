from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("optax")
import jax.numpy as jnp

from optcpu.errors import OptcpuError
from optcpu.measure.jax.program import Program, to_jax, to_torch
from optcpu.models.gpt2 import gpt2_small


def mean(output: Any, batch: Any) -> Tensor:
    return output.float().mean(0).mean(0)


def test_tied_weights_are_one() -> None:
    model = gpt2_small(vocab_size=11, context_length=8, layers=1, heads=2, width=8)
    tokens = torch.randint(11, (2, 9))
    batch = tokens[:, :-1], tokens[:, 1:]

    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), batch[1].flatten())

    program = Program(model, loss, batch, jnp.float32)
    weights = {name: to_jax(parameter) for name, parameter in model.named_parameters()}
    assert "lm_head.weight" not in weights
    actual, ((output,), changed) = program(weights, [to_jax(one) for one in batch])
    torch.testing.assert_close(to_torch(output), model(batch[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(to_torch(actual), loss(model(batch[0]), batch).detach())
    assert changed == {}


def test_running_statistics_come_out_changed_as_in_pytorch() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.3), nn.BatchNorm1d(3)).train()
    batch = (torch.randn(5, 3) * 2 + 1, torch.zeros(1))
    before = {name: to_jax(tensor) for name, tensor in model.state_dict().items()}
    program = Program(model, mean, batch, jnp.float32)
    _, (_, changed) = program(before, [to_jax(one) for one in batch])
    model(batch[0])
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(
            to_torch(changed[name]).to(buffer.dtype), buffer, rtol=1e-5, atol=1e-6
        )


def test_tensors_that_the_model_holds_as_constants_are_there() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.shift = torch.tensor([1.0, -2.0])

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.shift

    model, batch = Shifted(), (torch.randn(3, 2), torch.zeros(1))
    program = Program(model, mean, batch, jnp.float32)
    weights = {name: to_jax(parameter) for name, parameter in model.named_parameters()}
    _, ((output,), _) = program(weights, [to_jax(one) for one in batch])
    torch.testing.assert_close(to_torch(output), model(batch[0]))


def test_operators_without_a_counterpart_are_named() -> None:
    class Sorts(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sort().values

    with pytest.raises(OptcpuError, match=r"no aten\.sort\.default"):
        Program(Sorts(2, 2), mean, (torch.randn(3, 2), torch.zeros(1)), jnp.float32)


def test_what_cannot_be_exported_is_told_with_the_reason() -> None:
    class Depends(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(OptcpuError, match=r"a model that torch\.export takes"):
        Program(Depends(2, 2), mean, (torch.randn(3, 2), torch.zeros(1)), jnp.float32)
