"""A packing that any processor can do, for tests of those who keep packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from passes import ops


class Copies:
    """Weights packed by copying them, and how often that was done."""

    name = "copies"

    def __init__(self) -> None:
        self.packings = 0

    def pack(self, weight: Tensor, rows: int, before: Any) -> Tensor:
        self.packings += 1
        return weight.clone()

    def unpack(self, copy: Tensor) -> Tensor:
        return copy

    def linear(
        self, x: Tensor, copy: Any, bias: Tensor | None, activation: str, residual: Tensor | None
    ) -> Tensor:
        columns = copy.t()
        result = x @ columns if bias is None else torch.addmm(bias.to(x.dtype), x, columns)
        if residual is not None:
            result = result + residual
        return ops.activate(result, activation)
