"""The tools that read and edit graphs."""

from __future__ import annotations

import pytest
import torch
from captured import BF16, FP32, operators, traced
from torch import fx

from passes import graph as tools
from passes.graph import aten, calls, value


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return list(module.graph.find_nodes(op="placeholder"))


def test_emitted_nodes_know_value_and_origin() -> None:
    module = traced(lambda x: torch.relu(x), torch.randn(3, 4))
    (relu,) = calls(module.graph, aten.relu.default)
    relu.meta["stack_trace"] = "model.py, line 7"
    with module.graph.inserting_after(relu):
        node = tools.emit(relu, aten.permute.default, relu, [1, 0])
    assert value(node).shape == (4, 3)
    assert value(node).stride() == (1, 4)
    assert node.meta["stack_trace"] == "model.py, line 7"


def test_values_without_tensor_arguments_are_fake_as_well() -> None:
    module = traced(lambda x: torch.relu(x), torch.randn(3))
    (relu,) = calls(module.graph, aten.relu.default)
    with module.graph.inserting_before(relu):
        node = tools.emit(relu, aten.full.default, [2], 1.0)
    assert isinstance(value(node), torch._subclasses.FakeTensor)


def test_cast_to_the_same_dtype_adds_nothing() -> None:
    module = traced(lambda x: torch.relu(x), torch.randn(3))
    (relu,) = calls(module.graph, aten.relu.default)
    with module.graph.inserting_after(relu):
        assert tools.cast(relu, relu, FP32) is relu
        assert tools.dtype(tools.cast(relu, relu, BF16)) == BF16


def test_symbolic_sizes_are_held_by_nodes() -> None:
    module = traced(
        lambda x, y: torch.relu(x).sum() + y.sum(),
        torch.randn(3, 4),
        torch.randn(5, 2),
        dynamic=(0, 1),
    )
    (relu,) = calls(module.graph, aten.relu.default)
    rows, columns = tools.sizes(relu)
    assert columns == 4
    assert isinstance(rows, fx.Node)
    assert rows.target is aten.sym_size.int
    assert rows.args == (_placeholders(module)[0], 0)
    module.graph.lint()


def test_same_shape_adds_no_guard() -> None:
    module = traced(
        lambda x, y, z: (torch.relu(x), y.relu(), z.relu()),
        *(torch.randn(n, 4) for n in (3, 3, 5)),
        dynamic=(0, 2),
    )
    first, second, third = calls(module.graph, aten.relu.default)
    shape_env = value(first).shape[0].node.shape_env
    guards = len(shape_env.guards)
    assert tools.same_shape(first, first)
    assert not tools.same_shape(first, second)
    assert not tools.same_shape(first, third)
    assert len(shape_env.guards) == guards


@pytest.mark.parametrize(("a", "b"), [((2, 3), (3, 2)), ((2, 3), (2, 3, 1)), ((1,), (2,))])
def test_different_shapes(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    module = traced(lambda x, y: (x, y), torch.randn(a), torch.randn(b))
    assert not tools.same_shape(*_placeholders(module))


def test_outputs_keep_their_node() -> None:
    module = traced(lambda x: (x.abs(), x.abs().exp()), torch.randn(3))
    first, second = calls(module.graph, aten.abs.default)
    assert not tools.replace_inner_uses(first, second)
    assert tools.replace_inner_uses(second, first)
    module.graph.eliminate_dead_code()
    assert operators(module.graph) == ["aten.abs", "aten.exp"]


def test_output_values_tell_shape_and_dtype() -> None:
    module = traced(lambda x: (x, x.bfloat16()), torch.randn(3, 2))
    assert tools.output_values(module.graph) == [(("3", "2"), FP32), (("3", "2"), BF16)]


def test_sort_puts_arguments_first() -> None:
    module = traced(lambda x: torch.relu(torch.exp(x)), torch.randn(3))
    (exp,) = calls(module.graph, aten.exp.default)
    (relu,) = calls(module.graph, aten.relu.default)
    relu.append(exp)
    with pytest.raises(RuntimeError):
        module.graph.lint()
    tools.sort(module.graph)
    module.graph.lint()
