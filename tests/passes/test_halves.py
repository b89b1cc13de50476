"""Products read the upper half of a split weight; what needs the whole weight gets every bit of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from optcpu.backend import Backend
from optcpu.optim.formats import Format, split
from optcpu.optim.storing import store_weights
from optcpu.pipeline import Pipeline, default_passes
from passes import GradientsInBf16, ReadUpperHalves
from passes.halves import joined
from tests.passes.captured import (
    BF16,
    FP32,
    assert_bf16_parity,
    assert_parity,
    operators,
    rewritten,
    run,
    step,
    traced,
)

has_bf16_gradients = pytest.mark.skipif(
    not hasattr(Tensor, "grad_dtype"), reason="this PyTorch has FP32 gradients only"
)
HIGH, LOW = split(torch.randn(6, 4))


def test_a_cast_reads_the_upper_half() -> None:
    module = traced(lambda high, low: joined(high, low).to(BF16).t(), HIGH, LOW)
    assert operators(module.graph) == ["optcpu.join", "cast", "aten.permute"]
    assert rewritten(ReadUpperHalves(), module) == 1
    assert operators(module.graph) == ["aten.permute"]
    assert torch.equal(module(HIGH, LOW), HIGH.t())


def test_the_whole_number_is_put_together_in_the_graph() -> None:
    def both(high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        weight = joined(high, low)
        return weight.to(BF16), weight.exp()

    module = traced(both, HIGH, LOW)
    assert rewritten(ReadUpperHalves(), module) == 1
    assert operators(module.graph) == [
        *["aten.view.dtype", "cast", "aten.bitwise_left_shift.Tensor_Scalar", "cast"],
        *["aten.add.Tensor", "aten.view.dtype", "aten.exp"],
    ]
    high, exponential = module(HIGH, LOW)
    assert torch.equal(high, HIGH)
    assert torch.equal(exponential, joined(HIGH, LOW).exp())


def test_near_miss_another_cast_is_no_upper_half() -> None:
    module = traced(lambda high, low: joined(high, low).to(torch.float16), HIGH, LOW)
    assert rewritten(ReadUpperHalves(), module) == 0
    assert "optcpu.join" not in operators(module.graph)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.LayerNorm(20), nn.Linear(20, 5))


@pytest.mark.parametrize("format", [Format.SPLIT, Format.STOCHASTIC])
def test_parity_in_fp32(format: Format) -> None:
    model = network()
    store_weights(model, model.parameters(), format)
    plain = copy.deepcopy(model)
    x = torch.randn(7, 12, requires_grad=True)
    result = assert_parity(model, x, passes=default_passes("fp32"))
    outputs, gradients = step(plain, plain, x)
    torch.testing.assert_close(result.outputs, outputs)
    torch.testing.assert_close(result.gradients, gradients)


@pytest.mark.parametrize("format", [Format.SPLIT, Format.STOCHASTIC])
def test_parity_in_bf16(format: Format) -> None:
    model = network()
    store_weights(model, model.parameters(), format)
    batches = [(torch.randn(32, 12),) for _ in range(4)]
    result = assert_bf16_parity(model, batches, passes=default_passes("bf16"))
    assert result.fired("read-upper-halves") == (3 if format == Format.SPLIT else 0)
    assert "optcpu.join" not in result.operators("forward")
    for graph in result.record.graphs:
        assert graph.final is not None
        assert not any(node.target == "optcpu.join" for node in graph.final.nodes)


@has_bf16_gradients
def test_gradients_of_stored_weights_are_bf16() -> None:
    model = network()
    store_weights(model, model.parameters(), Format.SPLIT)
    result = run(model, torch.randn(32, 12), passes=default_passes("bf16"))
    assert result.fired("gradients-in-bf16") == 2
    kinds = {name: g.dtype for name, g in result.gradients.items() if g is not None}
    assert kinds == {name: BF16 if p.dim() >= 2 else FP32 for name, p in model.named_parameters()}


@has_bf16_gradients
def test_gradients_that_are_added_up_are_bf16_too() -> None:
    model = network()
    store_weights(model, model.parameters(), Format.SPLIT)
    plain = copy.deepcopy(model)
    backend = Backend(Pipeline.of(default_passes("bf16")), codegen=False)
    compiled = torch.compile(model, backend=backend)
    for seed in range(3):
        x = torch.randn(32, 12, generator=torch.Generator().manual_seed(seed))
        compiled(x).square().sum().backward()
        plain(x).square().sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert one.grad.dtype == (BF16 if one.dim() >= 2 else FP32)
        assert (one.grad.float() - other.grad).norm() < 5e-2 * other.grad.norm()


def test_near_miss_plain_weights_keep_fp32_gradients() -> None:
    model = network()
    result = run(model, torch.randn(32, 12), passes=default_passes("bf16"))
    assert result.fired("gradients-in-bf16") == 0
    assert {g.dtype for g in result.gradients.values() if g is not None} == {FP32}


def test_without_descriptions_nothing_fires() -> None:
    module = traced(lambda high: high.float() * 2, HIGH)
    assert rewritten(GradientsInBf16(), module) == 0
