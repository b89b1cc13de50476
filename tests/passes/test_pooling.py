"""Max-pools: the same numbers on fewer elements, in any geometry, with ties and NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import assert_bf16_parity, assert_parity, operators, rewritten, run, traced
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optcpu
from optcpu.pipeline import default_passes
from passes import (
    CancelCasts,
    Canonicalize,
    InsertCasts,
    MaxPoolInBf16,
    PoolBackwardBySize,
    PoolBeforeRelu,
    PoolChannelsLast,
    SaveOutputsInBf16,
    SinkUpcasts,
)
from passes.graph import aten
from passes.pooling import MAX_POOL_BACKWARD, MAX_POOLS, expand_backward

BF16 = torch.bfloat16
SWAP = [Canonicalize(), PoolBeforeRelu()]


class Pooled(nn.Module):
    """A ReLU and a pool between two layers, so that everything has a gradient."""

    def __init__(self, **geometry: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, 1, 1))
        self.pool = nn.MaxPool2d(**geometry)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.pool(torch.relu(x * self.scale)) * self.scale
        return result


@st.composite
def geometries(draw: Any) -> dict[str, Any]:
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    return {
        "kernel_size": kernel,
        "stride": draw(st.sampled_from([None, 1, 2, kernel, (3, 2)])),
        "padding": (draw(st.integers(0, kernel[0] // 2)), draw(st.integers(0, kernel[1] // 2))),
        "dilation": draw(st.sampled_from([1, 1, 2])),
        "ceil_mode": draw(st.booleans()),
    }


def numbers_with_ties(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 3, shape, generator=generator).float()


@settings(max_examples=30)
@given(geometries(), st.integers(7, 9), st.integers(7, 9), st.integers(0, 99))
def test_relu_behind_the_pool(geometry: dict[str, Any], height: int, width: int, seed: int) -> None:
    torch._dynamo.reset()
    x = numbers_with_ties((3, 2, height, width), seed).requires_grad_()
    result = assert_parity(Pooled(**geometry), x, passes=SWAP)
    assert result.fired("pool-before-relu") == 1


def test_relu_behind_the_pool_without_gradients_and_batch() -> None:
    result = assert_parity(
        Pooled(kernel_size=2).requires_grad_(False), torch.randn(2, 6, 6), passes=[PoolBeforeRelu()]
    )
    assert result.fired("pool-before-relu") == 1


def test_numbers_that_are_none_come_through() -> None:
    x = torch.randn(1, 2, 4, 4)
    x[0, 0, 1, 1] = math.nan
    x[0, 1, 2, 2] = math.inf
    model = Pooled(kernel_size=2)
    (got,) = run(model, x, passes=SWAP).outputs
    torch.testing.assert_close(got, model(x).detach(), equal_nan=True, rtol=0, atol=0)


def test_golden_sequence() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2))
    result = run(model, torch.randn(1, 2, 8, 8), passes=SWAP)
    assert result.operators("forward") == [
        "aten.convolution",
        "prims._low_memory_max_pool_with_offsets",
        "aten.relu",
    ]
    names = result.operators("backward")
    backward = ["aten.max_pool2d_with_indices_backward", "aten.convolution_backward"]
    assert [n for n in names if "backward" in n] == ["aten.threshold_backward", *backward]


def test_nothing_of_the_size_of_the_pools_input_is_saved() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2))
    x = torch.randn(1, 2, 8, 8)
    result = assert_parity(model, x, passes=[*SWAP, PoolBackwardBySize()])
    assert result.fired("pool-backward-by-size") == 1
    (backward,) = (g.initial for g in result.record.graphs if g.kind == "backward")
    assert backward is not None
    saved = [node.meta["val"].shape for node in backward.find_nodes(op="placeholder")]
    assert torch.Size([1, 3, 6, 6]) not in saved
    assert torch.Size([1, 3, 3, 3]) in saved
    assert "optcpu.max_pool_backward" in result.operators("backward")


class _Skip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x)
        return F.max_pool2d(y, 2).sum() + y.sum()


class _Returned(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(x)
        return F.max_pool2d(y, 2), y


class _Places(nn.Module):
    """Wants to know where the largest elements are."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, return_indices=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, where = self.pool(torch.relu(x - 1))
        return y, where


@pytest.mark.parametrize(
    "model",
    [
        _Skip(),
        _Places(),
        _Returned(),
        nn.Sequential(nn.LeakyReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)),
        nn.Sequential(nn.MaxPool2d(2), nn.ReLU()),
    ],
)
def test_near_miss(model: nn.Module) -> None:
    x = torch.randn(2, 2, 6, 6, requires_grad=True)
    result = assert_parity(model, x, passes=SWAP)
    assert result.fired("pool-before-relu") == 0


