"""The steps of an LSTM layer: by a kernel, or by PyTorch's operators where it cannot be built.

A step is a product too small for a library to bring the weight into its layout each time, and then a few
operations on its result, which is in the cache still.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from passes.build import load

_SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Rows:
    """Where the steps lie: those of one step are rows that follow each other, the longest sequence first.

    Args:
        counts: how many sequences have each step; INT64.
        reverse: whether a sequence begins with its last step.
    """

    counts: Tensor
    reverse: bool

    @classmethod
    def of(cls, padded: Tensor, sizes: Tensor | None, reverse: bool) -> Rows:
        """Of shape (steps, sequences, ...), or of packed sequences whose ``sizes`` are given."""
        if sizes is None:
            sizes = torch.full((padded.shape[0],), padded.shape[1])
        return cls(sizes, reverse)

    @property
    def offsets(self) -> Tensor:
        """The first row of each step."""
        return self.counts.cumsum(0) - self.counts

    def first_of_each(self, sequences: int) -> Tensor:
        """The row of the step with which each sequence begins."""
        places = torch.arange(sequences)
        if not self.reverse:
            return places
        lengths = (self.counts[:, None] > places).sum(0)
        return self.offsets[lengths - 1] + places

    def in_order(self) -> Iterator[tuple[slice, slice, int]]:
        """Of each step its rows, those of the step before that have both, and how many these are."""
        counts, offsets = self.counts.tolist(), self.offsets.tolist()
        steps = [slice(offset, offset + c) for offset, c in zip(offsets, counts, strict=True)]
        before, shared = slice(0, 0), 0
        for step in reversed(steps) if self.reverse else steps:
            shared = min(before.stop - before.start, step.stop - step.start)
            yield step, slice(before.start, before.start + shared), shared
            before = step


def kernel_available(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for ``dtype`` here; builds it if need be."""
    library = _library()
    if library is None or dtype not in _SUFFIXES:
        return False
    return bool(getattr(library, f"multiplies_{_SUFFIXES[dtype]}")())


def forward(
    rows: Rows,
    inputs: Tensor,
    weight: Tensor,
    state: Tensor,
    cell: Tensor,
    results: Sequence[Tensor],
) -> None:
    """Fill ``results``; all is described in :mod:`passes.lstm`."""
    output, last_state, last_cell, gates, previous, cells = results
    if output.numel() == 0:
        last_state.copy_(state)
        last_cell.copy_(cell)
    elif kernel_available(inputs.dtype):
        layer = _layer(rows, weight, gates, previous.stride(-2), previous, cells, cell)
        given = inputs.contiguous(), state.contiguous()
        _call("forward", inputs.dtype, *layer, *given, output, last_state, last_cell)
    else:
        _forward_by_operators(rows, inputs, weight, state, cell, results)


def backward(
    rows: Rows,
    gradients: Sequence[Tensor],
    weight: Tensor,
    cell: Tensor,
    gates: Tensor,
    cells: Tensor,
    of_inputs: Tensor,
    of_cell: Tensor,
) -> None:
    """Fill ``of_inputs`` and ``of_cell``; all is described in :mod:`passes.lstm`."""
    if gates.numel() == 0:
        of_cell.copy_(gradients[2])
    elif kernel_available(gates.dtype):
        layer = _layer(rows, weight, gates, 0, None, cells, cell)
        given = [gradient.contiguous() for gradient in gradients]
        _call("backward", gates.dtype, *layer, *given, of_inputs, of_cell)
    else:
        _backward_by_operators(rows, gradients, weight, cell, gates, cells, of_inputs, of_cell)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernel; None where it cannot be built or the processor has no AVX-512."""
    if not torch.cpu._is_avx512_supported():
        return None
    library = load(Path(__file__).parent / "kernels" / "lstm.cpp")
    if library is not None:
        library.multiplies_fp32.restype = library.multiplies_bf16.restype = ctypes.c_bool
    return library


Argument = Tensor | int | bool | None


def _layer(
    rows: Rows,
    weight: Tensor,
    gates: Tensor,
    leading: int,
    previous: Tensor | None,
    cells: Tensor,
    cell: Tensor,
) -> tuple[Argument, ...]:
    """What both directions of the kernel take first."""
    where = (rows.counts.contiguous(), rows.offsets, rows.counts.numel(), rows.reverse)
    wanted = gates if gates.numel() else None
    return (
        *where,
        weight.shape[1],
        leading,
        weight.contiguous(),
        wanted,
        previous,
        cells,
        cell.contiguous(),
    )


def _call(direction: str, dtype: torch.dtype, *arguments: Argument) -> None:
    kernel = getattr(_library(), f"lstm_{direction}_{_SUFFIXES[dtype]}")
    kernel.restype = None
    kernel(*map(_in_c, arguments))


def _in_c(argument: Argument) -> object:
    if isinstance(argument, bool):
        return ctypes.c_bool(argument)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


def _forward_by_operators(
    rows: Rows,
    inputs: Tensor,
    weight: Tensor,
    state: Tensor,
    cell: Tensor,
    results: Sequence[Tensor],
) -> None:
    output, last_state, last_cell, gates, previous, cells = results
    output, previous, cells = (t.flatten(0, -2) for t in (output, previous, cells))
    inputs = inputs.flatten(0, -2)
    last_state.copy_(state)
    last_cell.copy_(cell)
    for step, _, _ in rows.in_order():
        count = step.stop - step.start
        h, c = last_state[:count], last_cell[:count]
        previous[step] = h
        i, f, g, o = (inputs[step] + h @ weight.t()).float().chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c.mul_(f).add_(i * g)
        h.copy_(o * c.tanh())
        output[step], cells[step] = h, c
        if gates.numel():
            gates.flatten(0, -2)[step] = torch.cat((i, f, g, o), 1)


def _backward_by_operators(
    rows: Rows,
    gradients: Sequence[Tensor],
    weight: Tensor,
    cell: Tensor,
    gates: Tensor,
    cells: Tensor,
    of_inputs: Tensor,
    of_cell: Tensor,
) -> None:
    output, last_state, last_cell = gradients
    output, gates, cells, of_inputs = (t.flatten(0, -2) for t in (output, gates, cells, of_inputs))
    of_state = last_state.to(torch.float32, copy=True)
    of_cell.copy_(last_cell)
    for step, earlier, shared in reversed(list(rows.in_order())):
        count = step.stop - step.start
        before = torch.cat((cells[earlier], cell[shared:count]))
        i, f, g, o = gates[step].float().chunk(4, 1)
        c = cells[step].tanh()
        dh = output[step].float() + of_state[:count]
        dc = of_cell[:count] + dh * o * (1 - c * c)
        d = (
            dc * g * i * (1 - i),
            dc * before * f * (1 - f),
            dc * i * (1 - g * g),
            dh * c * o * (1 - o),
        )
        of_inputs[step] = torch.cat(d, 1)
        of_state[:count] = of_inputs[step] @ weight
        of_cell[:count] = dc * f
