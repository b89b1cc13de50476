"""The fused operators that passes rewrite to.

They are ordinary PyTorch operators of the library ``optcpu`` with a kernel for CPU and shapes for fake
tensors. They have no autograd formula: the passes that emit them run where forward and backward are
explicit already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from passes import im2col, native, packed
from passes.gemm import (
    NO_POST_OP,
    Kernel,
    PostOp,
    choose,
    fastest,
    is_small,
    kernels,
    matmul,
    packed_for,
    shape_key,
)
from passes.operators import COMPILED, COMPILED_AS_LAID_OUT, define

Saved = Literal["output", "input"]


@dataclass(frozen=True)
class Activation:
    """An activation that can be fused into a linear layer.

    Attributes:
        forward: its ATen operator.
        backward: its ATen backward operator, called with (gradient, saved tensor).
        post_op: how oneDNN calls it.
        saves: what the backward needs: the activation's output, or its input.
        arguments: keyword arguments of both ATen operators.
    """

    forward: object
    backward: object
    post_op: PostOp
    saves: Saved
    arguments: tuple[tuple[str, str], ...] = ()


_aten = torch.ops.aten

ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(
        _aten.relu.default, _aten.threshold_backward.default, ("relu", [], ""), "output"
    ),
    "tanh": Activation(_aten.tanh.default, _aten.tanh_backward.default, ("tanh", [], ""), "output"),
    "sigmoid": Activation(
        _aten.sigmoid.default, _aten.sigmoid_backward.default, ("sigmoid", [], ""), "output"
    ),
    "gelu": Activation(
        _aten.gelu.default, _aten.gelu_backward.default, ("gelu", [], "none"), "input"
    ),
    "gelu_tanh": Activation(
        _aten.gelu.default,
        _aten.gelu_backward.default,
        ("gelu", [], "tanh"),
        "input",
        (("approximate", "tanh"),),
    ),
    "silu": Activation(_aten.silu.default, _aten.silu_backward.default, ("swish", [], ""), "input"),
}


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` by the fastest kernel; shapes (M, K) and (K, N)."""
    by_kept = packed.product(a, b.t())
    return matmul(a, b) if by_kept is None else by_kept


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``activation(x @ weight.T + bias)``, in one kernel where a library that can do so is the fastest.

    Args:
        x: shape (M, K), FP32 or BF16.
        weight: shape (N, K), same dtype as ``x``.
        bias: shape (N,), FP32 or the dtype of ``x``; or None.
        activation: a key of :data:`ACTIVATIONS`, or ``"none"``.

    Returns:
        Shape (M, N), dtype of ``x``.
    """
    by_kept = packed.product(x, weight, bias, activation)
    if by_kept is not None:
        return by_kept
    kernel = kernel_of_linear(x, weight, bias, activation)
    return linear_by(kernel, x, weight, bias, activation)


def kernel_of_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
) -> str:
    """The name of the fastest kernel for a linear layer and what follows in the same operator.

    A library that fuses what follows may win by that, and lose for the product alone.
    """

    def runs(a: Tensor, b: Tensor) -> dict[str, Callable[[], object]]:
        rows, columns = a.shape[0], b.shape[1]
        part = (a, b.t(), None if bias is None else bias[:columns])
        if residual is None:
            return {name: functools.partial(linear_by, name, *part, activation) for name in names}
        last = residual[:rows, :columns].contiguous()
        return {name: functools.partial(linear_add_by, name, *part, last) for name in names}

    names = kernels(x.dtype)
    following = {
        "bias": bias is not None,
        activation: activation != "none",
        "add": residual is not None,
    }
    return fastest(x, weight.t(), "+".join(name for name, does in following.items() if does), runs)


def linear_by(
    kernel: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """:func:`_linear` by the kernel that :func:`kernel_of_linear` has named."""
    if kernel == "own":
        relu = activation == "relu"
        product = native.matmul(x, weight.t(), bias=bias, relu=relu)
        return product if relu else activate(product, activation)
    if kernel == "aten":
        return _unfused_linear(x, weight, bias, activation)
    laid_out = packed_for(x, weight) if kernel == "onednn-packed" else weight
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(
        x, laid_out, bias, *post_op(activation)
    )
    return result


def _unfused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    columns = weight.t()
    result = torch.mm(x, columns) if bias is None else torch.addmm(bias.to(x.dtype), x, columns)
    return activate(result, activation)


def post_op(activation: str) -> PostOp:
    """How oneDNN calls ``activation``, a key of :data:`ACTIVATIONS` or ``"none"``."""
    return NO_POST_OP if activation == "none" else ACTIVATIONS[activation].post_op


def activate(tensor: Tensor, activation: str) -> Tensor:
    """``activation``, a key of :data:`ACTIVATIONS` or ``"none"``, of ``tensor`` by ATen."""
    if activation == "none":
        return tensor
    rule = ACTIVATIONS[activation]
    result: Tensor = rule.forward(tensor, **dict(rule.arguments))  # type: ignore[operator]
    return result


def _linear_saving_input(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """The activation of a linear layer together with what went into the activation."""
    before = _linear(x, weight, bias, "none")
    return activate(before, activation), before


def _linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """``x @ weight.T + bias + residual``; residual has the result's shape (M, N) and dtype."""
    by_kept = packed.product(x, weight, bias, residual=residual)
    if by_kept is not None:
        return by_kept
    kernel = kernel_of_linear(x, weight, bias, "none", residual)
    return linear_add_by(kernel, x, weight, bias, residual)


