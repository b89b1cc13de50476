"""Linear layers: bias, activation and residual in one operator with the GEMM."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from passes import ops
from passes.base import Pass, Stage
from passes.gemm import onednn_available
from passes.graph import (
    aten,
    calls,
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


@dataclass(frozen=True)
class Product:
    """The operands of a GEMM node that computes ``x @ transposed + bias``."""

    x: fx.Node  # (M, K)
    transposed: fx.Node  # (K, N)
    bias: fx.Node | None  # (N,)

    def weight(self) -> fx.Node:
        """The weight as a linear layer holds it, shape (N, K)."""
        if is_call(self.transposed, aten.permute.default):
            source = self.transposed.args[0]
            assert isinstance(source, fx.Node)
            return source
        return emit(self.transposed, aten.permute.default, self.transposed, [1, 0])


@dataclass(frozen=True, repr=False)
class FuseLinear(Pass):
    """Fuse a linear layer with the activation behind it, or with the residual that is added to it.

    Before::

        h = addmm(bias, x, permute(w, [1, 0])); y = relu(h)
        h = addmm(bias, x, permute(w, [1, 0])); y = bf16(gelu(f32(h)))      # h is saved for the backward
        h = mm(x, permute(w, [1, 0])); y = add(h, residual)

    After::

        y = optcpu.linear(x, w, bias, "relu")
        y, h = optcpu.linear_saving_input(x, w, bias, "gelu")
        y = optcpu.linear_add(x, w, None, residual)

    An activation whose backward needs its input is fused with both results where that is faster than
    the generated kernel (:data:`WORTH_SAVING`), and left alone otherwise. Fires once a fusion.
    """

    stage: ClassVar[Stage] = "split"

    def __call__(self, graph: fx.Graph) -> int:
        if not onednn_available():
            return 0
        fired = 0
        for node in calls(graph, aten.addmm.default, aten.mm.default):
            product = linear_product(node)
            if product is not None:
                fired += _fuse_activation(node, product) or _fuse_residual(node, product)
        if fired:
            sort(graph)
            graph.eliminate_dead_code()
        return fired


# The exact GELU of oneDNN takes about half the time of generated code; the others gain nothing.
WORTH_SAVING = ("gelu",)


def linear_product(node: fx.Node) -> Product | None:
    """The operands if ``node`` is a plain ``x @ transposed (+ bias)`` on a CPU, else None."""
    if node.kwargs or value(node).device.type != "cpu":
        return None
    if dtype(node) not in (torch.float32, torch.bfloat16):
        return None
    *bias, x, transposed = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(transposed, fx.Node)
    if not dtype(x) == dtype(transposed) == dtype(node):
        return None  # a mistake of the user's: PyTorch's product tells it
    if not bias:
        return Product(x, transposed, None)
    (addend,) = bias
    if not isinstance(addend, fx.Node) or value(addend).dim() != 1:
        return None
    if not same_size(value(addend).shape[0], value(node).shape[1]):
        return None  # one number for all columns
    return Product(x, transposed, _bias_in_full_precision(addend))


def _bias_in_full_precision(bias: fx.Node) -> fx.Node:
    """oneDNN adds an FP32 bias to a BF16 product before rounding, so the bias needs no cast."""
    if is_cast(bias) and dtype(bias.args[0]) == torch.float32:
        source = bias.args[0]
        assert isinstance(source, fx.Node)
        return source
    return bias


def _fuse_activation(node: fx.Node, product: Product) -> bool:
    for user in list(node.users):
        activation = _through_view_and_upcast(user)
        name = activation_name(activation)
        if (
            activation is not None
            and name is not None
            and _replace(node, product, activation, name)
        ):
            return True
    return False


def activation_name(node: fx.Node | None) -> str | None:
    """The key in :data:`passes.ops.ACTIVATIONS` of the activation that ``node`` computes."""
    if node is None or node.op != "call_function":
        return None
    for name, rule in ops.ACTIVATIONS.items():
        if node.target is rule.forward and dict(node.kwargs) == dict(rule.arguments):
            return name
    return None


def _is_upcast(node: fx.Node) -> bool:
    return is_cast(node) and dtype(node) == torch.float32


def _through_view_and_upcast(user: fx.Node) -> fx.Node | None:
    """The single consumer of ``user``'s value behind a view and a cast to FP32."""
    node = user
    for skip in (is_view, _is_upcast):
        if skip(node):
            if len(node.users) != 1:
                return None
            node = next(iter(node.users))
    return node


