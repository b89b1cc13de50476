"""Training and evaluation mode, module by module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def modes_kept(*owners: Any) -> Iterator[list[nn.Module]]:
    """After the block each module is in the mode that it was in before, whatever its parent's is.

    Args:
        owners: modules, with all modules in them; anything else is passed over.

    Yields:
        All those modules.
    """
    modules = [m for owner in owners if isinstance(owner, nn.Module) for m in owner.modules()]
    modes = [module.training for module in modules]
    try:
        yield modules
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training
