"""Equal blocks of a graph become calls of one function, so that code is generated for them once.

A network of equal layers is captured as one long graph in which every layer's operators stand anew, and
the code generator goes through all of them. Here runs of nodes that repeat are found and written once, as
a subgraph that is called with each layer's own weights and activations.

Before::

    a = add(relu(mm(x, w0)), x)
    b = add(relu(mm(a, w1)), a)

After::

    a = invoke_subgraph(block, "block", x, w0)[0]
    b = invoke_subgraph(block, "block", a, w1)[0]
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from passes import ops
from passes.graph import aten, convert, dtype, is_call, may_alias, value
from passes.repeats import arguments_of, equal_blocks, is_mutable, is_written

_invoke = torch.ops.higher_order.invoke_subgraph
_prims = torch.ops.prims


@dataclass(frozen=True)
class Blocks:
    """Blocks that share their code: how many, and how many nodes each has."""

    count: int
    size: int


def share_blocks(module: fx.GraphModule) -> list[Blocks]:
    """Write equal blocks of ``module.graph`` once each, as subgraphs of ``module``, in place.

    Graphs with symbolic sizes are left alone. So is what stands between convolutions of images, forward
    or backward: Inductor chooses the layouts there, for all of them together.

    Returns:
        What was found; no entry if nothing repeats.
    """
    graph = module.graph
    if not graph.find_nodes(op="placeholder") or _has_symbols(graph):
        return []
    found: list[Blocks] = []
    constants = _constants(graph)
    nodes = [n for n in graph.nodes if n.op == "call_function" and n not in constants]
    for blocks in equal_blocks(_beside_convolutions(nodes)):
        if not found:
            _move_to_front(graph, constants)
        _call_once_written(module, f"block_{len(found)}", blocks)
        found.append(Blocks(len(blocks), len(blocks[0])))
    if found:
        graph.eliminate_dead_code()
        module.recompile()
    return found


def _has_symbols(graph: fx.Graph) -> bool:
    return any(
        isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool))
        for node in graph.nodes
        for leaf in tree_leaves(value(node))
        for size in (leaf.shape if isinstance(leaf, Tensor) else (leaf,))
    )


def _beside_convolutions(nodes: Sequence[fx.Node]) -> Sequence[fx.Node]:
    """The nodes behind the last convolution of images, before the first backward of one."""
    forward = [
        i
        for i, node in enumerate(nodes)
        if _is_on_images(node, aten.convolution.default, ops.convolution)
    ]
    backward = [
        i
        for i, node in enumerate(nodes)
        if _is_on_images(node, aten.convolution_backward.default, ops.convolution_backward)
    ]
    return nodes[forward[-1] + 1 if forward else 0 : backward[0] if backward else len(nodes)]


def _is_on_images(node: fx.Node, *convolutions: Any) -> bool:
    return is_call(node, *convolutions) and value(node.args[0]).dim() > 3


def _constants(graph: fx.Graph) -> dict[fx.Node, None]:
    """What depends on no input, in order: the first block of several that use it has made it.

    What is written to later is no constant, nor is what is made of it. Of random numbers, only the seeds
    belong to it: the numbers themselves are made where they are used.
    """
    constants: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function"
            and _is_repeatable(node)
            and not is_written(node)
            and all(before in constants for before in node.all_input_nodes)
        ):
            constants[node] = None
    return constants


def _move_to_front(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Move ``nodes``, which depend on each other only, right behind the inputs."""
    (*_, last) = graph.find_nodes(op="placeholder")
    for node in nodes:
        last.append(node)
        last = node


def _is_repeatable(node: fx.Node) -> bool:
    if is_call(node, _prims.inductor_seeds.default, _prims.inductor_lookup_seed.default):
        return True
    if is_call(node, _prims.inductor_random.default, _prims.inductor_randint.default):
        return False
    if node.target is operator.getitem:
        return True
    tags = getattr(node.target, "tags", (torch.Tag.nondeterministic_seeded,))
    return torch.Tag.nondeterministic_seeded not in tags and not is_mutable(node)


def _call_once_written(
    module: fx.GraphModule, name: str, blocks: Sequence[Sequence[fx.Node]]
) -> None:
    """Put a subgraph of what the blocks compute into ``module``, and calls of it in their places."""
    operands = _operands(blocks)
    outputs = _outputs(blocks)
    subgraph = _subgraph(blocks[0], _at(blocks[0], operands), outputs)
    module.add_module(name, fx.GraphModule(module, subgraph))
    for block in blocks:
        _replace(block, name, _at(block, operands), outputs)


