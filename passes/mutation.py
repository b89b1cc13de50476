"""Inputs that a forward graph overwrites, and the backward wants as they were.

What a module reads from a buffer may be computed anew in the backward, from the buffer: a running
statistic, or a counter, that the same call has changed by then. PyTorch's partitioner does not see that,
and gradients would be wrong without a word (PyTorch 2.13; autograd itself raises).
"""

from __future__ import annotations

from torch import fx

from passes.graph import aten, calls, emit, is_view


def save_before_overwriting(graph: fx.Graph) -> int:
    """Have a forward graph return copies of those inputs that it overwrites; return of how many.

    Before::

        copy_(buffer, new); return y, buffer

    After::

        old = clone(buffer); copy_(buffer, new); return y, old
    """
    overwriting = {node.args[0]: node for node in reversed(list(calls(graph, aten.copy_.default)))}
    (output,) = graph.find_nodes(op="output")
    copies = 0
    for node in output.all_input_nodes:
        first = overwriting.get(_source(node))
        if first is not None and node < first:
            with graph.inserting_before(first):
                output.replace_input_with(node, emit(node, aten.clone.default, node))
            copies += 1
    return copies


def _source(node: fx.Node) -> fx.Node:
    while is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node
