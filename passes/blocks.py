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

Blocks meet where the fewest bytes go from one to the next: what is fused across that line is little.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

from passes.graph import aten, convert, dtype, is_call, may_alias, value
from passes.layout import has_convolution

_invoke = torch.ops.higher_order.invoke_subgraph
_prims = torch.ops.prims

SMALLEST_BLOCK = 8  # nodes; less is not worth a call
_PERIODS_TRIED = 32
_MOST_BETWEEN = 16  # nodes that may stand between two of a block
_NEVER = 1 << 60  # bytes: what must not go from one block to the next

# Each block gets a fill of its own, which generated code holds in a register; as an argument it would
# be a tensor in memory.
_FILLS = (aten.full.default, aten.scalar_tensor.default)


@dataclass(frozen=True)
class Blocks:
    """Blocks that share their code: how many, and how many nodes each has."""

    count: int
    size: int


def share_blocks(module: fx.GraphModule) -> list[Blocks]:
    """Write equal blocks of ``module.graph`` once each, as subgraphs of ``module``, in place.

    Graphs with symbolic sizes are left alone, and graphs with convolutions, whose layouts Inductor
    chooses for the graph as a whole.

    Returns:
        What was found; no entry if nothing repeats.
    """
    graph = module.graph
    if _has_symbols(graph) or has_convolution(graph):
        return []
    found: list[Blocks] = []
    constants = _move_constants_to_front(graph)
    nodes = [n for n in graph.nodes if n.op == "call_function" and n not in constants]
    signatures: list[Any] = [_signature(node) for node in nodes]
    while run := _longest_run(signatures):
        rows = _equal_blocks(nodes, _cut(nodes, run))
        if len(rows) < 2:
            signatures[run.start : run.stop] = [None] * (run.stop - run.start)
            continue
        rows = _with_near_ones(nodes, signatures, rows)
        for index in chain.from_iterable(rows):
            signatures[index] = None
        blocks = [[nodes[index] for index in row] for row in rows]
        _call_once_written(module, f"block_{len(found)}", blocks)
        found.append(Blocks(len(blocks), len(blocks[0])))
    graph.eliminate_dead_code()
    module.recompile()
    return found


def _has_symbols(graph: fx.Graph) -> bool:
    return any(
        isinstance(size, torch.SymInt)
        for node in graph.nodes
        for leaf in tree_leaves(value(node))
        for size in (leaf.shape if isinstance(leaf, Tensor) else (leaf,))
    )


def _move_constants_to_front(graph: fx.Graph) -> set[fx.Node]:
    """Move what depends on no input to the front: the first block of several that use it has made it.

    Of random numbers, only the seeds move: the numbers themselves are made where they are used.

    Returns:
        What was moved.
    """
    constant: set[fx.Node] = set()
    inputs = graph.find_nodes(op="placeholder")
    if not inputs:
        return constant
    last = inputs[-1]
    for node in list(graph.nodes):
        if node.op == "get_attr" or (
            node.op == "call_function"
            and _is_repeatable(node)
            and all(before in constant for before in node.all_input_nodes)
        ):
            constant.add(node)
            last.append(node)
            last = node
    return constant


def _is_repeatable(node: fx.Node) -> bool:
    if is_call(node, _prims.inductor_seeds.default, _prims.inductor_lookup_seed.default):
        return True
    if is_call(node, _prims.inductor_random.default, _prims.inductor_randint.default):
        return False
    if node.target is operator.getitem:
        return True
    tags = getattr(node.target, "tags", (torch.Tag.nondeterministic_seeded,))
    return torch.Tag.nondeterministic_seeded not in tags and not _is_mutable(node)


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or schema.is_mutable


# Nodes that do the same have the same signature.


def _signature(node: fx.Node) -> str | None:
    """What a node computes from what kind of values; None if it may be in no block."""
    if node.target is not operator.getitem and _is_mutable(node):
        return None
    if any(value(argument) is None for argument in (node, *node.all_input_nodes)):
        return None
    arguments = tree_map_only(fx.Node, _kind_of, (node.args, node.kwargs))
    return f"{node.target} {arguments!r} {_kind_of(node)!r}"


def _kind_of(node: fx.Node) -> Any:
    kind = tree_map_only(Tensor, _layout, value(node))
    return (kind, str(node.target), repr(node.args)) if is_call(node, *_FILLS) else kind


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), str(tensor.dtype)


# Where something repeats.

_Row = Sequence[int]  # the places of a block's nodes in the graph's order


@dataclass(frozen=True)
class _Run:
    """Nodes ``start`` to ``stop`` (exclusive), each as the one ``period`` nodes behind it."""

    start: int
    stop: int
    period: int

    @property
    def blocks(self) -> int:
        return (self.stop - self.start) // self.period

    @property
    def saved(self) -> int:
        """How many nodes need no code of their own."""
        return (self.blocks - 1) * self.period


def _longest_run(signatures: Sequence[str | None]) -> _Run | None:
    """The run that saves most nodes, of the shortest blocks if several do."""
    runs = [run for period in _likely_periods(signatures) for run in _runs(signatures, period)]
    return max(runs, key=lambda run: (run.saved, -run.period), default=None)


