"""The steps of a recurrent layer: by a kernel, or by PyTorch's operators where it cannot be built.

A step is a product too small for a library to bring the weight into its layout each time, and then a few
operations on its result, which is in the cache still.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from passes.build import load

Kind = Literal["lstm", "gru", "tanh", "relu"]

GATES: dict[Kind, int] = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
# What the backward pass needs of a step: the gates' values, and of a GRU what the reset gate multiplies.
SAVED: dict[Kind, int] = {"lstm": 4, "gru": 4, "tanh": 1, "relu": 1}

_KINDS: tuple[Kind, ...] = ("lstm", "gru", "tanh", "relu")  # as the kernel numbers them
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


@functools.cache
def kernel_available(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for ``dtype`` here; builds it if need be."""
    library = _library()
    if library is None or dtype not in _SUFFIXES:
        return False
    return bool(getattr(library, f"multiplies_{_SUFFIXES[dtype]}")())


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernel; None where it cannot be built or the processor has no AVX-512."""
    if not torch.cpu._is_avx512_supported():
        return None
    library = load(Path(__file__).parent / "kernels" / "recurrent.cpp")
    if library is not None:
        library.multiplies_fp32.restype = library.multiplies_bf16.restype = ctypes.c_bool
    return library


def forward(
    kind: Kind,
    rows: Rows,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    cell: Tensor | None,
    results: Sequence[Tensor],
) -> None:
    """Fill ``results``; all is described in :mod:`passes.recurrent`."""
    output, last_state, last_cell, saved, previous, cells = results
    if output.numel() == 0:
        last_state.copy_(state)
        if cell is not None:
            last_cell.copy_(cell)
        return
    if not _has_kernel(inputs.dtype, weight):
        _forward_by_operators(kind, rows, inputs, weight, bias, state, cell, results)
        return
    layer = _layer(kind, rows, weight, bias, saved, previous, cells, cell)
    given = inputs.contiguous(), state.contiguous()
    _call("forward", inputs.dtype, *layer, *given, output, last_state, last_cell)


def backward(
    kind: Kind,
    rows: Rows,
    gradients: Sequence[Tensor],
    weight: Tensor,
    cell: Tensor | None,
    saved: Tensor,
    previous: Tensor,
    cells: Tensor,
) -> None:
    """Fill all but the first two of ``gradients``; these are of the output, the last state, the inputs,
    the products, and what goes past the products (:class:`Backward` in the kernel).
    """
    if saved.numel() == 0:
        return
    if not _has_kernel(saved.dtype, weight):
        _backward_by_operators(kind, rows, gradients, weight, cell, saved, previous, cells)
        return
    output, last_state, *filled = gradients
    layer = _layer(kind, rows, weight, None, saved, previous, cells, cell)
    given = output.contiguous(), last_state.contiguous()
    _call("backward", saved.dtype, *layer, *given, *filled)


def _has_kernel(dtype: torch.dtype, weight: Tensor) -> bool:
    """BF16 numbers are multiplied in pairs, which have to come out even."""
    return kernel_available(dtype) and (dtype == torch.float32 or weight.shape[1] % 2 == 0)


Argument = Tensor | int | bool | None


def _layer(
    kind: Kind,
    rows: Rows,
    weight: Tensor,
    bias: Tensor | None,
    saved: Tensor,
    previous: Tensor,
    cells: Tensor,
    cell: Tensor | None,
) -> tuple[Argument, ...]:
    """What both directions of the kernel take first."""
    return (
        _KINDS.index(kind),
        rows.counts.contiguous(),
        rows.offsets,
        rows.counts.numel(),
        rows.reverse,
        weight.shape[1],
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        saved.contiguous() if saved.numel() else None,
        previous.contiguous(),
        cells.contiguous(),
        None if cell is None else cell.contiguous(),
    )


def _call(direction: str, dtype: torch.dtype, *arguments: Argument) -> None:
    kernel = getattr(_library(), f"{direction}_{_SUFFIXES[dtype]}")
    kernel.restype = None
    kernel(*map(_in_c, arguments))


def _in_c(argument: Argument) -> object:
    if isinstance(argument, bool):
        return ctypes.c_bool(argument)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


def _forward_by_operators(
    kind: Kind,
    rows: Rows,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    cell: Tensor | None,
    results: Sequence[Tensor],
) -> None:
    output, last_state, last_cell, saved, previous, cells = results
    output, previous, inputs = (t.flatten(0, -2) for t in (output, previous, inputs))
    last_state.copy_(state)
    if cell is not None:
        last_cell.copy_(cell)
        cells = cells.flatten(0, -2)
    for step, _, _ in rows.in_order():
        h = last_state[: step.stop - step.start]
        previous[step] = h
        given = list(inputs[step].float().chunk(GATES[kind], 1))
        product = list((h @ weight.t()).float().chunk(GATES[kind], 1))
        if bias is not None:
            parts = bias.chunk(SAVED[kind])
            given = [one + part for one, part in zip(given, parts, strict=False)]
            if kind == "gru":
                product[2] = product[2] + parts[3]
        if kind == "lstm":
            i, f, o = ((given[g] + product[g]).sigmoid() for g in (0, 1, 3))
            g = (given[2] + product[2]).tanh()
            c = last_cell[: step.stop - step.start]
            c.mul_(f).add_(i * g)
            cells[step] = c
            kept = [i, f, g, o]
            h.copy_(o * c.tanh())
        elif kind == "gru":
            r, z = ((given[g] + product[g]).sigmoid() for g in (0, 1))
            n = (given[2] + r * product[2]).tanh()
            kept = [r, z, n, product[2]]
            h.copy_(n + z * (h - n))
        else:
            total = given[0] + product[0]
            h.copy_(total.tanh() if kind == "tanh" else total.relu())
            kept = [h]
        output[step] = h
        if saved.numel():
            saved.flatten(0, -2)[step] = torch.cat(kept, 1).to(saved.dtype)


def _backward_by_operators(
    kind: Kind,
    rows: Rows,
    gradients: Sequence[Tensor],
    weight: Tensor,
    cell: Tensor | None,
    saved: Tensor,
    previous: Tensor,
    cells: Tensor,
) -> None:
    output, last_state, of_inputs, of_products, carried = gradients
    output, saved, previous = (t.flatten(0, -2) for t in (output, saved, previous))
    of_inputs, of_products = of_inputs.flatten(0, -2), of_products.flatten(0, -2)
    of_state = last_state.to(torch.float32, copy=True)
    for step, earlier, shared in reversed(list(rows.in_order())):
        count = step.stop - step.start
        past = carried[:count]
        dh = output[step].float() + of_state[:count]
        kept = saved[step].float().chunk(SAVED[kind], 1)
        if cell is not None:
            before = torch.cat((cells.flatten(0, -2)[earlier], cell[shared:count]))
            i, f, g, o = kept
            c = cells.flatten(0, -2)[step].tanh()
            dc = past + dh * o * (1 - c * c)
            d = [dc * g * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - g * g)]
            d.append(dh * c * o * (1 - o))
            past.copy_(dc * f)
        elif kind == "gru":
            r, z, n, reset = kept
            dh = dh + past
            dn = dh * (1 - z) * (1 - n * n)
            d = [dn * reset * r * (1 - r), dh * (previous[step].float() - n) * z * (1 - z), dn]
            of_products[step] = torch.cat((*d[:2], dn * r), 1).to(saved.dtype)
            past.copy_(dh * z)
        else:
            (h,) = kept
            d = [dh * (1 - h * h) if kind == "tanh" else dh * (h > 0)]
        of_inputs[step] = torch.cat(d, 1).to(saved.dtype)
        of_state[:count] = of_products[step] @ weight
