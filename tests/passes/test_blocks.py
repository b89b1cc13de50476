"""Equal blocks are written once; what is not equal stays, and nothing else changes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from captured import operators, traced
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from passes import Blocks, lower, share_blocks
from passes.repeats import LEAST_SAVED, SMALLEST_BLOCK

WIDTH = 6
BLOCK = ["aten.mm", "aten.add.Tensor", "aten.tanh", "aten.mul.Tensor", "aten.neg", "aten.sigmoid"]
CURVES = ["sin", "cos", "erf", "atan", "exp", "sqrt", "log1p", "square", "asinh"]
BLOCK += [f"aten.{name}" for name in CURVES[:7]] + ["aten.pow.Tensor_Scalar", "aten.asinh"]
BLOCK += ["aten.sub.Tensor", "aten.mm", "aten.add.Tensor"]


def layer(x: Tensor, weight: Tensor, factor: float = 0.5) -> Tensor:
    """Eighteen operators, with a residual connection."""
    inner = curves(torch.sigmoid(-(torch.tanh(x @ weight + 1) * factor)))
    return x + (inner - x) @ weight


def curves(x: Tensor) -> Tensor:
    for name in CURVES:
        x = getattr(torch, name)(x)
    return x


def weights(count: int) -> list[Tensor]:
    return [torch.randn(WIDTH, WIDTH) for _ in range(count)]


def shared(function: Callable[..., Any], *inputs: Tensor) -> tuple[fx.GraphModule, list[Blocks]]:
    """The graph of ``function`` after sharing; what it computes is checked."""
    module = traced(function, *inputs)
    expected = module(*inputs)
    found = share_blocks(module)
    module.graph.lint()
    torch.testing.assert_close(module(*inputs), expected, rtol=0, atol=0)
    return module, found


def block(module: fx.GraphModule, number: int = 0) -> fx.Graph:
    graph = module.get_submodule(f"block_{number}").graph
    assert isinstance(graph, fx.Graph)
    return graph


def calls_of_blocks(module: fx.GraphModule) -> list[list[str]]:
    """The names of the arguments of every call."""
    return [
        [argument.name for argument in node.args[2:]]
        for node in module.graph.nodes
        if node.target is torch.ops.higher_order.invoke_subgraph
    ]


def stack(x: Tensor, *weights: Tensor) -> Tensor:
    for weight in weights:
        x = layer(x, weight)
    return x


def test_equal_layers_are_written_once() -> None:
    module, found = shared(stack, torch.randn(4, WIDTH), *weights(5))
    assert found == [Blocks(5, len(BLOCK))]
    assert operators(module.graph) == ["invoke_subgraph"] * 5
    assert operators(block(module)) == BLOCK
    # Only the residual stream goes from one to the next.
    (first, second, *_) = calls_of_blocks(module)
    assert first == ["arg0_1", "arg1_1"]
    assert second == ["arg2_1", "getitem"] or second == ["getitem", "arg2_1"]


def test_values_know_their_shapes_and_strides() -> None:
    module, _ = shared(stack, torch.randn(4, WIDTH), *weights(3))
    for graph in (module.graph, block(module)):
        for node in graph.nodes:
            if node.op in ("placeholder", "call_function"):
                assert "val" in node.meta, node
    results = [n for n in module.graph.nodes if n.target is operator.getitem]
    assert [n.meta["val"].shape for n in results] == [(4, WIDTH)] * 3


def test_what_stands_before_and_behind_stays() -> None:
    def function(x: Tensor, *weights: Tensor) -> Tensor:
        return stack(torch.exp(x), *weights).softmax(-1).log()

    module, found = shared(function, torch.randn(4, WIDTH), *weights(4))
    assert found == [Blocks(4, len(BLOCK))]
    assert operators(module.graph)[:2] == ["aten.exp", "invoke_subgraph"]
    assert operators(module.graph)[-1] == "aten.log"


def test_a_layer_with_another_constant_has_its_own_code() -> None:
    def function(x: Tensor, *weights: Tensor) -> Tensor:
        for weight, factor in zip(weights, (0.5,) * 3 + (0.25,) + (0.5,) * 3, strict=True):
            x = layer(x, weight, factor)
        return x

    module, found = shared(function, torch.randn(4, WIDTH), *weights(7))
    assert [blocks.count for blocks in found] == [3, 3]
    assert operators(module.graph).count("aten.tanh") == 1


def test_layers_of_other_widths_have_their_own_code() -> None:
    def function(x: Tensor, y: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return stack(x, *weights[:3]), stack(y, *weights[3:])

    wide = [torch.randn(9, 9) for _ in range(4)]
    inputs = (torch.randn(4, WIDTH), torch.randn(4, 9), *weights(3), *wide)
    module, found = shared(function, *inputs)
    assert found == [Blocks(4, len(BLOCK)), Blocks(3, len(BLOCK))]
    assert operators(module.graph) == ["invoke_subgraph"] * 7


def test_layers_that_are_wired_otherwise_have_their_own_code() -> None:
    def function(x: Tensor, *weights: Tensor) -> Tensor:
        for number, weight in enumerate(weights):
            inner = curves(torch.sigmoid(-(torch.tanh(x @ weight + 1) * 0.5)))
            x = x + ((inner - x) if number < 3 else (x - inner)) @ weight
        return x

    _, found = shared(function, torch.randn(4, WIDTH), *weights(6))
    assert sum(blocks.count for blocks in found) == 6
    assert len(found) == 2


@pytest.mark.parametrize("size", [SMALLEST_BLOCK - 1, SMALLEST_BLOCK])
def test_a_short_block_is_not_worth_a_call(size: int) -> None:
    names = [*CURVES, "tanh", "neg", "abs", "sigmoid", "expm1", "erfc", "cosh"]

    def function(x: Tensor) -> Tensor:
        for _ in range(5):
            for name in names[:size]:
                x = getattr(torch, name)(x)
        return x

    assert len(names) == SMALLEST_BLOCK
    _, found = shared(function, torch.rand(3))
    assert len(found) == (1 if size == SMALLEST_BLOCK else 0)


def test_little_saved_is_not_worth_it() -> None:
    layers = LEAST_SAVED // len(BLOCK) + 1
    for count, rows in ((layers, 0), (layers + 1, 1)):
        _, found = shared(stack, torch.randn(4, WIDTH), *weights(count))
        assert len(found) == rows


def test_what_every_layer_uses_is_made_once_before_them() -> None:
    def function(x: Tensor, *weights: Tensor) -> Tensor:
        for weight in weights:
            mask = torch.arange(WIDTH).unsqueeze(0) <= torch.arange(4).unsqueeze(1)
            x = layer(x * mask, weight)
        return x

    module, found = shared(function, torch.randn(4, WIDTH), *weights(3))
    (blocks,) = found
    assert blocks.count == 3
    assert "aten.le.Tensor" not in operators(block(module))


@pytest.mark.parametrize("from_the_layer", [False, True])
def test_a_layer_that_makes_what_all_use_is_equal_but_for_that(from_the_layer: bool) -> None:
    """Unless what it makes depends on the layer itself: then it cannot be called before that is made."""

    def function(x: Tensor, source: Tensor, *weights: Tensor) -> Tensor:
        mask = None
        for weight in weights:
            start = torch.tanh(x @ weight)
            if mask is None:
                mask = torch.floor(start if from_the_layer else source)
            x = x + curves(torch.sigmoid(-start * 2) + mask) @ weight
        return x

    inputs = (torch.randn(4, WIDTH), torch.rand(4, WIDTH), *weights(5))
    module, found = shared(function, *inputs)
    assert [blocks.count for blocks in found] == [4 if from_the_layer else 5]
    assert operators(module.graph).count("aten.floor") == 1


def test_fills_are_made_inside() -> None:
    def function(x: Tensor, *weights: Tensor) -> Tensor:
        zeros = torch.full((4, WIDTH), 0.25)
        for weight in weights:
            x = layer(torch.where(x > 0, x, zeros), weight)
        return x

    module, found = shared(function, torch.randn(4, WIDTH), *weights(3))
    assert [blocks.count for blocks in found] == [3]
    assert "aten.full" in operators(block(module))
    assert "aten.full" not in operators(module.graph)


def test_fills_of_other_dtypes_are_not_alike() -> None:
    def function(x: Tensor, *weights: Tensor) -> Tensor:
        for number, weight in enumerate(weights):
            dtype = torch.float32 if number < 3 else torch.float64
            x = layer(x + torch.full((), 0.1, dtype=dtype), weight)
        return x

    _, found = shared(function, torch.randn(4, WIDTH), *weights(6))
    assert [blocks.count for blocks in found] == [3, 3]


def test_what_reads_beyond_its_argument_stays_outside() -> None:
    """``as_strided`` counts from the beginning of the memory, of which the arguments are other parts."""

    def function(x: Tensor, *tables: Tensor) -> Tensor:
        for number, table in enumerate(tables):
            part = table[number:]
            x = layer(x + torch.as_strided(part, (4, WIDTH), (WIDTH, 1), 7), table[-WIDTH:])
        return x

    tables = [torch.randn(12 + number, WIDTH) for number in range(5)]
    module, _ = shared(function, torch.randn(4, WIDTH), *tables)
    assert operators(module.graph).count("aten.as_strided") == 5


def test_views_that_others_use_are_made_outside() -> None:
    def function(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        saved = []
        for weight in weights:
            x = layer(x, weight)
            saved += [x.t(), weight.t(), x.unsqueeze(0)[0]]
            x = torch.relu(x.t()).t().contiguous()
        return (*saved, x)

    module, found = shared(function, torch.randn(4, WIDTH), *weights(4))
    assert [blocks.count for blocks in found] == [4]
    (output,) = block(module).find_nodes(op="output")
    for result in output.args[0]:
        assert not result.target._schema.returns[0].alias_info, result
    assert operators(module.graph).count("aten.permute") >= 8


def test_random_numbers_differ_between_blocks() -> None:
    def function(seed_source: Tensor, *weights: Tensor) -> Tensor:
        seeds = torch.ops.prims.inductor_seeds(4, torch.device("cpu"))
        x = seed_source
        for number, weight in enumerate(weights):
            seed = torch.ops.prims.inductor_lookup_seed(seeds, number)
            x = layer(x, weight) * torch.ops.prims.inductor_random([4, WIDTH], seed, "rand")
        return x

    module = traced(function, torch.randn(4, WIDTH), *weights(4))
    assert [blocks.count for blocks in share_blocks(module)] == [4]
    assert operators(module.graph)[:5] == [
        "prims.inductor_seeds",
        *["prims.inductor_lookup_seed"] * 4,
    ]
    seeds = [[name for name in call if "seed" in name] for call in calls_of_blocks(module)]
    assert len({name for (name,) in seeds}) == 4


def test_writes_stay_outside() -> None:
    def function(x: Tensor, *weights: Tensor) -> Tensor:
        for weight in weights:
            x = layer(x, weight)
            torch.ops.aten.copy_.default(weight, x[:4].mm(x.t()[:, :4]).new_ones(WIDTH, WIDTH))
        return x

    module = traced(function, torch.randn(4, WIDTH), *weights(3))
    share_blocks(module)
    for name, child in module.named_children():
        assert not any("copy_" in name for name in operators(child.graph)), name  # type: ignore[arg-type]


def test_a_fill_that_is_written_to_is_no_constant() -> None:
    """As the tables are, to which the gradients of embeddings are added."""

    def function(x: Tensor, rows: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        tables = []
        for weight in weights:
            x = layer(x, weight)
        for _ in range(2):
            table = torch.full((4, WIDTH), 0.0)
            tables.append(curves(table.bfloat16().exp()))
            torch.ops.optcpu.add_rows_(table.view(4, WIDTH), rows, x, -1)
            tables.append(curves(curves(table.bfloat16().exp())))
        return x, *tables

    inputs = (torch.randn(4, WIDTH), torch.tensor([1, 3, 1, 0]), *weights(3))
    _, found = shared(function, *inputs)
    assert found[0].count == 3


def test_symbolic_sizes_are_left_alone() -> None:
    module = traced(stack, torch.randn(4, WIDTH), *weights(4), dynamic=[0])
    before = operators(module.graph)
    assert share_blocks(module) == []
    assert operators(module.graph) == before


def convolved(x: Tensor, kernels: Sequence[Tensor]) -> Tensor:
    for kernel in kernels:
        x = x + torch.sigmoid(-torch.tanh(curves(torch.conv2d(x, kernel, padding=1)) * 2).neg())
    return x


def test_what_stands_between_convolutions_is_left_alone() -> None:
    kernels = [torch.randn(3, 3, 3, 3) for _ in range(4)]
    _, found = shared(lambda x, *kernels: convolved(x, kernels), torch.randn(2, 3, 5, 5), *kernels)
    assert found == []


@pytest.mark.parametrize("lowered", [False, True])
def test_what_stands_between_backwards_of_convolutions_is_left_alone(lowered: bool) -> None:
    def function(x: Tensor, *kernels: Tensor) -> Sequence[Tensor]:
        inputs = [x.detach().requires_grad_(), *(k.detach().requires_grad_() for k in kernels)]
        return torch.autograd.grad(convolved(inputs[0], inputs[1:]).sum(), inputs)

    inputs = [torch.randn(2, 3, 5, 5), *(torch.randn(3, 3, 3, 3) for _ in range(4))]
    module = traced(function, *inputs)
    if lowered:
        lower(module.graph)
        assert "aten.convolution_backward" not in operators(module.graph)
    share_blocks(module)
    for name, child in module.named_children():
        assert isinstance(child, fx.GraphModule)
        assert not any("conv" in operator for operator in operators(child.graph)), name
    assert operators(module.graph).count("aten.tanh") == 4


def test_layers_behind_convolutions_are_written_once() -> None:
    def function(image: Tensor, kernel: Tensor, *weights: Tensor) -> Tensor:
        patches = torch.conv2d(image, kernel, stride=2).flatten(2).transpose(1, 2)
        return stack(patches[0], *weights)

    inputs = (torch.randn(1, 3, 4, 4), torch.randn(WIDTH, 3, 2, 2), *weights(4))
    module, found = shared(function, *inputs)
    assert found == [Blocks(4, len(BLOCK))]
    assert "aten.convolution" in operators(module.graph)


def test_a_graph_without_calls() -> None:
    _, found = shared(lambda x: (x,), torch.randn(3))
    assert found == []


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mm": lambda x, w: x @ w,
    "add": lambda x, w: x + w[:1],
    "tanh": lambda x, w: torch.tanh(x),
    "double": lambda x, w: x * 2,
    "transpose twice": lambda x, w: torch.sigmoid(x.t()).t(),
    "split": lambda x, w: torch.cat(x.split(3, dim=1)[::-1], dim=1),
    "mean": lambda x, w: x - x.mean(-1, keepdim=True),
    "weight": lambda x, w: x @ w.t(),
}


@settings(max_examples=60, deadline=None)
@given(
    body=st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=6, max_size=14),
    before=st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=4),
    layers=st.integers(2, 6),
    odd=st.integers(0, 8),
    saved=st.integers(0, 9),
    data=st.randoms(use_true_random=False),
)
def test_any_stack_computes_the_same(
    body: list[str], before: list[str], layers: int, odd: int, saved: int, data: Any
) -> None:
    """Layers of any operators, one of them with an operator more, one value of each an output."""
    given_weights = weights(layers)

    def function(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for name in before:
            x = OPERATIONS[name](x, weights[0])
        for number, weight in enumerate(weights):
            start = x
            for place, name in enumerate(body):
                x = OPERATIONS[name](x, weight)
                if place == saved:
                    outputs.append(x)
            x = x + start
            if number == odd:
                x = torch.exp(-x.abs())
        return (*outputs, x)

    shared(function, torch.randn(4, WIDTH), *given_weights)
