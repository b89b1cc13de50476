"""LSTM layers as products that all passes know, and the steps between them as one operator.

What a layer's input contributes to the gates, and the gradients of both weights, are one large product
each over all steps. Only what is left has to go from step to step (:mod:`passes.lstm_steps`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from passes.lstm_steps import Rows, backward, forward

_LIBRARY = torch.library.Library("optcpu", "FRAGMENT")
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)

_LIBRARY.define(
    "lstm_steps(Tensor inputs, Tensor? sizes, Tensor weight, Tensor state, Tensor cell, bool reverse, "
    "bool saves) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(
    "lstm_steps_backward(Tensor output, Tensor last_state, Tensor last_cell, Tensor? sizes, "
    "Tensor weight, Tensor cell, Tensor gates, Tensor cells, bool reverse, bool wants_state) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def lstm(
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.lstm`` of padded sequences, without projections; its arguments and results."""
    x = (x.transpose(0, 1) if batch_first else x).contiguous()
    output, *last = packed_lstm(
        x, None, state, weights, has_biases, layers, dropout, training, bidirectional
    )
    return (output.transpose(0, 1) if batch_first else output), last[0], last[1]


def packed_lstm(
    x: Tensor,
    sizes: Tensor | None,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.lstm`` of packed sequences, without projections; its arguments and results."""
    directions = 2 if bidirectional else 1
    per_direction = 4 if has_biases else 2
    last_states, last_cells = [], []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            of_input, of_state, *biases = weights[place * per_direction :][:per_direction]
            inputs = F.linear(x, of_input, biases[0] + biases[1] if biases else None)
            output, last_state, last_cell, *_ = lstm_steps(
                inputs,
                sizes,
                of_state.to(inputs.dtype),
                state[0][place].to(inputs.dtype),
                state[1][place].float(),
                direction == 1,
                torch.is_grad_enabled(),
            )
            outputs.append(output)
            last_states.append(last_state)
            last_cells.append(last_cell.to(inputs.dtype))
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout > 0 and training and layer < layers - 1:
            x = F.dropout(x, dropout)
    return x, torch.stack(last_states), torch.stack(last_cells)


def _steps(
    inputs: Tensor,
    sizes: Tensor | None,
    weight: Tensor,
    state: Tensor,
    cell: Tensor,
    reverse: bool,
    saves: bool,
) -> tuple[Tensor, ...]:
    """All steps of one direction of a layer.

    Args:
        inputs: what the layer's input and the biases contribute to the gates (input, forget, cell,
            output), FP32 or BF16: shape (steps, sequences, 4 hidden), or (rows, 4 hidden) if packed.
        sizes: how many sequences have each step, if packed; INT64, not growing.
        weight: shape (4 hidden, hidden), dtype of ``inputs``.
        state: before the first step, shape (sequences, hidden), dtype of ``inputs``.
        cell: likewise, FP32.
        reverse: whether a sequence begins with its last step.
        saves: whether there will be a backward pass.

    Returns:
        The states behind all steps, in the order of ``inputs``; state and cell behind each sequence's last
        step; and for the backward pass the gates (empty if not wanted), the states before all steps, and
        the cells behind them (FP32).
    """
    results = _empty_steps(inputs, sizes, weight, state, cell, reverse, saves)
    rows = Rows.of(inputs, sizes, reverse)
    forward(rows, inputs, weight, state, cell, results)
    return results


def _empty_steps(
    inputs: Tensor,
    sizes: Tensor | None,
    weight: Tensor,
    state: Tensor,
    cell: Tensor,
    reverse: bool,
    saves: bool,
) -> tuple[Tensor, ...]:
    """What :func:`_steps` fills, with nothing in it."""
    shape, hidden = inputs.shape[:-1], weight.shape[1]
    # BF16 numbers are multiplied in pairs, the last of an odd number with a zero.
    filled = inputs.new_zeros if hidden % 2 else inputs.new_empty
    previous = filled((*shape, hidden + hidden % 2))[..., :hidden]
    return (
        inputs.new_empty((*shape, hidden)),
        inputs.new_empty(state.shape),
        cell.new_empty(cell.shape),
        inputs.new_empty(inputs.shape if saves else 0),
        previous,
        cell.new_empty((*shape, hidden)),
    )


def _steps_backward(
    output: Tensor,
    last_state: Tensor,
    last_cell: Tensor,
    sizes: Tensor | None,
    weight: Tensor,
    cell: Tensor,
    gates: Tensor,
    cells: Tensor,
    reverse: bool,
    wants_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`_steps`' ``inputs``, ``state`` (empty if not wanted) and ``cell``.

    Args:
        output: gradient of the states behind all steps, dtype of ``gates``.
        last_state: gradient of the last state, likewise.
        last_cell: gradient of the last cell, FP32.
        sizes: as for the forward pass, like ``weight``, ``cell`` and ``reverse``.
        gates: from the forward pass, like ``cells``.
        wants_state: whether the gradient of ``state`` is wanted.
    """
    results = _empty_backward(
        output, last_state, last_cell, sizes, weight, cell, gates, cells, reverse, wants_state
    )
    rows = Rows.of(gates, sizes, reverse)
    backward(
        rows, (output, last_state, last_cell), weight, cell, gates, cells, results[0], results[2]
    )
    if wants_state:
        firsts = rows.first_of_each(last_state.shape[0])
        torch.mm(results[0].flatten(0, -2)[firsts], weight, out=results[1])
    return results


def _empty_backward(
    output: Tensor,
    last_state: Tensor,
    last_cell: Tensor,
    sizes: Tensor | None,
    weight: Tensor,
    cell: Tensor,
    gates: Tensor,
    cells: Tensor,
    reverse: bool,
    wants_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`_steps_backward` fills, with nothing in it."""
    return (
        gates.new_empty(gates.shape),
        last_state.new_empty(last_state.shape if wants_state else 0),
        cell.new_empty(cell.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, sizes, weight, _, cell, reverse, _ = inputs
    *_, gates, previous, cells = output
    ctx.save_for_backward(sizes, weight, cell, gates, previous, cells)
    ctx.reverse = reverse


def _gradients(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    sizes, weight, cell, gates, previous, cells = ctx.saved_tensors
    of_inputs, of_state, of_cell = lstm_steps_backward(
        *gradients[:3], sizes, weight, cell, gates, cells, ctx.reverse, ctx.needs_input_grad[3]
    )
    of_weight = of_inputs.flatten(0, -2).t() @ previous.flatten(0, -2)
    return of_inputs, None, of_weight, of_state, of_cell, None, None


_LIBRARY.impl("lstm_steps", _steps, "CPU")
_LIBRARY.impl("lstm_steps_backward", _steps_backward, "CPU")
torch.library.register_fake("optcpu::lstm_steps", _empty_steps, lib=_LIBRARY)
torch.library.register_fake("optcpu::lstm_steps_backward", _empty_backward, lib=_LIBRARY)
torch.library.register_autograd("optcpu::lstm_steps", _gradients, setup_context=_save, lib=_LIBRARY)
lstm_steps = torch.ops.optcpu.lstm_steps.default
lstm_steps_backward = torch.ops.optcpu.lstm_steps_backward.default
