"""Train PyTorch models on CPUs close to the hardware's limit: ``model = optcpu.optimize(model)``."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from optcpu.errors import CompileError, FallbackWarning, OptcpuError, WorkerError

if TYPE_CHECKING:
    from optcpu.compare import Comparison, compare
    from optcpu.inspect import Inspection, inspect
    from optcpu.layers import FusedLinearReLU
    from optcpu.optim import Lamb, Lookahead
    from optcpu.optimize import optimize, restore
    from optcpu.pipeline import default_passes
    from optcpu.runtime import DynamicFreezer, SyntheticDataset, Trainer

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "CompileError",
    "DynamicFreezer",
    "FallbackWarning",
    "FusedLinearReLU",
    "Inspection",
    "Lamb",
    "Lookahead",
    "OptcpuError",
    "SyntheticDataset",
    "Trainer",
    "WorkerError",
    "compare",
    "default_passes",
    "inspect",
    "optimize",
    "restore",
]

_HOME = {
    "Comparison": "optcpu.compare",
    "DynamicFreezer": "optcpu.runtime",
    "Inspection": "optcpu.inspect",
    "FusedLinearReLU": "optcpu.layers",
    "Lamb": "optcpu.optim",
    "Lookahead": "optcpu.optim",
    "SyntheticDataset": "optcpu.runtime",
    "Trainer": "optcpu.runtime",
    "compare": "optcpu.compare",
    "default_passes": "optcpu.pipeline",
    "inspect": "optcpu.inspect",
    "optimize": "optcpu.optimize",
    "restore": "optcpu.optimize",
}
_MODULES = ("data", "models", "optim", "runtime", "workloads")


def _imported(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except OSError as error:  # PyTorch's compiler makes its cache directory when it is imported
        raise OptcpuError(
            f"PyTorch's compiler cannot be imported ({error}); if the path is its cache directory, set "
            "TORCHINDUCTOR_CACHE_DIR to a directory that can be written"
        ) from error


class _Package(ModuleType):
    """Imports what is asked for when it is asked for; importing torch takes seconds."""

    def __getattr__(self, name: str) -> Any:
        if name in _HOME:
            return getattr(_imported(_HOME[name]), name)
        if name in _MODULES:
            return _imported(f"optcpu.{name}")
        raise AttributeError(f"module 'optcpu' has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the module optcpu.compare must not put it in the place of the function.
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOME})


sys.modules[__name__].__class__ = _Package
