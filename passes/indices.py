"""Indices that data bring along, checked before generated code reads by them.

Generated code checks an index where it uses it, within a parallel loop, from which no error gets out:
one token or label that is out of range ends the process, and with it the training.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from passes.base import Pass
from passes.graph import VIEWS, aten, calls, dtype, emit, is_call, size_argument, value
from passes.operators import COMPILED, define


def _checked_index(index: Tensor, size: int, wraps: bool, place: str) -> Tensor:
    """A copy of ``index``, of which every element is one of ``size`` rows.

    Args:
        index: int32 or int64, any shape.
        size: of the dimension that is indexed.
        wraps: whether -1 is the last row.
        place: in the user's code, for the message.

    Raises:
        IndexError: an element is out of range.
    """
    if index.numel():
        low, high = (int(bound) for bound in torch.aminmax(index))
        least = -size if wraps else 0
        if low < least or high >= size:
            wrong = high if high >= size else low
            raise IndexError(
                f"index {wrong} is out of range{place}: {least} to {size - 1} were expected"
            )
    return index.clone()


checked_index = define(
    "checked_index(Tensor index, SymInt size, bool wraps, str place) -> Tensor",
    _checked_index,
    lambda index, size, wraps, place: torch.empty_like(index),
    COMPILED,
)

# Give all elements of a tensor another order or shape, or have them several times. (Where only a part is
# taken, the rest may be anything: another column of features, say.)
_RESHAPING = (
    *VIEWS,
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default),
    *(aten.expand.default, aten.permute.default, aten.transpose.int, aten.t.default),
    *(aten.clone.default, aten.alias.default),
)
# Operators on (table, axis, index, ...).
_ALONG_ONE_AXIS = (
    *(aten.gather.default, aten.scatter.value, aten.scatter.src, aten.scatter_add.default),
    *(aten.scatter.reduce, aten.scatter.value_reduce, aten.scatter_reduce.two),
)


@dataclass(frozen=True, repr=False)
class CheckIndices(Pass):
    """Check the indices that come from data: one that is out of range is an error, and not the end.

    Before::

        y = embedding(weight, tokens); p = gather(log_p, 1, unsqueeze(labels, 1))

    After::

        y = embedding(weight, checked_index(tokens, 50257))
        p = gather(log_p, 1, unsqueeze(checked_index(labels, 1000), 1))

    What is written at such places (``index_put``, ``scatter`` and their like) is checked as well. The
    backward uses the same indices, and needs no check of its own. Left alone is what the graph has
    computed of floating-point numbers or counted itself, by ``sort``, ``argmax`` or ``arange`` say, but
    for embeddings (of positions). Fires once for each index of an operator.
    """

    def __call__(self, graph: fx.Graph) -> int:
        fired = 0
        for node in _forward(graph, aten.embedding.default):
            fired += _check(node, node.args[1], node.args[0], 0, wraps=False)
        for node in _forward(graph, *_ALONG_ONE_AXIS):
            table, axis, index = node.args[:3]
            if _comes_with_data(index):
                fired += _check(node, index, table, axis, wraps=False)
        for node in _forward(graph, aten.index.Tensor, aten.index_put.default):
            table, indices = node.args[:2]
            for axis, index in enumerate(indices):  # type: ignore[arg-type, var-annotated]
                # A mask takes as many axes as it has: what follows it stands elsewhere.
                if dtype(index) in (torch.bool, torch.uint8):
                    break
                if index is not None and _comes_with_data(index):
                    fired += _check(node, index, table, axis, wraps=True)
        graph.eliminate_dead_code()
        return fired


def _forward(graph: fx.Graph, *targets: Any) -> list[fx.Node]:
    """The calls of ``targets`` that are not the backward of others."""
    found = calls(graph, *targets)
    return [node for node in found if node.meta.get("partitioner_tag") != "is_backward"]


def _comes_with_data(index: Any) -> bool:
    """Whether ``index`` is computed of integers that the graph is given, element by element."""
    to_visit, seen = [index], set()
    while to_visit:
        node = to_visit.pop()
        if not isinstance(node, fx.Node) or node in seen or not _holds_integers(node):
            continue
        seen.add(node)
        if node.op == "placeholder":
            return True
        to_visit.extend(node.all_input_nodes)
    return False


def _holds_integers(node: fx.Node) -> bool:
    kind = dtype(node)
    return kind is not None and not kind.is_floating_point and not kind.is_complex


def _check(node: fx.Node, index: Any, table: Any, axis: Any, *, wraps: bool) -> int:
    """Let ``node`` use ``index`` behind a check against an axis of ``table``."""
    if not isinstance(index, fx.Node) or not isinstance(value(index), Tensor):
        return 0
    chain = []
    base = index
    while is_call(base, *_RESHAPING):  # an index may have been expanded: look at each number once
        chain.append(base)
        base = base.args[0]  # type: ignore[assignment]
    size = value(table).shape[axis] if value(table).dim() else 1
    with node.graph.inserting_before(node):
        checked = emit(
            node, checked_index, base, size_argument(node.graph, size), wraps, place_of(node)
        )
        for step in reversed(chain):
            checked = emit(step, step.target, checked, *step.args[1:], **step.kwargs)  # type: ignore[arg-type]
    node.replace_input_with(index, checked)
    return 1


def place_of(node: fx.Node) -> str:
    """Where ``node`` is from, as words behind others: a module of PyTorch's, else a line of code."""
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    if modules:
        path, kind = modules[-1]
        if getattr(kind, "__module__", "").startswith("torch.nn."):
            name = re.sub(r"^L\['\w+'\]\.(__self__\.)?", "", path)
            name = re.sub(r"_modules\['([^']+)'\]", r"\1", name)  # as PyTorch 2.8 writes it
            return f" in {kind.__name__} {name!r}"
    trace = str(node.meta.get("stack_trace") or "").strip().splitlines()
    # A line of marks follows the one of which it marks a part.
    lines = [line.strip() for line in trace if line.strip(" ^~")]
    return f" in `{lines[-1]}`" if lines else ""


__all__ = ["CheckIndices", "checked_index", "place_of"]