_Slot = tuple[int, int]  # which node of a block, and which of its arguments


def _operands(blocks: Sequence[Sequence[fx.Node]]) -> list[_Slot]:
    """Where the blocks get something from outside; once if all get the same there as elsewhere."""
    slots: dict[tuple[fx.Node, ...], _Slot] = {}
    inside = set(blocks[0])
    for place, alike in enumerate(zip(*blocks, strict=True)):
        for number, arguments in enumerate(zip(*map(arguments_of, alike), strict=True)):
            if arguments[0] not in inside:
                slots.setdefault(arguments, (place, number))
    return list(slots.values())


def _at(block: Sequence[fx.Node], slots: Sequence[_Slot]) -> list[fx.Node]:
    return [arguments_of(block[place])[number] for place, number in slots]


def _outputs(blocks: Sequence[Sequence[fx.Node]]) -> list[int]:
    """The places in a block whose values are used outside of one of them.

    A view is made anew outside, from what it is a view of: a function whose results share memory
    with each other or with its arguments would hide that from the code generator.
    """
    places: set[int] = set()
    for block in blocks:
        place = {node: index for index, node in enumerate(block)}
        for node in block:
            if any(user not in place for user in node.users):
                places.update(place[root] for root in _roots(node, place))
    return sorted(places)


def _roots(node: fx.Node, inside: Any) -> Iterator[fx.Node]:
    """The node itself if it has memory of its own, else what in the block it is a view of."""
    if not _is_alias(node):
        yield node
        return
    for argument in node.all_input_nodes:
        if argument in inside:
            yield from _roots(argument, inside)


def _is_alias(node: fx.Node) -> bool:
    """Whether a node's result is, or may be, the memory of its argument."""
    if node.target is operator.getitem:
        (source,) = node.all_input_nodes
        return _is_alias(source)
    if is_call(node, convert):
        return dtype(node) == dtype(node.args[0])
    return may_alias(node)


def _subgraph(
    block: Sequence[fx.Node], operands: Sequence[fx.Node], outputs: Sequence[int]
) -> fx.Graph:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for index, operand in enumerate(operands):
        copies[operand] = graph.placeholder(f"arg{index}")
        copies[operand].meta["val"] = value(operand)
    for node in block:
        for argument in node.all_input_nodes:
            if argument not in copies:  # a fill
                copies[argument] = _copy(argument, graph, copies)
        copies[node] = _copy(node, graph, copies)
    result = graph.output(tuple(copies[block[index]] for index in outputs))
    # Their strides are what the rest of the graph goes by.
    result.meta["user_visible_output_idxs"] = list(range(len(outputs)))
    return graph


def _copy(node: fx.Node, graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    duplicate = graph.node_copy(node, lambda argument: copies[argument])
    duplicate.meta = copy.copy(node.meta)
    return duplicate


def _replace(
    block: Sequence[fx.Node], name: str, operands: Sequence[fx.Node], outputs: Sequence[int]
) -> None:
    """Put a call of the subgraph ``name`` in the place of ``block``."""
    graph = block[0].graph
    with graph.inserting_after(block[-1]):
        function = graph.get_attr(name)
    with graph.inserting_after(function):
        call = graph.call_function(_invoke, (function, name, *operands))
    call.meta["val"] = tuple(value(block[index]) for index in outputs)
    outside: dict[fx.Node, fx.Node] = {}
    end = call.next
    with graph.inserting_before(end):
        for number, index in enumerate(outputs):
            result = graph.call_function(operator.getitem, (call, number))
            result.meta = copy.copy(block[index].meta)
            outside[block[index]] = result
        inside = set(block)
        for node in block:
            if any(user not in inside for user in node.users):
                replacement = _remade(node, inside, outside)
                node.replace_all_uses_with(
                    replacement,
                    delete_user_cb=lambda user: user not in inside,
                    propagate_meta=False,
                )
    for node in reversed(block):
        graph.erase_node(node)


def _remade(node: fx.Node, inside: set[fx.Node], outside: dict[fx.Node, fx.Node]) -> fx.Node:
    """What stands for ``node`` outside of its block: a result of the call, or a view of one."""
    if node not in outside and node in inside:
        for argument in node.all_input_nodes:
            outside.setdefault(argument, _remade(argument, inside, outside))
        outside[node] = _copy(node, node.graph, outside)
    return outside.get(node, node)
