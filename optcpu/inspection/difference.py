"""What differs between two stages, node by node."""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from optcpu.inspection.code import lines_of
from optcpu.inspection.model import Node, Stage


@dataclass(frozen=True)
class Row:
    """One line of a side-by-side view: a node before, after, or both.

    Attributes:
        before, after: the node with its name on either side; None where it is missing. A node that
            has moved is in two rows.
    """

    before: Node | None
    after: Node | None


def align(before: Stage, after: Stage) -> list[Row]:
    """Put the nodes of two stages side by side so that as many as possible face themselves.

    A node is known by its name. Nodes whose order has changed are shown at both places.
    """
    position = {node.name: i for i, node in enumerate(before.nodes)}
    common = [(position[n.name], j) for j, n in enumerate(after.nodes) if n.name in position]
    kept = _longest_increasing([i for i, _ in common])
    anchors = [common[k] for k in kept]
    rows: list[Row] = []
    i = j = 0
    for next_i, next_j in [*anchors, (len(before), len(after))]:
        rows += [Row(node, None) for node in before.nodes[i:next_i]]
        rows += [Row(None, node) for node in after.nodes[j:next_j]]
        if next_i < len(before):
            rows.append(Row(before.nodes[next_i], after.nodes[next_j]))
        i, j = next_i + 1, next_j + 1
    return rows


def _longest_increasing(values: Sequence[int]) -> list[int]:
    """Indices of the longest increasing subsequence of distinct ``values``, by patience sorting."""
    ends: list[int] = []  # smallest last value of a subsequence of each length
    holders: list[int] = []  # index of that value
    previous: list[int] = []
    for index, value in enumerate(values):
        length = bisect_left(ends, value)
        previous.append(holders[length - 1] if length else -1)
        ends[length : length + 1] = [value]
        holders[length : length + 1] = [index]
    chain: list[int] = []
    index = holders[-1] if holders else -1
    while index >= 0:
        chain.append(index)
        index = previous[index]
    return chain[::-1]


def unified(before: Stage, after: Stage, context: int = 3) -> str:
    """The difference as ``diff -u`` would print it; empty if there is none.

    Args:
        before, after: the stages.
        context: unchanged lines around each change.
    """
    return "\n".join(
        difflib.unified_diff(
            lines_of(before),
            lines_of(after),
            before.name,
            after.name,
            n=context,
            lineterm="",
        )
    )
