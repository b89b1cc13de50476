"""Where a graph repeats itself: blocks of nodes that compute the same, from other values.

Nodes that do the same to values of the same shape, strides and dtype have the same signature. A row of
equal layers is a run of signatures that repeats with a period. Where it is cut into blocks is free, and
blocks meet where the fewest bytes go from one to the next: what is fused across that line is little.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

from passes.graph import aten, is_call, may_alias, value

SMALLEST_BLOCK = 16  # nodes; less is not worth a call, across which nothing is fused
LEAST_SAVED = 32  # nodes that need no code of their own; fewer are written soon
_PERIODS_TRIED = 32
_MOST_BETWEEN = 16  # nodes that may stand between two of a block
_NEVER = 1 << 60  # bytes: what must not go from one block to the next

# Every block gets a fill of its own, which generated code holds in a register: as an argument it would
# be a tensor in memory.
_FILLS = (aten.full.default, aten.scalar_tensor.default)

# They count from the beginning of the memory that their argument is a part of, which is not the same for
# the arguments of all blocks, and unknown to a function that is called with them.
_READ_BEYOND_ARGUMENT = (
    aten.as_strided.default,
    aten.as_strided_copy.default,
    aten.as_strided_scatter.default,
)

_IS_WRITTEN = "optcpu_is_written"

_Row = Sequence[int]  # the places of a block's nodes in the graph's order


def equal_blocks(nodes: Sequence[fx.Node]) -> Iterator[list[list[fx.Node]]]:
    """Rows of equal blocks, those that save most nodes first.

    Args:
        nodes: of one graph, in its order; fills (:func:`is_fill`) may be left out.

    Yields:
        At least two blocks: lists of nodes of the same length, connected in the same way. What stands
        between two nodes of a block depends on none of them. No node is in two blocks. The graph may be
        edited before the next row is asked for.
    """
    signatures = [_signature(node) for node in nodes]
    while run := _longest_run(signatures):
        rows = _connected_alike(nodes, _cut(nodes, run))
        if (len(rows) - 1) * run.period < LEAST_SAVED:
            signatures[run.start : run.stop] = [None] * (run.stop - run.start)
            continue
        rows = _with_near_ones(nodes, signatures, rows)
        for index in chain.from_iterable(rows):
            signatures[index] = None
        yield [[nodes[index] for index in row] for row in rows]


def arguments_of(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments, in order and as often as they appear, but no fills."""
    leaves = tree_leaves((node.args, node.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node) and not is_fill(leaf)]


def is_fill(node: fx.Node) -> bool:
    """Whether a node makes a tensor of one number that is known, and stays so."""
    return is_call(node, *_FILLS) and not node.all_input_nodes and not is_written(node)


def is_mutable(node: fx.Node) -> bool:
    """Whether a node may write to its arguments; what has no schema may."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or schema.is_mutable


def is_written(node: fx.Node) -> bool:
    """Whether something may write to the result of a node once that is computed.

    Noted in the node's ``meta``, as what all layers use has many users: sharing code changes nothing of it.
    """
    if _IS_WRITTEN not in node.meta:
        node.meta[_IS_WRITTEN] = any(
            is_written(user)
            if user.target is operator.getitem or may_alias(user)
            else user.op == "call_function" and is_mutable(user)
            for user in node.users
        )
    return bool(node.meta[_IS_WRITTEN])


def _signature(node: fx.Node) -> str | None:
    """What a node computes from what kind of values; None if it may be in no block."""
    if node.target is not operator.getitem and is_mutable(node):
        return None
    if is_call(node, *_READ_BEYOND_ARGUMENT):
        return None
    if any(value(argument) is None for argument in (node, *node.all_input_nodes)):
        return None
    arguments = tree_map_only(fx.Node, _kind_of, (node.args, node.kwargs))
    return f"{node.target} {arguments!r} {_kind_of(node)!r}"


def _kind_of(node: fx.Node) -> Any:
    kind = tree_map_only(Tensor, _layout, value(node))
    if not is_fill(node):
        return kind
    return kind, str(node.target), repr((node.args, node.kwargs))


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), str(tensor.dtype)


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
    runs = [
        run
        for period in _likely_periods(signatures)
        for run in _runs(signatures, period)
        if run.saved >= LEAST_SAVED
    ]
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


def _connected_alike(nodes: Sequence[fx.Node], rows: Sequence[_Row]) -> list[_Row]:
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
        between = set(range(row[0], row[-1])) - set(row)
        # None: what may write to something, or belongs to a block already.
        if any(signatures[index] is None for index in between):
            return None
        depends = any(
            before in inside for index in between for before in nodes[index].all_input_nodes
        )
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
        for argument in arguments_of(node):
            wiring.append(place.get(argument, -1))
            if argument not in place and not isinstance(value(argument), Tensor):
                return None
        if not isinstance(value(node), Tensor) and any(user not in place for user in node.users):
            return None
    return wiring
