"""The native layout: weights in oneDNN's blocked format, by the oneDNN in PyTorch itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from passes.gemm import onednn_available
from passes.ops import linear_add_by_onednn, post_op


class NativePacking:
    """oneDNN's blocked format, which suits the shape, the dtype, the processor and the threads."""

    name = "native"

    def pack(self, weight: Tensor, rows: int, before: Any) -> Tensor:
        """See :meth:`passes.packed.Packing.pack`; the result is an opaque tensor of PyTorch's."""
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        """See :meth:`passes.packed.Packing.unpack`."""
        return packed.to_dense()

    def linear(
        self, x: Tensor, packed: Any, bias: Tensor | None, activation: str, residual: Tensor | None
    ) -> Tensor:
        """See :meth:`passes.packed.Packing.linear`."""
        if residual is not None:
            return linear_add_by_onednn(x, packed, bias, residual)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, *post_op(activation))
        return result


def why_impossible() -> str | None:
    """Why BF16 weights cannot be packed here; None if they can."""
    if not onednn_available():
        return "this build of PyTorch has no oneDNN"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN packs BF16 weights on processors with AVX-512 or AVX_NE_CONVERT alone"
    return None
