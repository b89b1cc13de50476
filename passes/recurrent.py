"""Recurrent layers as products that all passes know, and the steps between them as one operator.

What a layer's input contributes to the gates, and the gradients of both weights, are one large product
each over all steps. Only what is left has to go from step to step (:mod:`passes.recurrent_steps`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from passes.operators import COMPILED_AS_LAID_OUT, LIBRARY, define
from passes.recurrent_steps import GATES, SAVED, Kind, Rows, backward, forward

aten = torch.ops.aten


def padded(kind: Kind) -> Callable[..., Any]:
    """``torch.lstm`` or its like for padded sequences, without projections; same arguments and results."""
    of_packed = packed(kind)

    def call(
        x: Tensor, state: Any, weights: Sequence[Tensor], *settings: Any
    ) -> tuple[Tensor, ...]:
        *others, batch_first = settings
        x = (x.transpose(0, 1) if batch_first else x).contiguous()
        output, *last = of_packed(x, None, state, weights, *others)
        return (output.transpose(0, 1) if batch_first else output, *last)

    return call


def packed(kind: Kind) -> Callable[..., Any]:
    """``torch.lstm`` or its like for packed sequences, without projections; same arguments and results."""

    def call(
        x: Tensor,
        sizes: Tensor | None,
        state: Any,
        weights: Sequence[Tensor],
        has_biases: bool,
        layers: int,
        dropout: float,
        training: bool,
        bidirectional: bool,
    ) -> tuple[Tensor, ...]:
        states, cells = state if kind == "lstm" else (state, None)
        directions = 2 if bidirectional else 1
        per_direction = 4 if has_biases else 2
        last: list[tuple[Tensor, ...]] = []
        for layer in range(layers):
            outputs = []
            for direction in range(directions):
                place = layer * directions + direction
                own = weights[place * per_direction :][:per_direction]
                cell = None if cells is None else cells[place].float()
                output, *ends = _direction(kind, x, sizes, states[place], cell, own, direction == 1)
                outputs.append(output)
                last.append(tuple(ends))
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if dropout > 0 and training and layer < layers - 1:
                x = F.dropout(x, dropout)
        return (x, *(torch.stack(of_all) for of_all in zip(*last, strict=True)))

    return call


# What PyTorch's operators are taken apart to.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.lstm.input: padded("lstm"),
    aten.lstm.data: packed("lstm"),
    aten.gru.input: padded("gru"),
    aten.gru.data: packed("gru"),
    aten.rnn_tanh.input: padded("tanh"),
    aten.rnn_tanh.data: packed("tanh"),
    aten.rnn_relu.input: padded("relu"),
    aten.rnn_relu.data: packed("relu"),
}


def _direction(
    kind: Kind,
    x: Tensor,
    sizes: Tensor | None,
    state: Tensor,
    cell: Tensor | None,
    weights: Sequence[Tensor],
    reverse: bool,
) -> tuple[Tensor, ...]:
    """Output, last state and, of an LSTM, last cell of one direction of a layer."""
    of_input, of_state, *biases = weights
    inputs = F.linear(x, of_input)
    output, last_state, last_cell, *_ = recurrent_steps(
        inputs,
        sizes,
        of_state.to(inputs.dtype),
        _bias(kind, *biases) if biases else None,
        state.to(inputs.dtype),
        cell,
        kind,
        reverse,
        torch.is_grad_enabled(),
    )
    return (
        (output, last_state) if cell is None else (output, last_state, last_cell.to(inputs.dtype))
    )


def _bias(kind: Kind, of_input: Tensor, of_state: Tensor) -> Tensor:
    """What is added in all: a GRU's reset gate multiplies the last part of the state's alone."""
    if kind != "gru":
        return (of_input + of_state).float()
    sizes = [2 * of_state.shape[0] // 3, of_state.shape[0] // 3]
    (gates, new), (state_gates, reset) = of_input.split(sizes), of_state.split(sizes)
    return torch.cat((gates + state_gates, new, reset)).float()


def _steps(
    inputs: Tensor,
    sizes: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    cell: Tensor | None,
    kind: Kind,
    reverse: bool,
    saves: bool,
) -> tuple[Tensor, ...]:
    """All steps of one direction of a layer.

    Args:
        inputs: what the layer's input contributes to the gates, in PyTorch's order, FP32 or BF16: shape
            (steps, sequences, gates * hidden), or (rows, gates * hidden) if packed.
        sizes: how many sequences have each step, if packed; INT64, not growing.
        weight: shape (gates * hidden, hidden), dtype of ``inputs``.
        bias: of all gates, and then of the product that a GRU's reset gate multiplies; FP32; or None.
        state: before the first step, shape (sequences, hidden), dtype of ``inputs``.
        cell: of an LSTM, likewise, FP32.
        kind: of the layer: LSTM, GRU, or Elman's with either activation.
        reverse: whether a sequence begins with its last step.
        saves: whether there will be a backward pass.

    Returns:
        The states behind all steps, in the order of ``inputs``; state and cell behind each sequence's last
        step; and for the backward pass the gates' values (empty if not wanted), the states before all
        steps, and the cells behind them (FP32). Cells are empty but for an LSTM.
    """
    results = _empty_steps(inputs, sizes, weight, bias, state, cell, kind, reverse, saves)
    rows = Rows.of(inputs, sizes, reverse)
    forward(kind, rows, inputs, weight, bias, state, cell, results)
    return results


def _empty_steps(
    inputs: Tensor,
    sizes: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    cell: Tensor | None,
    kind: Kind,
    reverse: bool,
    saves: bool,
) -> tuple[Tensor, ...]:
    """What :func:`_steps` fills, with nothing in it."""
    shape, hidden = inputs.shape[:-1], weight.shape[1]
    fp32 = torch.float32
    return (
        inputs.new_empty((*shape, hidden)),
        inputs.new_empty(state.shape),
        inputs.new_empty(0 if cell is None else cell.shape, dtype=fp32),
        inputs.new_empty((*shape, SAVED[kind] * hidden) if saves else 0),
        inputs.new_empty((*shape, hidden)),
        inputs.new_empty(0 if cell is None else (*shape, hidden), dtype=fp32),
    )


def _steps_backward(
    output: Tensor,
    last_state: Tensor,
    last_cell: Tensor,
    sizes: Tensor | None,
    weight: Tensor,
    cell: Tensor | None,
    saved: Tensor,
    previous: Tensor,
    cells: Tensor,
    kind: Kind,
    reverse: bool,
    wants_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of what goes into :func:`_steps`.

    Args:
        output: gradient of the states behind all steps, dtype of ``saved``.
        last_state: gradient of the last state, likewise.
        last_cell: gradient of the last cell, FP32; empty but for an LSTM.
        sizes: as for the forward pass, like ``weight``, ``cell``, ``kind`` and ``reverse``.
        saved: from the forward pass, like ``previous`` and ``cells``.
        wants_state: whether the gradient of the state before the first step is wanted.

    Returns:
        Gradients of ``inputs``; of the products of states and weight (empty where these are the same: but
        for a GRU); of ``state`` (empty if not wanted); and of ``cell`` (FP32; empty but for an LSTM).
    """
    of_inputs, of_products, of_state, of_cell = results = _empty_backward(
        output,
        last_state,
        last_cell,
        sizes,
        weight,
        cell,
        saved,
        previous,
        cells,
        kind,
        reverse,
        wants_state,
    )
    rows = Rows.of(saved, sizes, reverse)
    carried = of_cell.copy_(last_cell) if kind == "lstm" else torch.zeros(last_state.shape)
    products = of_products if kind == "gru" else of_inputs
    gradients = output, last_state, of_inputs, products, carried
    backward(kind, rows, gradients, weight, cell, saved, previous, cells)
    if wants_state:
        firsts = rows.first_of_each(last_state.shape[0])
        torch.mm(products.flatten(0, -2)[firsts], weight, out=of_state)
        if kind == "gru":
            of_state += carried
    return results


