"""Layers that are fast by themselves, without a compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from passes import ops


class FusedLinearReLU(nn.Linear):
    """``Sequential(Linear, ReLU)`` as one layer, computed in BF16.

    Forward: the product, the bias and the ReLU in one kernel. Backward: the ReLU's mask, the bias
    gradient and both products, from the output alone. The parameters are FP32, as are their gradients;
    the result has the input's dtype. Parameters, initialisation and ``state_dict()`` keys are those of
    :class:`torch.nn.Linear`.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the result.
        bias: whether a bias is added.

    Shape:
        input (..., in_features), FP32 or BF16; result (..., out_features), of the input's dtype.
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> FusedLinearReLU:
        """A layer that computes ``relu(linear(x))`` with the very parameters of ``linear``."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, not {type(linear).__name__}")
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """See the class.

        Raises:
            TypeError: the input is neither FP32 nor BF16.
            ValueError: its last dimension is not ``in_features``.
        """
        if input.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"input must be FP32 or BF16, not {input.dtype}: convert it first")
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"input has shape {tuple(input.shape)}; its last dimension must be "
                f"in_features = {self.in_features}"
            )
        result: Tensor = _LinearReLU.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return result


class _LinearReLU(torch.autograd.Function):
    """``relu(x @ weight.T + bias)`` in BF16, with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        lowered = weight.to(torch.bfloat16)
        output = ops.linear_op(rows, lowered, bias, "relu")
        ctx.save_for_backward(rows, lowered, output)
        ctx.shape, ctx.dtype, ctx.has_bias = x.shape, x.dtype, bias is not None
        result: Tensor = output.to(x.dtype).view(*x.shape[:-1], weight.shape[0])
        return result

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, output = ctx.saved_tensors
        needs_input, _, needs_bias = ctx.needs_input_grad
        gradient = gradient.reshape(output.shape).to(torch.bfloat16).contiguous()
        of_input, of_weight, of_bias = ops.linear_backward(
            gradient,
            output,
            rows,
            weight if needs_input else None,
            "relu",
            needs_bias,
            torch.float32,
        )
        return (
            of_input.to(ctx.dtype).view(ctx.shape) if needs_input else None,
            of_weight,
            of_bias.float() if needs_bias else None,
        )
