"""The gradient of an embedding: a few rows are added to a table, which is not computed as a whole.

Autograd makes a table of zeros, as large as the weight, adds to the rows that were looked up, and where the
weight is used elsewhere as well (as the last layer of a language model), adds the whole table to the other
gradient.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from passes.base import Pass
from passes.graph import (
    aten,
    calls,
    cast,
    dtype,
    emit,
    is_call,
    is_cast,
    likely_size,
    may_alias,
    only_user,
    value,
)
from passes.operators import COMPILED, define

EMBEDDING_BACKWARD = aten.embedding_dense_backward.default


def _add_rows_(table: Tensor, rows: Tensor, values: Tensor, padding: int) -> None:
    """Add ``values`` to ``rows`` of ``table``, in FP32, and round once.

    Args:
        table: shape (V, K), FP32 or BF16.
        rows: integers, any shape; some may be there several times.
        values: the shape of ``rows``, and K.
        padding: the row that stays as it is; negative if there is none.
    """
    rows = rows.reshape(-1).long()
    values = values.reshape(-1, table.shape[1])
    if padding >= 0:
        values = torch.where((rows == padding).unsqueeze(1), 0.0, values)
    if table.dtype == torch.float32:
        table.index_add_(0, rows, values.float())
        return
    present, places = torch.unique(rows, return_inverse=True)
    sums = table.index_select(0, present).float()
    table.index_copy_(0, present, sums.index_add_(0, places, values.float()).to(table.dtype))


def _add_rows(table: Tensor, rows: Tensor, values: Tensor, padding: int) -> Tensor:
    """As :func:`_add_rows_`, to a copy of ``table``."""
    result = table.clone(memory_format=torch.contiguous_format)
    _add_rows_(result, rows, values, padding)
    return result


_ARGUMENTS = "Tensor rows, Tensor values, int padding"
add_rows = define(
    f"add_rows(Tensor table, {_ARGUMENTS}) -> Tensor",
    _add_rows,
    lambda table, *_: torch.empty_like(table, memory_format=torch.contiguous_format),
    COMPILED,
)
add_rows_ = define(
    f"add_rows_(Tensor(a!) table, {_ARGUMENTS}) -> ()", _add_rows_, lambda *_: None, COMPILED
)

_LEAST_NUMBERS = 4096


@dataclass(frozen=True, repr=False)
class AddEmbeddingGradient(Pass):
    """Add the gradient of an embedding to the other gradient of its weight, or to zeros in BF16.

    Before, where the weight is also that of a linear layer, and where its gradient is wanted as BF16::

        dw = add(mm(permute(dl), x), embedding_dense_backward(d, tokens, 50257))
        dw = bf16(add(f32(mm(permute(dl), x)), embedding_dense_backward(d, tokens, 50257)))
        de = bf16(embedding_dense_backward(d, tokens, 50257))

    After::

        dw = add_rows(mm(permute(dl), x), tokens, d)
        dw = add_rows(mm(permute(dl), x), tokens, d)
        de = add_rows(full([50257, 768], 0, bf16), tokens, d)

    which touches the rows of the tokens alone (:func:`add_in_place`). In FP32 only the order of adding
    changes; in BF16 these rows are rounded before and after, as every row is at least once. Left alone
    are tables of fewer than ``smallest_table`` numbers, and gradients that count how often a token comes.
    Fires once for each table.

    Args:
        smallest_table: rows times width; below, to add to zeros and then the tables takes no longer.
    """

    smallest_table: int = 2**18

    def __call__(self, graph: fx.Graph) -> int:
        fired = 0
        for node in calls(graph, EMBEDDING_BACKWARD):
            by_frequency = node.args[4]
            if not by_frequency and value(node).numel() >= self.smallest_table:
                fired += _rewrite(node)
        graph.eliminate_dead_code()
        return fired


def _rewrite(node: fx.Node) -> bool:
    """Replace what ``node`` is used for, if that can be done without the whole table."""
    gradient, rows, _, padding, _ = node.args
    user = only_user(node)
    total = user if is_call(user, aten.add.Tensor) and not user.kwargs else None
    result = user if total is None else only_user(total)
    narrow = is_cast(result) and dtype(result) == torch.bfloat16
    if total is None and not narrow:
        return False
    replaced = result if narrow else total
    assert isinstance(replaced, fx.Node)
    with replaced.graph.inserting_before(replaced):
        if total is None:
            shape = list(value(node).shape)
            table = emit(
                node, aten.full.default, shape, 0.0, dtype=torch.bfloat16, device=value(node).device
            )
        else:
            table = _other(total, node)
            if narrow and is_cast(
                table
            ):  # the FP32 copy of a product in BF16 has nothing more to tell
                table = table.args[0]  # type: ignore[assignment]
            table = cast(node, table, value(replaced).dtype)
            if value(table).shape != value(node).shape:
                return False
        replaced.replace_all_uses_with(emit(node, add_rows, table, rows, gradient, padding))
    return True


def _other(total: fx.Node, node: fx.Node) -> fx.Node:
    first, second = total.args
    other = second if first is node else first
    assert isinstance(other, fx.Node)
    return other


def add_to_zeros(graph: fx.Graph) -> int:
    """Have gradients of embeddings added row by row to zeros; return how many are.

    Generated code adds every number by itself, with an atomic operation each: ten times as long where a row
    is added to often, as those of the types of tokens are. Left alone are gradients of less than a few
    microseconds, ones that count how often a token comes, and ones that are not FP32.
    """
    fired = 0
    for node in calls(graph, EMBEDDING_BACKWARD):
        gradient, rows, _, padding, by_frequency = node.args
        numbers = math.prod(map(likely_size, value(gradient).shape))
        if by_frequency or dtype(node) != torch.float32 or numbers < _LEAST_NUMBERS:
            continue
        with graph.inserting_before(node):
            shape, device = list(value(node).shape), value(node).device
            table = emit(node, aten.full.default, shape, 0.0, dtype=torch.float32, device=device)
            emit(node, add_rows_, table, rows, gradient, padding)
            node.replace_all_uses_with(table)
        graph.erase_node(node)
        fired += 1
    return fired


def add_in_place(graph: fx.Graph) -> int:
    """Let :data:`add_rows` write into its table, where nobody else has it; return how many do.

    The table is then what a product has just written, and nothing as large is copied.
    """
    fired = 0
    for node in calls(graph, add_rows):
        table = node.args[0]
        if isinstance(table, fx.Node) and _is_owned(table, node):
            with graph.inserting_before(node):
                emit(node, add_rows_, *node.args)
                node.replace_all_uses_with(table)
            graph.erase_node(node)
            fired += 1
    return fired


def _is_owned(table: fx.Node, user: fx.Node) -> bool:
    """Whether the memory of ``table`` is new, and for ``user`` alone but for what was added before."""
    source = table.args[0] if is_call(table, operator.getitem) else table
    return (
        isinstance(source, fx.Node)
        and source.op == "call_function"
        and not may_alias(source)
        and all(other is user or is_call(other, add_rows_) for other in table.users)
        and value(table).is_contiguous()
    )


__all__ = ["EMBEDDING_BACKWARD", "AddEmbeddingGradient", "add_in_place", "add_to_zeros"]