def _empty_backward(
    output: Tensor,
    last_state: Tensor,
    last_cell: Tensor,
    sizes: Tensor | None,
    weight: Tensor,
    cell: Tensor | None,
    saved: Tensor,
    previous: Tensor,
    cells: Tensor,
    kind: Kind,
    reverse: bool,
    wants_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :func:`_steps_backward` fills, with nothing in it."""
    of_inputs = (*saved.shape[:-1], GATES[kind] * weight.shape[1])
    return (
        saved.new_empty(of_inputs),
        saved.new_empty(of_inputs if kind == "gru" else 0),
        saved.new_empty(last_state.shape if wants_state else 0),
        last_cell.new_empty(last_cell.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, sizes, weight, bias, _, cell, kind, reverse, _ = inputs
    *_, saved, previous, cells = output
    ctx.save_for_backward(sizes, weight, cell, saved, previous, cells)
    ctx.kind, ctx.reverse, ctx.has_bias = kind, reverse, bias is not None


def _gradients(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    sizes, weight, cell, saved, previous, cells = ctx.saved_tensors
    of_inputs, of_products, of_state, of_cell = recurrent_steps_backward(
        *gradients[:3],
        sizes,
        weight,
        cell,
        saved,
        previous,
        cells,
        ctx.kind,
        ctx.reverse,
        ctx.needs_input_grad[4],
    )
    products = (of_products if ctx.kind == "gru" else of_inputs).flatten(0, -2)
    of_weight = products.t() @ previous.flatten(0, -2)
    of_bias = None
    if ctx.has_bias:
        of_bias = of_inputs.flatten(0, -2).sum(0, dtype=torch.float32)
        if ctx.kind == "gru":
            reset = products[:, -weight.shape[1] :].sum(0, dtype=torch.float32)
            of_bias = torch.cat((of_bias, reset))
    of_cell = None if cell is None else of_cell
    return of_inputs, None, of_weight, of_bias, of_state, of_cell, None, None, None


recurrent_steps = define(
    "recurrent_steps(Tensor inputs, Tensor? sizes, Tensor weight, Tensor? bias, Tensor state, "
    "Tensor? cell, str kind, bool reverse, bool saves) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _steps,
    _empty_steps,
    COMPILED_AS_LAID_OUT,
)
recurrent_steps_backward = define(
    "recurrent_steps_backward(Tensor output, Tensor last_state, Tensor last_cell, Tensor? sizes, "
    "Tensor weight, Tensor? cell, Tensor saved, Tensor previous, Tensor cells, str kind, "
    "bool reverse, bool wants_state) -> (Tensor, Tensor, Tensor, Tensor)",
    _steps_backward,
    _empty_backward,
    COMPILED_AS_LAID_OUT,
)
torch.library.register_autograd(
    "optcpu::recurrent_steps", _gradients, setup_context=_save, lib=LIBRARY
)