def _replace(node: fx.Node, product: Product, activation: fx.Node, name: str) -> bool:
    narrow = dtype(node)
    results = [activation]
    if dtype(activation) != narrow:
        results = list(activation.users)
        if not all(is_cast(r) and dtype(r) == narrow for r in results):
            return False  # somebody wants the activation unrounded
    input_is_used_elsewhere = len(node.users) > 1
    if input_is_used_elsewhere and name not in WORTH_SAVING:
        return False
    with node.graph.inserting_before(node):
        arguments = (product.x, product.weight(), product.bias, name)
        if input_is_used_elsewhere:
            both = emit(activation, ops.linear_saving_input, *arguments)
            fused = emit(activation, operator.getitem, both, 0)
            before = emit(node, operator.getitem, both, 1)
        else:
            fused = emit(activation, ops.linear_op, *arguments)
    for result in results:
        with node.graph.inserting_before(result):
            result.replace_all_uses_with(reshaped(result, fused))
    if input_is_used_elsewhere:
        node.replace_all_uses_with(before)
    return True


def reshaped(like: fx.Node, tensor: fx.Node) -> fx.Node:
    """``tensor`` in the shape of ``like``."""
    if value(like).dim() == value(tensor).dim():
        return tensor
    return emit(like, aten.view.default, tensor, sizes(like))


def _fuse_residual(node: fx.Node, product: Product) -> bool:
    if len(node.users) != 1:
        return False
    (user,) = node.users
    behind = user
    if is_view(user) and len(user.users) == 1:
        (behind,) = user.users
    if not is_call(behind, aten.add.Tensor) or behind.kwargs:
        return False
    linear = user if behind is not user else node
    others = [arg for arg in behind.args if arg is not linear]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return False
    residual = others[0]
    if dtype(residual) != dtype(node):
        return False
    if not same_shape(residual, behind) or not same_shape(linear, behind):
        return False  # one of the two is repeated
    if not value(residual).is_contiguous():
        return False
    graph = node.graph
    with graph.inserting_before(behind):
        flat = residual
        if behind is not user:
            flat = emit(behind, aten.view.default, residual, sizes(node))
        fused = emit(behind, ops.linear_add, product.x, product.weight(), product.bias, flat)
        behind.replace_all_uses_with(reshaped(behind, fused))
    return True


@dataclass(frozen=True, repr=False)
class RouteProducts(Pass):
    """Compute every remaining matrix product by the fastest kernel for its shape.

    Before::

        y = addmm(bias, x, permute(w, [1, 0])); z = mm(a, b)

    After::

        y = optcpu.linear(x, w, bias, "none"); z = optcpu.mm(a, b)

    The kernel is found by measurement when the product first runs (:mod:`passes.gemm`).
    Fires once a product.
    """

    stage: ClassVar[Stage] = "split"

    def __call__(self, graph: fx.Graph) -> int:
        if not onednn_available():
            return 0
        fired = 0
        for node in calls(graph, aten.addmm.default, aten.mm.default):
            product = linear_product(node)
            if product is None:
                continue
            with graph.inserting_before(node):
                if product.bias is None:
                    routed = emit(node, ops.mm, product.x, product.transposed)
                else:
                    weight = product.weight()
                    routed = emit(node, ops.linear_op, product.x, weight, product.bias, "none")
            node.replace_all_uses_with(routed)
            graph.erase_node(node)
            fired += 1
        graph.eliminate_dead_code()
        return fired
