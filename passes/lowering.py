"""The last step before code generation: fused products that do not pay become their parts again.

A fused operator is a call that the code generator cannot look into. Where the product takes
microseconds, the call costs more than a faster kernel gains, and generated code can compute bias,
activation and residual together with their neighbours. What is small, :func:`passes.gemm.is_small`
says; where a size is symbolic, the size that was seen first decides.

A large product stays a call. But the libraries fuse nothing with it that comes before it in the backward,
nor keep what went into an activation, and in FP32 add nothing: such operators would be products and kernels
for the rest, so the rest is left to generated code (7 % of a step of a small vision transformer).

Before::

    y = optcpu.linear(x, w, bias, "relu")
    dx, dw, db = optcpu.linear_backward(dy, y, x, w, "relu", True, float32)

After, where the products are small (else ``y`` stays as it is, and ``mm`` is ``optcpu.mm``, or an
``optcpu.linear_backward`` of ``g`` alone in BF16, which gives an FP32 ``dw``)::

    y = relu(addmm(bias, x, permute(w, [1, 0])))
    g = threshold_backward(dy, y, 0)
    dx = mm(g, w); dw = mm(permute(g, [1, 0]), x); db = sum(g, [0])
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table

from passes import ops
from passes.activations import ACTIVATION_EXPANSIONS, expand_activations, write_out
from passes.convolution import call_native_backward, choose_for_small_images
from passes.embedding import EMBEDDING_BACKWARD, add_in_place, add_to_zeros
from passes.gemm import is_small
from passes.graph import aten, calls, cast, emit, likely_size, value
from passes.pooling import MAX_POOL_BACKWARD, expand_backward

# What PyTorch would decompose while it captures a graph, and passes want to see as it is.
KEPT_WHOLE: tuple[Any, ...] = (*ACTIVATION_EXPANSIONS, MAX_POOL_BACKWARD, EMBEDDING_BACKWARD)


def lower(graph: fx.Graph) -> int:
    """Write out what generated code computes better than a call, and the other way round.

    Fused products that do not pay, activations and the backward of max-pools whose windows do not overlap
    are written out; that of other max-pools, of convolutions and of embeddings becomes a call. Rows are
    added where their table is.

    Returns:
        How many fused operators were written out.
    """
    fired = expand_products(graph)
    expand_activations(graph)
    expand_backward(graph)
    add_to_zeros(graph)
    for node in calls(graph, EMBEDDING_BACKWARD):
        write_out(node, select_decomp_table()[EMBEDDING_BACKWARD])
    call_native_backward(graph)
    choose_for_small_images(graph)
    add_in_place(graph)
    return fired


def expand_products(graph: fx.Graph) -> int:
    """Write out the fused operators that do not pay; return how many there were."""
    fired = 0
    for node in calls(graph, *_PRODUCT_EXPANSIONS):
        if _is_small(node) or _has_kernels_apart(node):
            with graph.inserting_before(node):
                _replace(node, _PRODUCT_EXPANSIONS[node.target](node, *node.args))
            fired += 1
    graph.eliminate_dead_code()
    return fired


def _has_kernels_apart(node: fx.Node) -> bool:
    """Whether the operator would call kernels of their own for what it does besides its products."""
    is_fp32 = value(node.args[0]).dtype == torch.float32
    if node.target is ops.linear_backward:
        has_more_than_products = node.args[1] is not None or bool(node.args[5])
        return is_fp32 or has_more_than_products
    return node.target is ops.linear_saving_input or (is_fp32 and node.target is ops.linear_add)


def _is_small(node: fx.Node) -> bool:
    # All multiply the rows of the first matrix with the second, but the backward: that multiplies
    # its gradient with the input of the forward, which has as many rows.
    first, second = node.args[0], node.args[2 if node.target is ops.linear_backward else 1]
    rows, columns = value(first), value(second)
    sizes = (*rows.shape, columns.shape[1])
    if node.target in _TIMES_WEIGHT:
        sizes = (*rows.shape, columns.shape[0])
    return is_small(math.prod(map(likely_size, sizes)), rows.dtype)


def _replace(node: fx.Node, results: fx.Node | list[fx.Node | None]) -> None:
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    else:
        for item in list(node.users):
            assert item.target is operator.getitem
            result = results[item.args[1]]  # type: ignore[index]
            if result is not None:
                item.replace_all_uses_with(result)
            node.graph.erase_node(item)
    node.graph.erase_node(node)


def _mm(node: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node:
    is_call = node.target is not ops.mm and not _is_small(node)
    return emit(node, ops.mm if is_call else aten.mm.default, a, b)


def _transposed(node: fx.Node, matrix: fx.Node) -> fx.Node:
    return emit(node, aten.permute.default, matrix, [1, 0])


def _linear(
    node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, activation: str
) -> fx.Node:
    if not _is_small(node):
        product = emit(node, ops.linear_op, x, weight, bias, "none")
        return product if activation == "none" else _activated(node, product, activation)
    columns = _transposed(node, weight)
    if bias is None:
        product = _mm(node, x, columns)
    else:
        narrow = cast(node, bias, value(x).dtype)
        product = emit(node, aten.addmm.default, narrow, x, columns)
    return product if activation == "none" else _activated(node, product, activation)


def _activated(node: fx.Node, product: fx.Node, activation: str) -> fx.Node:
    rule = ops.ACTIVATIONS[activation]
    return emit(node, rule.forward, product, **dict(rule.arguments))  # type: ignore[arg-type]


def _linear_saving_input(
    node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, activation: str
) -> list[fx.Node | None]:
    before = _linear(node, x, weight, bias, "none")
    return [_activated(node, before, activation), before]


def _linear_add(
    node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, residual: fx.Node
) -> fx.Node:
    return emit(node, aten.add.Tensor, _linear(node, x, weight, bias, "none"), residual)


def _linear_backward(
    node: fx.Node,
    gradient: fx.Node,
    saved: fx.Node | None,
    x: fx.Node,
    weight: fx.Node | None,
    activation: str,
    needs_bias: bool,
    weight_dtype: torch.dtype,
) -> list[fx.Node | None]:
    if saved is not None:
        rule = ops.ACTIVATIONS[activation]
        threshold = (0,) if activation == "relu" else ()
        gradient = emit(
            node,
            rule.backward,  # type: ignore[arg-type]
            gradient,
            saved,
            *threshold,
            **dict(rule.arguments),
        )
    x_gradient: fx.Node | None
    if _is_small(node) or value(gradient).dtype == torch.float32:
        x_gradient = None if weight is None else _mm(node, gradient, weight)
        weight_gradient = _mm(node, _transposed(node, gradient), x)
    else:
        both = emit(
            node, ops.linear_backward, gradient, None, x, weight, "none", False, weight_dtype
        )
        x_gradient, weight_gradient = (emit(node, operator.getitem, both, i) for i in range(2))
    bias_gradient = None
    if needs_bias:
        total = emit(node, aten.sum.dim_IntList, cast(node, gradient, torch.float32), [0])
        bias_gradient = cast(node, total, value(gradient).dtype)
    return [x_gradient, cast(node, weight_gradient, weight_dtype), bias_gradient]


_PRODUCT_EXPANSIONS: dict[Any, Callable[..., fx.Node | list[fx.Node | None]]] = {
    ops.mm: _mm,
    ops.linear_op: _linear,
    ops.linear_saving_input: _linear_saving_input,
    ops.linear_add: _linear_add,
    ops.linear_backward: _linear_backward,
}

_TIMES_WEIGHT = (ops.linear_op, ops.linear_saving_input, ops.linear_add)  # of shape (N, K)

__all__ = ["expand_products", "lower"]
