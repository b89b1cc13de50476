"""Small tools to read and edit FX graphs of ATen operators."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
convert = torch.ops.prims.convert_element_type.default

# Operators that give the same elements in the same order another shape.
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)

# What a new node takes over from the node it stands for, so that it can be traced to the user's code.
_INHERITED_META = (
    "stack_trace",
    "nn_module_stack",
    "source_fn_stack",
    "fwd_nn_module_stack",
    "fwd_source_fn_stack",
    "original_aten",
    "seq_nr",
    "partitioner_tag",
)


def value(node: Any) -> Any:
    """The fake tensor (or symbolic number) that stands for the node's result; None if unknown."""
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def dtype(node: Any) -> torch.dtype | None:
    """The dtype of the tensor a node produces; None if it produces no tensor."""
    result = value(node)
    return result.dtype if isinstance(result, torch.Tensor) else None


def calls(graph: fx.Graph, *targets: Any) -> Iterator[fx.Node]:
    """The nodes that call one of ``targets``, in graph order; the graph may be edited meanwhile."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in targets:
            yield node


def is_call(node: Any, *targets: Any) -> bool:
    """Whether ``node`` is a call of one of ``targets``."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_cast(node: Any) -> bool:
    """Whether ``node`` only converts a tensor to another dtype."""
    return is_call(node, convert)


def is_rounding(node: Any) -> bool:
    """Whether ``node`` only converts a tensor to BF16."""
    return is_cast(node) and dtype(node) == torch.bfloat16


def is_view(node: Any) -> bool:
    """Whether ``node`` only gives a tensor another shape, its elements in the same order."""
    return is_call(node, *VIEWS)


def only_user(node: Any) -> Any:
    """The only user of ``node``; None if it has more or none, or is no node."""
    users = list(node.users) if isinstance(node, fx.Node) else []
    return users[0] if len(users) == 1 else None


def emit(origin: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call at the graph's insertion point, in the name of ``origin``.

    The new node knows its value (by running ``target`` on fake tensors) and points to the same line of
    the user's source as ``origin``.
    """
    node = origin.graph.call_function(target, args, kwargs)
    inherit_origin(node, origin)
    fill_value(node)
    return node


def inherit_origin(node: fx.Node, origin: fx.Node) -> None:
    """Let ``node`` point to the user's code that ``origin`` came from."""
    for key in _INHERITED_META:
        if key in origin.meta:
            node.meta[key] = origin.meta[key]


def fill_value(node: fx.Node) -> None:
    """Compute ``node.meta["val"]`` from the values of its arguments."""
    args, kwargs = tree_map_only(fx.Node, value, (node.args, node.kwargs))
    # Views are compiled as reshapes, after passes that have changed strides.
    target = aten.reshape.default if node.target is aten.view.default else node.target
    # PyTorch 2.8 needs the Python dispatcher where sizes are symbolic.
    with _fake_mode(node.graph) or contextlib.nullcontext(), enable_python_dispatcher():
        node.meta["val"] = target(*args, **kwargs)  # type: ignore[operator]


def _fake_mode(graph: fx.Graph) -> Any:
    """The mode in which the graph's values are fake; None for a graph without any."""
    for node in graph.nodes:
        mode = getattr(value(node), "fake_mode", None)
        if mode is not None:
            return mode
    return None


def cast(origin: fx.Node, tensor: fx.Node, to: torch.dtype) -> fx.Node:
    """``tensor`` as dtype ``to``; the node itself where it already has it."""
    return tensor if dtype(tensor) == to else emit(origin, convert, tensor, to)


def sizes(node: fx.Node) -> list[Any]:
    """The node's shape as arguments of a view: numbers, and the nodes that hold symbolic sizes.

    The nodes found may stand behind the insertion point; :func:`sort` puts them in order.
    """
    return [size_argument(node.graph, size) for size in value(node).shape]


def size_argument(graph: fx.Graph, size: int | torch.SymInt) -> fx.Node | int:
    """A size as an argument of a call, as :func:`sizes` gives them."""
    return size if isinstance(size, int) else _holder_of(graph, size)


def _holder_of(graph: fx.Graph, size: torch.SymInt) -> fx.Node | int:
    for node in graph.nodes:
        held = value(node)
        if isinstance(held, torch.SymInt) and same_size(held, size):
            return node  # type: ignore[no-any-return]
    (*inputs,) = graph.find_nodes(op="placeholder")
    for node in inputs:
        for axis, held in enumerate(getattr(value(node), "shape", ())):
            if same_size(held, size):
                with graph.inserting_after(inputs[-1]):
                    return emit(node, aten.sym_size.int, node, axis)
    return -1


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether the shapes are known to be equal, without adding a guard on symbolic sizes."""
    first, second = value(a), value(b)
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return False
    if first.dim() != second.dim():
        return False
    return all(same_size(x, y) for x, y in zip(first.shape, second.shape, strict=True))


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are known to be equal, without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)


def likely_size(size: int | torch.SymInt) -> int:
    """A size as a number: of a symbolic one the number it was captured with, without a guard.

    A size that depends on data has none; it counts as large.
    """
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 2**31


def sort(graph: fx.Graph) -> None:
    """Bring the nodes into an order in which every node stands behind its arguments."""
    stable_topological_sort(graph)


def escapes(node: fx.Node) -> bool:
    """Whether the caller gets the memory of ``node``: as an output, or through a view of it.

    Two such nodes must not become one, nor one become a name of an input: what the caller writes to
    one of them in place would appear in the other.
    """
    return any(user.op == "output" or (may_alias(user) and escapes(user)) for user in node.users)


def may_alias(node: fx.Node) -> bool:
    """Whether the result may be a view of an argument."""
    if node.target in (operator.getitem, aten._unsafe_view.default):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info for result in schema.returns)


def replace_inner_uses(node: fx.Node, replacement: fx.Node) -> bool:
    """Let everything but the graph's outputs use ``replacement`` in place of ``node``.

    Outputs are left alone because the caller was promised their aliasing and strides.
    Returns whether any use changed.
    """
    changed = node.replace_all_uses_with(
        replacement,
        delete_user_cb=lambda user: user.op != "output" and user is not replacement,
        propagate_meta=False,
    )
    return bool(changed)


def output_values(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Shape and dtype of every output: what a pass has to leave as it is."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    signature: list[tuple[Any, ...]] = []
    for leaf in torch.utils._pytree.tree_leaves(output.args):
        result = value(leaf)
        if isinstance(result, torch.Tensor):
            signature.append((tuple(map(str, result.shape)), result.dtype))
        else:
            signature.append((type(leaf).__name__,))
    return signature


def count(graph: fx.Graph, *targets: Any) -> int:
    """How many nodes call one of ``targets``."""
    return sum(1 for _ in calls(graph, *targets))
