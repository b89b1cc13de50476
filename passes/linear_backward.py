"""The backward of a linear layer: activation mask, bias gradient and both GEMMs in one operator."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from passes import ops
from passes.base import Pass, Stage
from passes.gemm import onednn_available
from passes.graph import (
    aten,
    calls,
    cast,
    dtype,
    emit,
    is_call,
    is_cast,
    is_view,
    same_shape,
    same_size,
    sizes,
    sort,
    value,
)

_FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, repr=False)
class FuseLinearBackward(Pass):
    """Fuse what the backward of one linear layer computes.

    Before (``g`` is the masked gradient, ``y`` the saved output)::

        g = threshold_backward(dy, y, 0)
        dx = mm(g, w); dw = mm(permute(g, [1, 0]), x); db = sum(f32(g), [0])

    After::

        dx, dw, db = optcpu.linear_backward(dy, y, x, w, "relu", True, dtype of dw)

    The gradient of a BF16 weight that is only widened to FP32 is computed in FP32 at once.
    Without an activation, or with one that is left to generated code, ``saved`` is None. The bias
    gradient is summed from the stored ``g``: generated code would compute ``g`` anew, column by column.
    Fires once for each layer.

    Args:
        rounded_bias: whether the gradient of the bias may be summed from the rounded ``g``, and rounded,
            where the graph sums the FP32 tensor that ``g`` is a BF16 copy of. So it is under autocast.
    """

    rounded_bias: bool = False
    stage: ClassVar[Stage] = "split"

    @property
    def changes_numerics(self) -> bool:  # type: ignore[override]
        """Whether results may change beyond the reordering of exact operations."""
        return self.rounded_bias

    def __call__(self, graph: fx.Graph) -> int:
        if not onednn_available():
            return 0
        fired = 0
        for node in calls(graph, aten.mm.default):
            layer = _match(node, self.rounded_bias)
            if layer is not None:
                _rewrite(layer)
                fired += 1
        if fired:
            sort(graph)
            graph.eliminate_dead_code()
        return fired


@dataclass(frozen=True)
class _Layer:
    """The nodes that belong to the backward of one layer."""

    gradient: fx.Node  # (M, N)
    x: fx.Node  # (M, K)
    weight_product: fx.Node  # (N, K)
    input_product: fx.Node | None  # (M, K)
    weight: fx.Node | None  # (N, K)
    bias_sum: fx.Node | None  # (N,), or with axes of size 1 in front


def _match(node: fx.Node, rounded_bias: bool) -> _Layer | None:
    """The layer whose weight gradient ``node`` computes, if it is one and has more to fuse."""
    transposed, x = node.args[:2]
    if not _is_transposed(transposed) or not isinstance(x, fx.Node) or not node.users:
        return None
    if dtype(node) not in _FLOATS or value(node).device.type != "cpu":
        return None
    assert isinstance(transposed, fx.Node)
    gradient = transposed.args[0]
    assert isinstance(gradient, fx.Node)
    input_product = _product_with_weight(gradient, node)
    bias_sum = _sum_of_rows(gradient, rounded_bias)
    if input_product is None and bias_sum is None:
        return None
    weight = input_product.args[1] if input_product is not None else None
    assert weight is None or isinstance(weight, fx.Node)
    layer = _Layer(gradient, x, node, input_product, weight, bias_sum)
    return layer if _is_acyclic(layer) else None


def _is_transposed(node: Any) -> bool:
    if not is_call(node, aten.permute.default):
        return False
    return [axis % 2 for axis in node.args[1]] == [1, 0]


def _product_with_weight(gradient: fx.Node, weight_product: fx.Node) -> fx.Node | None:
    for user in gradient.users:
        if is_call(user, aten.mm.default) and user.args[0] is gradient and user.users:
            weight = user.args[1]
            assert isinstance(weight, fx.Node)
            if same_shape(weight, weight_product):
                return user
    return None


def _sum_of_rows(gradient: fx.Node, rounded: bool) -> fx.Node | None:
    """The node that sums ``gradient`` over its rows; if ``rounded``, or the tensor it is a copy of."""
    for tensor in _same_tensor(gradient):
        if not rounded and dtype(tensor) != dtype(gradient):
            continue
        for user in tensor.users:
            columns = value(tensor).shape[-1], value(gradient).shape[-1]
            if _sums_rows(user, tensor) and same_size(*columns):
                return user
    return None


def _sums_rows(node: fx.Node, tensor: fx.Node) -> bool:
    """Whether ``node`` sums ``tensor`` over all its axes but the last."""
    if not is_call(node, aten.sum.dim_IntList) or node.kwargs or not node.users:
        return False
    axes, rank = node.args[1], value(tensor).dim()
    if not isinstance(axes, (list, tuple)) or rank < 2:
        return False
    return sorted(axis % rank for axis in axes) == list(range(rank - 1))


def _same_tensor(gradient: fx.Node) -> list[fx.Node]:
    """All nodes that hold the values of ``gradient`` up to rounding and a change of shape."""
    origin = _origin(gradient)
    found = [origin]
    for tensor in found:
        found += [u for u in tensor.users if _keeps_values(u)]
    return found


def _origin(node: fx.Node) -> fx.Node:
    while _keeps_values(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _keeps_values(node: fx.Node) -> bool:
    """Whether ``node`` only reshapes, or rounds between FP32 and BF16."""
    if is_cast(node):
        return dtype(node) in _FLOATS and dtype(node.args[0]) in _FLOATS
    return is_view(node)


def _is_acyclic(layer: _Layer) -> bool:
    """Whether nothing that goes into the layer's backward comes out of it.

    Where a user's own code multiplies like a backward does, ``x`` may be computed from the product
    that looks like the gradient of ``x``: in ``x.T @ (x @ w)``, say.
    """
    results = {layer.weight_product, layer.input_product, layer.bias_sum}
    pending = [layer.x, layer.gradient, *([] if layer.weight is None else [layer.weight])]
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in results:
            return False
        if node not in seen:
            seen.add(node)
            pending += node.all_input_nodes
    return True


def _rewrite(layer: _Layer) -> None:
    node = layer.weight_product
    widened = _only_widened(node)
    with node.graph.inserting_before(node):
        gradient, saved, activation = _fusible_activation(layer)
        needs_bias = layer.bias_sum is not None
        weight_dtype = torch.float32 if widened else dtype(node)
        arguments = (gradient, saved, layer.x, layer.weight, activation, needs_bias, weight_dtype)
        fused = emit(node, ops.linear_backward, *arguments)
        results = [emit(node, operator.getitem, fused, i) for i in range(3)]
    products = [layer.input_product, layer.weight_product, layer.bias_sum]
    for upcast in list(node.users) if widened else ():
        upcast.replace_all_uses_with(results[1])
    if widened:
        products[1] = None
    for product, result in zip(products, results, strict=True):
        if product is not None:
            _take_over(product, result)


def _only_widened(node: fx.Node) -> bool:
    """Whether everything that uses ``node`` converts it to FP32 first."""
    return all(is_cast(user) and dtype(user) == torch.float32 for user in node.users)


def _take_over(node: fx.Node, result: fx.Node) -> None:
    with node.graph.inserting_before(node):
        if value(result).dim() != value(node).dim():
            result = emit(node, aten.view.default, result, sizes(node))
        result = cast(node, result, dtype(node) or torch.float32)
    node.replace_all_uses_with(result)


def _fusible_activation(layer: _Layer) -> tuple[fx.Node, fx.Node | None, str]:
    """Gradient, saved tensor and name of the activation to fuse; ``"none"`` where there is none."""
    plain = (layer.gradient, None, "none")
    backward = _origin(layer.gradient)
    name = _backward_name(backward)
    if name is None or not _only_for(layer, backward):
        return plain
    operands = [_narrow(arg, dtype(layer.gradient)) for arg in backward.args[:2]]
    if None in operands:
        return plain
    gradient, saved = (_flat(layer, operand) for operand in operands if operand is not None)
    return gradient, saved, name


# The tanh form of GELU and SiLU run faster as generated code than as library calls.
_FUSED_BACKWARD = ("relu", "tanh", "sigmoid", "gelu")


def _backward_name(node: fx.Node) -> str | None:
    if node.op != "call_function":
        return None
    for name in _FUSED_BACKWARD:
        rule = ops.ACTIVATIONS[name]
        if node.target is rule.backward and dict(node.kwargs) == dict(rule.arguments):
            return None if name == "relu" and node.args[2] != 0 else name
    return None


def _only_for(layer: _Layer, backward: fx.Node) -> bool:
    """Whether nothing outside the layer needs the masked gradient."""
    mine = {layer.weight_product.args[0], layer.input_product, layer.bias_sum}
    tensors = set(_same_tensor(layer.gradient))
    return all(user in tensors or user in mine for tensor in tensors for user in tensor.users)


def _narrow(operand: Any, to: torch.dtype | None) -> fx.Node | None:
    """``operand`` in the gradient's dtype: the tensor it was upcast from, or itself."""
    if not isinstance(operand, fx.Node):
        return None
    if is_cast(operand) and dtype(operand.args[0]) == to:
        source = operand.args[0]
        return source if isinstance(source, fx.Node) else None
    if dtype(operand) == to or to is None:
        return operand
    return cast(operand, operand, to)


def _flat(layer: _Layer, operand: fx.Node) -> fx.Node:
    if value(operand).dim() == 2:
        return operand
    return emit(operand, aten.view.default, operand, sizes(layer.gradient))