def pool_backward(geometry: dict[str, Any], x: Tensor) -> tuple[Callable[..., Tensor], Tensor]:
    """The backward of a pool as Inductor captures it, and a gradient for it."""
    pool = nn.MaxPool2d(**geometry)
    sides = [pool.kernel_size, pool.stride, pool.padding, pool.dilation]
    kernel, stride, padding, dilation = ([s, s] if isinstance(s, int) else list(s) for s in sides)

    def function(gradient: Tensor, x: Tensor) -> Tensor:
        _, offsets = MAX_POOLS[1](x, kernel, stride, padding, dilation, pool.ceil_mode)
        indices = torch.ops.prims._low_memory_max_pool_offsets_to_indices.default(
            offsets, kernel, x.shape[-2:], stride, padding, dilation
        )
        arguments = (kernel, stride, padding, dilation, pool.ceil_mode, indices)
        result: Tensor = aten.max_pool2d_with_indices_backward.default(gradient, x, *arguments)
        return result

    return function, torch.randn_like(pool(x))


@given(
    geometries(),
    st.integers(7, 9),
    st.integers(7, 9),
    st.sampled_from([torch.float32, BF16]),
    st.booleans(),
)
def test_backward_in_any_geometry(
    geometry: dict[str, Any], height: int, width: int, dtype: torch.dtype, batched: bool
) -> None:
    shape = (3, 2, height, width) if batched else (2, height, width)
    x = numbers_with_ties(shape, height).to(dtype)
    function, gradient = pool_backward(geometry, x)
    module = traced(function, gradient, x)
    assert expand_backward(module.graph) == 1
    module.recompile()
    expected = function(gradient, x)
    assert torch.equal(module(gradient, x), expected)
    names = operators(module.graph)
    tiles = (
        geometry["stride"] in (None, geometry["kernel_size"])
        or (geometry["stride"],) * 2 == geometry["kernel_size"]
    )
    tiles = tiles and geometry["padding"] == (0, 0) and geometry["dilation"] == 1
    assert ("optcpu.max_pool_backward" in names) != tiles
    assert ("aten.where.self" in names) == tiles


@pytest.mark.parametrize("known_sizes", [True, False])
@pytest.mark.parametrize("kernel", [2, 3, (2, 5)])
def test_windows_of_minus_infinity_get_their_gradient_inside(
    kernel: Any, known_sizes: bool
) -> None:
    """Offsets of such windows point into the padding, where nothing may be written."""
    x = torch.full((2, 2, 9, 8), -math.inf)
    x[:, 1, 4:] = torch.randn(2, 5, 8)
    geometry = {"kernel_size": kernel, "stride": 2, "padding": 1}
    function, gradient = pool_backward(geometry, x)
    module = traced(function, gradient, x)
    if not known_sizes:
        (node,) = module.graph.find_nodes(op="call_function", target=MAX_POOL_BACKWARD)
        node.meta["val"] = torch.empty(1, 1, 2**13, 2**13, device="meta")  # large is unknown
    expand_backward(module.graph)
    module.recompile()
    got = module(gradient, x)
    if known_sizes:
        x.requires_grad_()
        (expected,) = torch.autograd.grad(nn.MaxPool2d(**geometry)(x), x, gradient)
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got.sum(), gradient.sum())  # none of it was written elsewhere
        assert "aten.maximum" in operators(module.graph)


def test_backward_sequence() -> None:
    x = torch.randn(1, 2, 5, 5)
    function, gradient = pool_backward({"kernel_size": 2}, x)
    module = traced(function, gradient, x)
    expand_backward(module.graph)
    names = operators(module.graph)
    assert names[names.index("aten.where.self") :] == [
        "aten.where.self",
        "aten.reshape",
        "aten.constant_pad_nd",
    ]


