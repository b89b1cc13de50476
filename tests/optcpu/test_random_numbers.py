"""A backward pass that computes the forward pass anew has its random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import inductor_prims
from torch.utils.checkpoint import checkpoint

import optcpu
from optcpu import backend
from optcpu.compiled_call import compiled_call
from optcpu.errors import CompileError, FallbackWarning
from optcpu.random_numbers import are_made_of_seeds, make_of_seeds


class Checkpointed(nn.Module):
    """Dropout in what is computed anew; ``weight`` is 1, so that outputs tell its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.norm = nn.LayerNorm(16, elementwise_affine=False)

    def block(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.norm(x) * self.weight, 0.4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.block, x, use_reentrant=False)
        return result


def assert_gradient_is_of_the_same_mask(model: nn.Module) -> None:
    output = model(torch.randn(64, 16))
    assert 0.3 < float((output == 0).float().mean()) < 0.5
    output.sum().backward()
    (weight,) = model.parameters()
    torch.testing.assert_close(weight.grad, output.detach().sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("codegen", [True, False])
def test_dropout_that_is_checkpointed(codegen: bool) -> None:
    model = optcpu.optimize(Checkpointed(), precision="fp32", fallback=False)
    call = compiled_call(model)
    assert call is not None
    call.backend.codegen = codegen
    assert_gradient_is_of_the_same_mask(model)


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether code for the backward, or for the forward, cannot be generated."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    which: list[bool] = []
    generate = backend.generate

    def fail(module: Any, inputs: Any, options: dict[str, Any], graph_run: Any) -> Any:
        if bool(options.get("is_backward")) in which:
            raise RuntimeError("not this one")
        return generate(module, inputs, options, graph_run)

    monkeypatch.setattr(backend, "generate", fail)
    return which


def test_where_the_forward_runs_eagerly_so_does_the_backward(failing: list[bool]) -> None:
    failing.append(False)
    model = optcpu.optimize(Checkpointed(), precision="fp32")
    with pytest.warns(FallbackWarning, match="not this one"):
        assert_gradient_is_of_the_same_mask(model)


def test_a_backward_that_would_draw_other_numbers_is_refused(failing: list[bool]) -> None:
    failing.append(True)
    model = optcpu.optimize(Checkpointed(), precision="fp32")
    with pytest.raises(CompileError, match=r"not this one.*take random operators out"):
        assert_gradient_is_of_the_same_mask(model)


def test_numbers_of_a_seed() -> None:
    graph = fx.Graph()
    seed = graph.placeholder("seed")
    drawn = [
        graph.call_function(inductor_prims.random, ((50, 40), seed, "rand")),
        graph.call_function(inductor_prims.random, ((50, 40), seed, "randn")),
        graph.call_function(inductor_prims.randint, (3, 7, (50, 40), seed)),
    ]
    graph.output(tuple(drawn))
    assert are_made_of_seeds(graph)
    make_of_seeds(graph)
    assert not are_made_of_seeds(graph)
    module = fx.GraphModule(nn.Module(), graph)
    uniform, normal, integers = module(torch.tensor(5))
    assert (uniform.dtype, normal.dtype, integers.dtype) == (
        torch.float32,
        torch.float32,
        torch.int64,
    )
    assert 0 <= float(uniform.min()) < 0.01 < 0.99 < float(uniform.max()) < 1
    assert abs(float(normal.mean())) < 0.1 > abs(float(normal.std()) - 1)
    assert set(integers.flatten().tolist()) == {3, 4, 5, 6}
    for one, again in zip((uniform, normal, integers), module(torch.tensor(5)), strict=True):
        assert torch.equal(one, again)
    assert not torch.equal(uniform, module(torch.tensor(6))[0])
