"""The layout of Intel's extension: a linear layer that ``ipex.optimize`` has packed multiplies.

``ipex.optimize`` would put modules of its own in place of the model's, whose weights are packed
parameters that copies, checkpoints, freezing and most optimizers cannot deal with. It is therefore
given a linear layer apart from the model for each weight; that one's packed weight is filled anew once
the optimizer has changed the model's, which stays what it is. So the update is optcpu's: the
extension's own leaves out AdamW, and its LAMB never moves a bias that is zero.

Importing the extension changes the process: it replaces kernels of ATen and rules of autocast. With
another release of PyTorch than its own the import ends in an exception of any kind, or the process.
So it is imported only after the releases were compared, and where this layout was asked for or has won.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from optcpu.errors import OptcpuError
from passes.ops import activate

PACKAGE = "intel-extension-for-pytorch"
MODULE = "intel_extension_for_pytorch"


@dataclass(frozen=True)
class PackedLinear:
    """A linear layer that the extension has packed."""

    module: Any  # _IPEXLinear
    shape: tuple[int, ...]


class IpexPacking:
    """The format that ``ipex.optimize`` chooses for a linear layer and a number of rows.

    Raises:
        OptcpuError: the extension cannot be used here.
    """

    name = "ipex"

    def __init__(self) -> None:
        self._ipex = load()

    def pack(self, weight: Tensor, rows: int, before: Any) -> PackedLinear:
        """See :meth:`passes.packed.Packing.pack`."""
        if before is None:
            with torch.random.fork_rng(devices=[]):  # a new layer has random weights
                before = self._packed_linear(weight, rows)
        with torch.no_grad():
            before.module.weight.copy_(before.module.ctx.pack(weight))
        return before  # type: ignore[no-any-return]

    def unpack(self, packed: PackedLinear) -> Tensor:
        """See :meth:`passes.packed.Packing.unpack`."""
        plain: Tensor = packed.module.ctx.to_public(packed.module.weight.detach())
        return plain.view(packed.shape)

    def linear(
        self, x: Tensor, packed: Any, bias: Tensor | None, activation: str, residual: Tensor | None
    ) -> Tensor:
        """See :meth:`passes.packed.Packing.linear`."""
        module = packed.module
        with torch.no_grad():
            result: Tensor = torch.ops.torch_ipex.ipex_linear(
                x, module.weight, None, module.ctx.get_data_handle(), module.out_features
            )
        if bias is not None:
            result = result.add_(bias)
        if residual is not None:
            result = result.add_(residual)
        return activate(result, activation)

    def _packed_linear(self, weight: Tensor, rows: int) -> PackedLinear:
        outputs, inputs = weight.shape
        linear = nn.Linear(inputs, outputs, bias=False, dtype=torch.float32)
        holder = nn.Sequential(linear).train()
        self._ipex.optimize(
            holder,
            optimizer=torch.optim.SGD(holder.parameters(), lr=0.0),
            dtype=torch.bfloat16 if weight.dtype == torch.bfloat16 else None,
            level="O0",
            weights_prepack=True,
            # Without it FP32 layers would stay plain; with it all go to oneDNN.
            auto_kernel_selection=True,
            sample_input=torch.zeros(rows, inputs),
            inplace=True,  # what it copies has lost its packed format
        )
        packed = holder[0]
        if not hasattr(packed, "ctx"):
            raise RuntimeError(f"IPEX packs no linear layer of shape {tuple(weight.shape)}")
        return PackedLinear(packed, tuple(weight.shape))


def why_impossible() -> str | None:
    """Why the extension cannot be used here, as far as can be told without importing it; else None."""
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"{PACKAGE} is not installed"
    if _series(version) != _series(torch.__version__):
        return f"{PACKAGE} {version} is for torch {_series(version)}, and this is torch {torch.__version__}"
    return None


@functools.cache
def load() -> ModuleType:
    """The extension, imported into this process.

    Raises:
        OptcpuError: it is not installed, is for another PyTorch, or its import fails.
    """
    reason = why_impossible()
    if reason is None:
        try:
            return importlib.import_module(MODULE)
        except (Exception, SystemExit) as error:
            reason = f"importing {MODULE} ended in {type(error).__name__}: {error}"
    raise OptcpuError(
        f"layout='ipex' is not possible here: {reason}. Install both with "
        'pip install -e ".[ipex]" -c constraints-ipex.txt, or use layout="native"'
    )


def _series(version: str) -> str:
    return ".".join(version.split(".")[:2])
