"""Gradients are handed over once the weight is read no more; whatever else is left is returned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from captured import operators, traced
from torch import Tensor, fx

from passes.hand_over import hand_over, hand_over_gradients, origins, receive

WEIGHT, X = frozenset({0}), frozenset({1})
SAVED = {"arg0_1": WEIGHT, "arg1_1": X}


def described(number: int, part: str | None = None) -> Any:
    """An input of the captured graph, or a part of it, as AOTAutograd describes it."""
    whole = SimpleNamespace(idx=number)
    return whole if part is None else SimpleNamespace(base=whole, attr=part)


def backward_of(
    function: Callable[..., Any], *inputs: Tensor, gradients_of: list[int | None]
) -> fx.GraphModule:
    """What a backward graph computes from what is saved and, as the last input, the tangents."""
    module = traced(function, *inputs)
    (*_, tangents) = module.graph.find_nodes(op="placeholder")
    tangents.meta["desc"] = SimpleNamespace(output=0)
    module.graph.output_node().meta["desc"] = [
        None if number is None else SimpleNamespace(grad_of=described(number))
        for number in gradients_of
    ]
    return module


def linear(weight: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    return tangents.t() @ x, tangents @ weight


OPERANDS = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5, 4)


def run(module: fx.GraphModule, *inputs: Tensor) -> tuple[Any, list[tuple[int, Tensor]]]:
    """What the graph returns, and what it hands over, when autograd runs it."""
    handed: list[tuple[int, Tensor]] = []
    results: list[Any] = []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            results.extend(module(*inputs))
            return gradients[0]

    out = Node.apply(torch.zeros((), requires_grad=True))
    receive(out.grad_fn, lambda number, gradient: handed.append((number, gradient.clone())))
    out.backward()
    return results, handed


def test_the_weight_is_read_before() -> None:
    module = backward_of(linear, *OPERANDS, gradients_of=[0, 1])
    gradient, other = module(*OPERANDS)
    assert hand_over_gradients(module.graph, [0], SAVED) == 1
    module.recompile()
    assert operators(module.graph) == ["aten.permute", "aten.mm", "aten.mm", "optcpu.hand_over"]
    results, handed = run(module, *OPERANDS)
    assert results[0] is None
    assert torch.equal(results[1], other)
    ((number, received),) = handed
    assert number == 0
    assert torch.equal(received, gradient)


def test_a_gradient_whose_weight_is_not_read_goes_at_once() -> None:
    def function(x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        return tangents.t() @ x, torch.exp(tangents)

    module = backward_of(function, *OPERANDS[1:], gradients_of=[0, None])
    assert hand_over_gradients(module.graph, [0], {"arg0_1": X}) == 1
    assert operators(module.graph) == ["aten.permute", "aten.mm", "optcpu.hand_over", "aten.exp"]


def test_views_of_the_weight_are_read_before() -> None:
    def function(weight: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = weight.t()
        gradient = tangents.t() @ x
        return gradient, torch.exp(tangents), torch.exp(rows.select(0, 0))

    module = backward_of(function, *OPERANDS, gradients_of=[0, None, None])
    assert hand_over_gradients(module.graph, [0], SAVED) == 1
    assert operators(module.graph)[-2:] == ["aten.exp", "optcpu.hand_over"]


def test_all_that_is_the_memory_of_a_weight_counts() -> None:
    """The half of a split weight and a saved view of it are inputs of their own."""

    def function(
        high: Tensor, view: Tensor, x: Tensor, tangents: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return tangents.t() @ x, tangents @ high, torch.exp(view)

    weight, x, tangents = OPERANDS
    module = backward_of(function, weight, weight.t(), x, tangents, gradients_of=[0, None, None])
    saved = {"arg0_1": WEIGHT, "arg1_1": WEIGHT, "arg2_1": X}
    hand_over_gradients(module.graph, [0], saved)
    (call,) = module.graph.find_nodes(op="call_function", target=hand_over)
    assert [str(node) for node in call.args[2]] == ["arg0_1", "arg1_1"]
    assert operators(module.graph)[-2:] == ["aten.exp", "optcpu.hand_over"]


def test_a_cast_at_the_end_of_the_graph_moves_to_its_product() -> None:
    def function(weight: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        gradient = tangents.t() @ x
        other = torch.exp(tangents @ weight)
        return gradient.view(3, 4).to(torch.bfloat16), other

    weight = torch.randn(4, 3)
    module = backward_of(function, weight, *OPERANDS[1:], gradients_of=[0, None])
    hand_over_gradients(module.graph, [0], SAVED)
    module.graph.lint()
    names = operators(module.graph)
    assert names.index("optcpu.hand_over") < names.index("aten.exp")
    assert names.index("aten.view") < names.index("optcpu.hand_over")


@pytest.mark.parametrize(
    ("gradients_of", "inputs", "saved"),
    [
        ([0, 1], [], SAVED),
        ([None, 0], [5], SAVED),
        ([0, 1], [0], {"arg1_1": X}),  # whose memory the weight is cannot be told
    ],
    ids=["none is wanted", "another is wanted", "an input is unknown"],
)
def test_near_misses(
    gradients_of: list[int | None], inputs: list[int], saved: Mapping[str, frozenset[int]]
) -> None:
    module = backward_of(linear, *OPERANDS, gradients_of=gradients_of)
    before = operators(module.graph)
    assert hand_over_gradients(module.graph, inputs, saved) == 0
    assert operators(module.graph) == before


def test_a_gradient_of_two_inputs_and_one_that_is_given_are_returned() -> None:
    def function(x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradient = tangents.t() @ x
        return gradient, gradient, tangents

    module = backward_of(function, *OPERANDS[1:], gradients_of=[0, 2, 3])
    assert hand_over_gradients(module.graph, [0, 2, 3], {"arg0_1": X}) == 0


def test_pytorch_without_descriptions_hands_nothing_over() -> None:
    module = traced(linear, *OPERANDS)
    assert hand_over_gradients(module.graph, [0], SAVED) == 0


def test_origins_of_what_is_saved() -> None:
    def forward(weight: Tensor, high: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        y = x @ weight.t() + high
        return y, weight, weight.t().select(0, 0), torch.split(high, 2)[1], x

    module = traced(forward, torch.randn(4, 3), torch.randn(4), torch.randn(5, 3))
    weight, high, _ = module.graph.find_nodes(op="placeholder")
    weight.meta["desc"], high.meta["desc"] = described(7), described(2, "high")
    names = [node.name for node in module.graph.output_node().args[0]]
    found = origins(module.graph)
    numbers = [set(found[name]) for name in names]
    assert numbers == [set(), {7}, {7}, {2}, set()]


def test_nobody_waits() -> None:
    with pytest.raises(RuntimeError, match="nobody waits for it"):
        hand_over(torch.zeros(2), 0, [])


def test_a_gradient_that_is_a_tangent_in_another_form_stays_behind_the_inputs() -> None:
    def function(x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        return tangents.view(20), torch.exp(x)

    module = backward_of(function, OPERANDS[1], OPERANDS[2], gradients_of=[0, None])
    assert hand_over_gradients(module.graph, [0], {"arg0_1": X}) == 1
    kinds = [node.op for node in module.graph.nodes]
    assert kinds == sorted(kinds, key=["placeholder", "call_function", "output"].index)