class _Ending(nn.Module):
    """Convolutions that end in a pool, whose result the user gets as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.MaxPool2d(2)
        )
        self.head = nn.Linear(16 * 4 * 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.body(x)
        return self.head(pooled.flatten(1)), pooled


def test_results_are_written_channels_last() -> None:
    result = run(_Ending(), torch.randn(4, 1, 12, 12), passes=[PoolChannelsLast()])
    assert result.fired("pool-channels-last") == 1  # the offsets: the rest is an output
    hidden = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    result = run(hidden, torch.randn(4, 1, 12, 12), passes=[*SWAP, PoolChannelsLast()])
    assert result.fired("pool-channels-last") == 2
    result = run(Pooled(kernel_size=2), torch.randn(4, 2, 12, 12), passes=[PoolChannelsLast()])
    assert result.fired("pool-channels-last") == 0  # no convolution


class _ManyPools(nn.Module):
    """Pools of several geometries, each between convolutions of its own."""

    def __init__(self) -> None:
        super().__init__()
        geometries: list[dict[str, Any]] = [
            {"kernel_size": 2},
            {"kernel_size": 3, "stride": 2, "padding": 1},
            {"kernel_size": (2, 3), "ceil_mode": True},
            {"kernel_size": 2, "stride": 3, "dilation": 2},
        ]
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(**geometry), nn.Conv2d(4, 2, 1)
            )
            for geometry in geometries
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x).flatten(1) for branch in self.branches], 1)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_generated_code_gives_the_gradients_of_eager(dynamic: bool) -> None:
    model, x = _ManyPools(), torch.randn(2, 1, 13, 11)
    model(x).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    optcpu.optimize(model, precision="fp32", dynamic=dynamic, fallback=False)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2, return_indices=True)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 4, 1)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Flatten(2)),
    ],
)
def test_outputs_have_the_strides_of_eager_ones(model: nn.Module) -> None:
    x = torch.randn(2, 3, 12, 12)
    expected = model(x)
    got = optcpu.optimize(model, precision="fp32")(x)
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for one, other in pairs:
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other)


def test_generated_code_is_channels_last_up_to_the_pool() -> None:
    """And nobody sees it: outputs have the strides of eager ones."""
    torch.manual_seed(0)
    model, x = _Ending(), torch.randn(4, 1, 12, 12)
    outputs = model(x)
    sum(output.square().mean() for output in outputs).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    optcpu.optimize(model, precision="fp32")
    got = model(x)
    sum(output.square().mean() for output in got).backward()
    for one, other in zip(got, outputs, strict=True):
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other)
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def pooled(head: nn.Module, pool: nn.Module | None = None) -> nn.Module:
    norm = nn.BatchNorm2d(3)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False), norm, nn.ReLU(), pool or nn.MaxPool2d(2), head
    )


POOLS = [
    Canonicalize(),
    PoolBeforeRelu(),
    InsertCasts(),
    MaxPoolInBf16(),
    SaveOutputsInBf16(),
    SinkUpcasts(),
    CancelCasts(),
]
IMAGES = (4, 2, 10, 10)


@pytest.mark.parametrize("relu_first", [True, False])
def test_max_pool_reads_bf16(relu_first: bool) -> None:
    model = pooled(nn.Conv2d(3, 4, 3))
    passes = [step for step in POOLS if not (relu_first and isinstance(step, PoolBeforeRelu))]
    result = run(model, torch.randn(IMAGES, requires_grad=True), passes=passes)
    assert result.fired("max-pool-in-bf16") == 1
    assert result.fired("save-outputs-in-bf16") == relu_first  # else it is BF16 itself
    (joint,) = (g.final for g in result.record.graphs if g.kind == "joint")
    assert joint is not None
    (pool,) = joint.find_nodes(op="call_function", target=MAX_POOLS[1])
    assert pool.args[0].meta["val"].dtype == BF16
    names = [
        name for name in operators(joint) if "with_offsets" in name or name in ("aten.relu", "cast")
    ]
    start = names.index("prims._low_memory_max_pool_with_offsets")
    if relu_first:
        assert names[start - 2 : start] == ["aten.relu", "cast"]
    else:
        assert names[start - 1 : start + 2] == [
            "cast",
            "prims._low_memory_max_pool_with_offsets",
            "aten.relu",
        ]


@pytest.mark.parametrize(
    "model",
    [
        pooled(nn.Flatten()),  # the pool's result is wanted in FP32
        pooled(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2)),  # an average is rounded
    ],
)
def test_pool_is_left_in_fp32(model: nn.Module) -> None:
    result = run(model, torch.randn(IMAGES), passes=POOLS)
    assert result.fired("max-pool-in-bf16") == 0


def _indices_only(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2, return_indices=True)[1]


def _neither(x: Tensor) -> Tensor:
    F.max_pool2d(x, 2)
    return x + 1


@pytest.mark.parametrize("unused_results_stay", [True, False])
@pytest.mark.parametrize("function", [_indices_only, _neither])
def test_pool_whose_result_nobody_reads_is_left_alone(
    function: Callable[[Tensor], Tensor], unused_results_stay: bool
) -> None:
    """Its indices, of the FP32 elements, must not become those of rounded ones."""
    x = torch.randn(2, 3, 8, 8)
    module = traced(function, x)
    if not unused_results_stay:
        for node in reversed(module.graph.nodes):
            if not node.users and "pool_with" not in str(node.target) and node.op != "output":
                module.graph.erase_node(node)
    before = str(module.graph)
    assert "pool_with" in before
    assert rewritten(MaxPoolInBf16(), module) == 0
    assert str(module.graph) == before
    assert torch.equal(module(x), function(x))


def test_pool_in_bf16_is_as_exact_as_autocast() -> None:
    model = pooled(nn.Conv2d(3, 4, 3))
    batches = [(torch.randn(IMAGES, requires_grad=True),) for _ in range(4)]
    result = assert_bf16_parity(model, batches, default_passes("bf16"))
    assert result.fired("max-pool-in-bf16") == 1
