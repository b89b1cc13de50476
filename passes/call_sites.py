"""What generated code calls in place of an operator of ours.

On its way through PyTorch's dispatcher to Python, and through the search for the fastest kernel, a call
takes 30 to 75 us where products have left nothing else in the caches: a twentieth of a step, where layers
are a few hundred wide. A place in generated code calls the same operator on the same shapes again and
again; so it looks the kernels up once and calls them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch._ops import OpOverload

from passes import gemm, im2col, ops, packed
from passes.operators import IMPLEMENTATIONS

Run: TypeAlias = Callable[..., Any]


class CallSite:
    """A place that calls an operator, with tensors of the same shapes, orders and dtypes each time.

    While a profiler runs the operator itself is called, so that profiles show it.

    Args:
        name: of the operator in ``torch.ops.optcpu``, which :func:`takes` says can be called directly.
    """

    def __init__(self, name: str) -> None:
        self._operator = getattr(torch.ops.optcpu, name).default
        self._implementation = IMPLEMENTATIONS[name]
        self._settle = _SETTLING.get(name)
        self._run = self._implementation
        self._settled_for: object = None

    def __call__(self, *arguments: Any) -> Any:
        """What the operator gives for these arguments, to the bit."""
        if _profiler_enabled():
            return self._operator(*arguments)
        if self._settle is None:
            return self._implementation(*arguments)
        present = _circumstances()
        if self._settled_for == present:
            return self._run(*arguments)
        # It chooses kernels for what nobody has multiplied before.
        result = self._implementation(*arguments)
        self._run = self._settle(*arguments)
        self._settled_for = present
        return result


def _circumstances() -> tuple[object, ...]:
    """What decides which kernel is called, besides the arguments."""
    return gemm.adoptions(), torch.get_num_threads(), packed.any_kept()


def _or_by_kept(kernel: Run, by_kept: Run) -> Run:
    """``kernel``, or a product by a packed copy of the weight where one is kept, which can change."""
    if not packed.any_kept():
        return kernel

    def run(*arguments: Any) -> Any:
        product = by_kept(*arguments)
        return kernel(*arguments) if product is None else product

    return run


def _mm(a: Tensor, b: Tensor) -> Run:
    return _or_by_kept(gemm.kernels(a.dtype)[gemm.fastest(a, b)], _mm_by_kept)


def _mm_by_kept(a: Tensor, b: Tensor) -> Tensor | None:
    return packed.product(a, b.t())


def _linear(*arguments: Any) -> Run:
    kernel = functools.partial(ops.linear_by, ops.kernel_of_linear(*arguments))
    return _or_by_kept(kernel, packed.product)


def _linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Run:
    kernel = ops.kernel_of_linear(x, weight, bias, "none", residual)
    return _or_by_kept(functools.partial(ops.linear_add_by, kernel), _linear_add_by_kept)


def _linear_add_by_kept(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor
) -> Tensor | None:
    return packed.product(x, weight, bias, residual=residual)


def _linear_backward(
    gradient: Tensor,
    saved: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    activation: str,
    _needs_bias: bool,
    weight_dtype: torch.dtype,
) -> Run:
    if saved is not None:  # may be laid out otherwise
        gradient = ops.activation_backward(gradient, saved, activation)
    for_weight = ops.kernel_for_weight(gradient.t(), x, weight_dtype)
    # Without a weight it is not called.
    for_input = for_weight if weight is None else _mm(gradient, weight)
    return functools.partial(ops.linear_backward_by, for_input, for_weight)


def _convolution_backward(*arguments: Any) -> Run:
    by_way = im2col.fastest_backward(*arguments)

    def run(gradient: Tensor, x: Tensor, weight: Tensor, *_geometry: Any) -> im2col.Gradients:
        return by_way(gradient, x, weight)

    return run


def takes(operator: OpOverload) -> bool:
    """Whether ``operator`` is one of ours, and writes to no operand, which the dispatcher takes note of."""
    ours = operator.namespace == "optcpu" and operator._opname in IMPLEMENTATIONS
    return ours and not operator._schema.is_mutable


# What finds the kernels for the arguments of an operator, by its name, where there is a choice.
_SETTLING: dict[str, Callable[..., Run]] = {
    "mm": _mm,
    "linear": _linear,
    "linear_add": _linear_add,
    "linear_backward": _linear_backward,
    "convolution": im2col.fastest_convolution,
    "convolution_backward": _convolution_backward,
}

__all__ = ["CallSite", "takes"]
