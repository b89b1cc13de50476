"""What a pass is: names, stages, patterns with a check, and keys that cannot be mistaken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import passes
from passes import Canonicalize, FunctionPass, Pass, PatternPass, as_pass, cache_key
from passes.graph import aten, calls, value
from tests.passes.captured import assert_parity, operators, rewritten, traced


def drop_double_negation(graph: fx.Graph) -> int:
    fired = 0
    for node in calls(graph, aten.neg.default):
        (inner,) = node.all_input_nodes
        if inner.target is aten.neg.default:
            node.replace_all_uses_with(inner.args[0])
            fired += 1
    graph.eliminate_dead_code()
    return fired


def squared_sum(a: Tensor, b: Tensor) -> Any:
    return aten.mul.Tensor(aten.add.Tensor(a, b), aten.add.Tensor(a, b))


def power_of_sum(a: Tensor, b: Tensor) -> Any:
    return aten.pow.Tensor_Scalar(aten.add.Tensor(a, b), 2)


def doubled(x: Tensor) -> Any:
    return aten.mul.Tensor(x, 2)


def added_to_itself(x: Tensor) -> Any:
    return aten.add.Tensor(x, x)


def test_function_pass() -> None:
    step = as_pass(drop_double_negation)
    assert isinstance(step, FunctionPass)
    assert (step.name, step.stage, repr(step)) == (
        "drop-double-negation",
        "joint",
        "FunctionPass(drop-double-negation)",
    )
    module = traced(lambda x: x.neg().neg().exp(), torch.randn(3))
    assert rewritten(step, module) == 1
    assert operators(module.graph) == ["aten.exp"]
    assert rewritten(step, module) == 0


def test_pattern_pass() -> None:
    step = PatternPass(squared_sum, power_of_sum)
    assert step.name == "power-of-sum"
    inputs = torch.randn(3), torch.randn(3)
    module = traced(lambda a, b: ((a + b) * (a + b)).exp(), *inputs)
    assert rewritten(step, module) == 1
    assert operators(module.graph) == ["aten.add.Tensor", "aten.pow.Tensor_Scalar", "aten.exp"]
    torch.testing.assert_close(module(*inputs), ((inputs[0] + inputs[1]) ** 2).exp())


def test_pattern_pass_gives_new_nodes_values_and_origin() -> None:
    module = traced(lambda x: (x * 2).exp(), torch.randn(3, 2))
    (product,) = calls(module.graph, aten.mul.Tensor)
    product.meta["stack_trace"] = "model.py, line 7"
    rewritten(PatternPass(doubled, added_to_itself), module)
    (node,) = calls(module.graph, aten.add.Tensor)
    assert value(node).shape == (3, 2)
    assert node.meta["stack_trace"] == "model.py, line 7"


def test_pattern_pass_counts_every_match() -> None:
    module = traced(lambda x, y: (x * 2) - (y * 2) * 2, torch.randn(3), torch.randn(3))
    assert rewritten(PatternPass(doubled, added_to_itself), module) == 3
    assert operators(module.graph).count("aten.add.Tensor") == 3


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 3,  # another constant
        lambda x: x + 2,  # another operator
        lambda x: torch.mul(x, x),
    ],
)
def test_pattern_pass_near_misses(function: Any) -> None:
    module = traced(function, torch.randn(3))
    before = operators(module.graph)
    assert rewritten(PatternPass(doubled, added_to_itself), module) == 0
    assert operators(module.graph) == before


def test_pattern_pass_leaves_a_value_that_others_read() -> None:
    """The inner sum is read outside the pattern, so it must stay."""

    def function(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total = a + b
        return total * total, total

    inputs = torch.randn(3), torch.randn(3)
    module = traced(function, *inputs)
    rewritten(PatternPass(squared_sum, power_of_sum), module)
    for got, expected in zip(module(*inputs), function(*inputs), strict=True):
        torch.testing.assert_close(got, expected)


def test_pattern_pass_checks() -> None:
    def is_matrix(matched: dict[str, Any]) -> bool:
        return value(matched["x"]).dim() == 2

    step = PatternPass(doubled, added_to_itself, is_matrix)
    module = traced(lambda x, y: (x * 2) + (y * 2), torch.randn(3), torch.randn(3, 3))
    assert rewritten(step, module) == 1
    (remaining,) = calls(module.graph, aten.mul.Tensor)
    assert value(remaining).dim() == 1


def test_own_passes_keep_parity_in_both_directions() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    steps = [as_pass(drop_double_negation), PatternPass(doubled, added_to_itself)]
    result = assert_parity(model, torch.randn(3, 4, requires_grad=True), passes=steps)
    assert set(result.record.counts()) == {"drop-double-negation", "added-to-itself"}


@dataclass(frozen=True, repr=False)
class CountNodes(Pass):
    """A pass with parameters."""

    at_most: int = 3
    names: tuple[str, ...] = ("relu",)

    def __call__(self, graph: fx.Graph) -> int:
        return min(self.at_most, len(list(graph.nodes)))


def test_names_and_parameters_are_told() -> None:
    step = CountNodes(at_most=5)
    assert step.name == "count-nodes"
    assert repr(step) == "CountNodes(at_most=5, names=('relu',))"


@pytest.mark.parametrize("thing", ["relu", 3, None, Canonicalize, [drop_double_negation]])
def test_what_is_no_pass_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match="a pass is an instance"):
        as_pass(thing)


def test_the_key_covers_code_parameters_stage_and_order() -> None:
    def one(graph: fx.Graph) -> int:
        return 1

    def another(graph: fx.Graph) -> int:
        return 2

    another.__name__ = "one"
    lists: list[list[Pass]] = [
        [],
        [FunctionPass(one)],
        [FunctionPass(one, "split")],
        [FunctionPass(another)],
        [CountNodes()],
        [CountNodes(at_most=4)],
        [CountNodes(names=("tanh",))],
        [CountNodes(), FunctionPass(one)],
        [FunctionPass(one), CountNodes()],
        [PatternPass(doubled, added_to_itself)],
        [PatternPass(added_to_itself, doubled)],
        [PatternPass(doubled, added_to_itself, lambda matched: True)],
        [PatternPass(doubled, added_to_itself, lambda matched: False)],
        [PatternPass(doubled, added_to_itself, stage="split")],
    ]
    assert len({cache_key(steps) for steps in lists}) == len(lists)
    assert cache_key([CountNodes()]) == cache_key([CountNodes()])


def test_a_pass_without_fields_is_keyed_by_its_attributes() -> None:
    class Own(Pass):
        def __init__(self, limit: int) -> None:
            self.limit = limit

        def __call__(self, graph: fx.Graph) -> int:
            return 0

    assert Own(1).cache_key() != Own(2).cache_key()
    assert Own(1).cache_key() == Own(1).cache_key()


def test_every_pass_of_the_package_says_what_it_does() -> None:
    found = [
        thing
        for thing in vars(passes).values()
        if isinstance(thing, type) and issubclass(thing, Pass) and thing is not Pass
    ]
    assert len(found) > 5
    for kind in found:
        assert kind.__doc__
        assert kind.stage in ("joint", "split")