def _likely_periods(signatures: Sequence[str | None]) -> list[int]:
    """Distances between a node and the next one like it, the most frequent ones."""
    seen: dict[str, int] = {}
    distances: Counter[int] = Counter()
    for index, signature in enumerate(signatures):
        if signature is None:
            continue
        if signature in seen:
            distances[index - seen[signature]] += 1
        seen[signature] = index
    return [
        distance
        for distance, _ in distances.most_common(_PERIODS_TRIED)
        if distance >= SMALLEST_BLOCK
    ]


def _runs(signatures: Sequence[str | None], period: int) -> Iterator[_Run]:
    """All runs of at least two blocks of ``period`` nodes."""
    start = 0
    for index in range(len(signatures)):
        ahead = index + period
        same = ahead < len(signatures) and signatures[index] == signatures[ahead] is not None
        if not same:
            if index - start >= period:
                yield _Run(start, ahead, period)
            start = index + 1


def _cut(nodes: Sequence[fx.Node], run: _Run) -> list[_Row]:
    """Cut a run into blocks where the fewest bytes go from one to the next."""
    crossing = _bytes_crossing(nodes, run)
    spare = run.stop - run.start - run.blocks * run.period
    # Cuts that leave a block less at the ends; not if few are left.
    offsets = range(run.period if run.blocks > 3 else spare + 1)
    offset = min(offsets, key=lambda o: (crossing[o], o > spare, o))
    starts = range(run.start + offset, run.stop - run.period + 1, run.period)
    return [range(start, start + run.period) for start in starts]


def _bytes_crossing(nodes: Sequence[fx.Node], run: _Run) -> list[int]:
    """For each offset of the first block, how much the second gets from before it."""
    place = {nodes[index]: index for index in range(run.start, run.stop)}
    first = run.start + run.period  # the second block's start if the first has offset 0
    change = [0] * (run.period + 1)
    for node, index in place.items():
        last_use = max((place.get(user, -1) for user in node.users), default=-1)
        begin, end = max(index + 1, first), min(last_use + 1, first + run.period)
        if begin < end:
            change[begin - first] += _bytes_of(node)
            change[end - first] -= _bytes_of(node)
    totals, total = [], 0
    for step in change[:-1]:
        total += step
        totals.append(total)
    return totals


def _bytes_of(node: fx.Node) -> int:
    result = value(node)
    return result.numel() * result.element_size() if isinstance(result, Tensor) else _NEVER


# What is wired in the same way.


def _equal_blocks(nodes: Sequence[fx.Node], rows: Sequence[_Row]) -> list[_Row]:
    """The most blocks in a row whose nodes are connected in the same way."""
    best: list[_Row] = []
    alike: list[_Row] = []
    wiring: Any = None
    for row in rows:
        own = _wiring([nodes[index] for index in row])
        alike = [*alike, row] if alike and own == wiring else [row]
        wiring = own
        if own is not None and len(alike) > len(best):
            best = alike
    return best


def _with_near_ones(
    nodes: Sequence[fx.Node], signatures: Sequence[str | None], rows: Sequence[_Row]
) -> list[_Row]:
    """``rows`` and the blocks before and behind them that have other nodes in between.

    The first block often makes what all of them use, and the last backward computes anew what comes
    before the first.
    """
    found = list(rows)
    wiring = _wiring([nodes[index] for index in rows[0]])

    def near(start: int, step: int) -> _Row | None:
        pattern = [signatures[index] for index in rows[0]][::step]
        row = _find(signatures, pattern, start, step)
        if row is None:
            return None
        inside = {nodes[index] for index in row}
        between = {nodes[index] for index in range(row[0], row[-1])} - inside
        depends = any(before in inside for node in between for before in node.all_input_nodes)
        same = _wiring([nodes[index] for index in row]) == wiring
        return row if same and not depends else None

    while row := near(found[-1][-1] + 1, 1):
        found.append(row)
    while row := near(found[0][0] - 1, -1):
        found.insert(0, row)
    return found


def _find(
    signatures: Sequence[str | None], pattern: Sequence[str | None], start: int, step: int
) -> _Row | None:
    """The places, in graph order, of nodes like ``pattern`` from ``start`` on, with others between."""
    places: list[int] = []
    index = start
    for wanted in pattern:
        passed_by = 0
        while 0 <= index < len(signatures) and signatures[index] != wanted:
            index += step
            passed_by += 1
            if passed_by > _MOST_BETWEEN:
                return None
        if not 0 <= index < len(signatures):
            return None
        places.append(index)
        index += step
    return places[::step]


def _wiring(block: Sequence[fx.Node]) -> list[int] | None:
    """For each argument of each node its place in the block, -1 if it is from outside.

    None if something from outside, or something that others use, is no tensor.
    """
    place = {node: index for index, node in enumerate(block)}
    wiring: list[int] = []
    for node in block:
        for argument in _arguments(node):
            wiring.append(place.get(argument, -1))
            if argument not in place and not isinstance(value(argument), Tensor):
                return None
        if not isinstance(value(node), Tensor) and any(user not in place for user in node.users):
            return None
    return wiring


def _arguments(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments, in order and as often as they appear, but no fills."""
    leaves = tree_leaves((node.args, node.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node) and not is_call(leaf, *_FILLS)]


# Writing one and calling it.


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
        for number, arguments in enumerate(zip(*map(_arguments, alike), strict=True)):
            if arguments[0] not in inside:
                slots.setdefault(arguments, (place, number))
    return list(slots.values())


def _at(block: Sequence[fx.Node], slots: Sequence[_Slot]) -> list[fx.Node]:
    return [_arguments(block[place])[number] for place, number in slots]


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
