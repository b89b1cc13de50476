"""What a training step has to do, whatever computes it: floating-point operations and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from optcpu.measure.roofline import Limits
from passes.graph import likely_size, value

_BYTES = {"fp32": 4, "bf16": 2}

Shape = Sequence[int]


@dataclass(frozen=True)
class Work:
    """The work of a training step.

    Attributes:
        flops: floating-point operations in matrix products, convolutions and attention, forward and
            backward; a multiply-add counts as two.
        values_updated: trainable values.
        state_values: numbers that the optimizer remembers, of the size of a parameter: two a value for
            AdamW.
        flops_by_operator: the same ``flops``, by the ATen operators' names.
    """

    flops: float
    values_updated: int
    state_values: int
    flops_by_operator: Mapping[str, float] = field(default_factory=dict)

    def update_bytes(self, dtype: str) -> float:
        """That an update moves at least, if gradients, weights and state are ``"fp32"`` or ``"bf16"``.

        Gradients are read; weights and state are read and written.
        """
        return _BYTES[dtype] * (3.0 * self.values_updated + 2.0 * self.state_values)


@dataclass(frozen=True)
class Ideal:
    """The least time that a step can take on a machine.

    Attributes:
        dtype: of the products and of what the update moves, ``"fp32"`` or ``"bf16"``.
        library: that was fastest at products of it; see :class:`optcpu.measure.roofline.Limits`.
        flops: of a step.
        peak: floating-point operations per second of that library.
        update_bytes: that the update moves.
        bandwidth: bytes per second of an update in place.
    """

    dtype: str
    library: str
    flops: float
    peak: float
    update_bytes: float
    bandwidth: float

    @property
    def product_ms(self) -> float:
        """Of the products alone, ms."""
        return 1e3 * self.flops / self.peak

    @property
    def update_ms(self) -> float:
        """Of the update alone, ms."""
        return 1e3 * self.update_bytes / self.bandwidth

    @property
    def step_ms(self) -> float:
        """Of the whole step, ms."""
        return self.product_ms + self.update_ms


def ideal_step(work: Work, limits: Limits, dtype: str, batches: float = 1.0) -> Ideal:
    """The ideal of a step that does the products of ``work`` ``batches`` times and updates once."""
    return Ideal(
        dtype,
        limits.fastest_library(dtype),
        batches * work.flops,
        limits.peak(dtype),
        work.update_bytes(dtype),
        limits.bandwidth,
    )


def flop_counter() -> FlopCounterMode:
    """Counts within its ``with`` block, also what PyTorch's counter misses on the CPU.

    Attention counts whole where a mask leaves half of it, as is usual.
    """
    aten = torch.ops.aten
    attention = aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(
        display=False,
        custom_mapping={
            attention: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
            torch.ops.optcpu.attention: _attention,
            torch.ops.optcpu.attention_backward: _attention_backward,
            aten.mkldnn_rnn_layer: _recurrent_layer,
            aten.mkldnn_rnn_layer_backward: _recurrent_layer_backward,
            torch.ops.optcpu.recurrent_steps: _recurrent_steps,
            torch.ops.optcpu.recurrent_steps_backward: _recurrent_steps_backward,
        },
    )


def graph_flops(graph: fx.Graph) -> int:
    """Floating-point operations of the products, convolutions and attention in a graph of ATen operators.

    A size that varies counts as what it was when the graph was captured.
    """
    formulas = flop_counter().flop_registry
    total = 0
    for node in graph.nodes:
        formula = formulas.get(getattr(node.target, "overloadpacket", None))
        if formula is not None:
            args, kwargs = tree_map_only(fx.Node, value, (node.args, node.kwargs))
            total += likely_size(formula(*args, **kwargs, out_val=value(node)))
    return total


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(
    grad_output: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(grad_output, query, key, value))


def _recurrent_layer(inputs: Shape, of_input: Shape, of_state: Shape, *_: Any, **__: Any) -> int:
    steps, batch, _width = inputs
    return 2 * steps * batch * of_input[0] * (of_input[1] + of_state[1])


def _recurrent_layer_backward(inputs: Shape, *shapes: Any, **named: Any) -> int:
    """A product for the gradient of the weight and one for that of the input, for each forward."""
    return 2 * _recurrent_layer(inputs, *shapes, **named)


def _recurrent_steps(inputs: Shape, _sizes: Any, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(inputs[:-1]) * weight[0] * weight[1]


def _recurrent_steps_backward(
    output: Shape, _state: Shape, _cell: Shape, sizes: Any, weight: Shape, *_: Any, **__: Any
) -> int:
    return _recurrent_steps(output, sizes, weight)


def state_values(optimizer: Optimizer, parameters: Iterable[Tensor]) -> int:
    """How many numbers ``optimizer`` remembers in tensors that are as large as their parameter."""

    def counted(entry: Any, parameter: Tensor) -> int:
        alike = isinstance(entry, Tensor) and entry.shape == parameter.shape and entry.dim() > 0
        return entry.numel() if alike else 0

    return sum(
        counted(entry, parameter)
        for parameter in parameters
        for entry in optimizer.state.get(parameter, {}).values()
    )