def linear_add_by(
    kernel: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor
) -> Tensor:
    """:func:`_linear_add` by the kernel that :func:`kernel_of_linear` has named."""
    if kernel == "own":
        return native.matmul(x, weight.t(), bias=bias, residual=residual)
    if kernel == "aten":
        return _unfused_linear(x, weight, bias, "none").add_(residual)
    laid_out = packed_for(x, weight) if kernel == "onednn-packed" else weight
    return linear_add_by_onednn(x, laid_out, bias, residual)


def linear_add_by_onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor
) -> Tensor:
    """:func:`_linear_add` by oneDNN; ``weight`` may be packed.

    Unlike the operators without a residual, this one takes no FP32 bias for a BF16 product.
    """
    narrow = None if bias is None else bias.to(x.dtype)
    result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, narrow, "add")
    return result


def _linear_backward(
    gradient: Tensor,
    saved: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    activation: str,
    needs_bias: bool,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """All gradients of ``activation(x @ weight.T + bias)``.

    Args:
        gradient: of the result, shape (M, N).
        saved: the activation's output or input (see :class:`Activation`), shape (M, N); None for
            activation ``"none"``.
        x: shape (M, K).
        weight: shape (N, K); None if the gradient of ``x`` is not wanted, which is then empty.
        activation: a key of :data:`ACTIVATIONS`, or ``"none"``.
        needs_bias: whether the gradient of the bias is wanted; it is empty otherwise.
        weight_dtype: of the weight's gradient: that of ``gradient``, or FP32.

    Returns:
        Gradients of x (M, K), weight (N, K) and bias (N,); x and bias in the dtype of ``gradient``.
    """
    for_weight = functools.partial(_weight_gradient, dtype=weight_dtype)
    return linear_backward_by(
        _mm, for_weight, gradient, saved, x, weight, activation, needs_bias, weight_dtype
    )


def linear_backward_by(
    for_input: Kernel,
    for_weight: Kernel,
    gradient: Tensor,
    saved: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    activation: str,
    needs_bias: bool,
    _weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_linear_backward` by a kernel for either product."""
    if saved is not None:
        gradient = activation_backward(gradient, saved, activation)
    x_gradient = gradient.new_empty(0) if weight is None else for_input(gradient, weight)
    bias_gradient = gradient.sum(0) if needs_bias else gradient.new_empty(0)
    return x_gradient, for_weight(gradient.t(), x), bias_gradient


def _weight_gradient(transposed: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``transposed @ x`` in ``dtype``; shapes (N, M) and (M, K)."""
    return kernel_for_weight(transposed, x, dtype)(transposed, x)


def kernel_for_weight(transposed: Tensor, x: Tensor, dtype: torch.dtype) -> Kernel:
    """The fastest kernel for :func:`_weight_gradient`."""
    plain = kernels(x.dtype)[fastest(transposed, x)]
    if dtype == transposed.dtype:
        return plain

    def narrow(a: Tensor, b: Tensor) -> Tensor:
        return plain(a, b).to(dtype)

    if is_small(transposed.numel() * x.shape[1], x.dtype) or not native.matmul_available():
        return narrow
    wide = functools.partial(native.matmul, dtype=dtype)
    by_name: dict[str, Kernel] = {"narrow": narrow, "wide": wide}
    runs = {name: functools.partial(kernel, transposed, x) for name, kernel in by_name.items()}
    return by_name[choose(f"fp32 {shape_key(transposed, x)}", runs, "wide")]


def activation_backward(gradient: Tensor, saved: Tensor, activation: str) -> Tensor:
    """The gradient of what went into ``activation``, whose output or input is ``saved``."""
    rule = ACTIVATIONS[activation]
    extra = (0,) if activation == "relu" else ()  # the threshold
    result: Tensor = rule.backward(gradient, saved, *extra, **dict(rule.arguments))  # type: ignore[operator]
    return result


def _max_pool_backward(gradient: Tensor, size: Sequence[int], *arguments: Any) -> Tensor:
    """The gradient of a max-pool's input of shape ``size``, laid out as the indices are."""
    *geometry, indices = arguments
    like = _empty_max_pool_backward(gradient, size, *arguments)
    return cast(
        Tensor, _aten.max_pool2d_with_indices_backward.default(gradient, like, *geometry, indices)
    )


def _empty_max_pool_backward(gradient: Tensor, size: Sequence[int], *arguments: Any) -> Tensor:
    """What :func:`_max_pool_backward` fills, with nothing in it."""
    layout = suggest_memory_format(arguments[-1])
    return torch.empty(size, dtype=gradient.dtype, device=gradient.device, memory_format=layout)


def _fake_product(rows: Tensor, columns: torch.SymInt | int) -> Tensor:
    return rows.new_empty((rows.shape[0], columns))


def _fake_linear_backward(
    gradient: Tensor,
    saved: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    activation: str,
    needs_bias: bool,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(0 if weight is None else x.shape),
        x.new_empty((gradient.shape[1], x.shape[1]), dtype=weight_dtype),
        gradient.new_empty(gradient.shape[1] if needs_bias else 0),
    )


_define = functools.partial(define, tags=COMPILED_AS_LAID_OUT)

mm = _define("mm(Tensor a, Tensor b) -> Tensor", _mm, lambda a, b: _fake_product(a, b.shape[1]))
linear_op = _define(
    "linear(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor",
    _linear,
    lambda x, weight, *_: _fake_product(x, weight.shape[0]),
)
linear_saving_input = _define(
    "linear_saving_input(Tensor x, Tensor weight, Tensor? bias, str activation) -> (Tensor, Tensor)",
    _linear_saving_input,
    lambda x, weight, *_: (
        _fake_product(x, weight.shape[0]),
        _fake_product(x, weight.shape[0]),
    ),
)
linear_add = _define(
    "linear_add(Tensor x, Tensor weight, Tensor? bias, Tensor residual) -> Tensor",
    _linear_add,
    lambda x, weight, *_: _fake_product(x, weight.shape[0]),
)
linear_backward = _define(
    "linear_backward(Tensor gradient, Tensor? saved, Tensor x, Tensor? weight, str activation, "
    "bool needs_bias, ScalarType weight_dtype) -> (Tensor, Tensor, Tensor)",
    _linear_backward,
    _fake_linear_backward,
)
convolution = define(
    "convolution(Tensor x, Tensor weight, int[] stride, int[] padding) -> Tensor",
    im2col.convolution,
    im2col.native_convolution,
    COMPILED,  # laid out as passes/convolution.py says
)
convolution_backward = _define(
    "convolution_backward(Tensor gradient, Tensor x, Tensor weight, SymInt[]? bias_sizes, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups, "
    "bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    im2col.convolution_backward,
    _aten.convolution_backward.default,
)
max_pool_backward = _define(
    "max_pool_backward(Tensor gradient, SymInt[] size, int[] kernel_size, int[] stride, int[] padding, "
    "int[] dilation, bool ceil_mode, Tensor indices) -> Tensor",
    _max_pool_backward,
    _empty_max_pool_backward,
)
