"""Hooks of modules, which compiled code must not overlook when they come and go."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as module_file
from torch.utils.hooks import RemovableHandle

_KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OF_ALL_MODULES = tuple(getattr(module_file, f"_global{kind}") for kind in _KINDS)


def hooks_registered() -> int:
    """How many hooks, of whatever kind, were registered in this process so far.

    As long as this stays what it was, no module has got a hook: one look, where the dictionaries of a
    large model would be hundreds.
    """
    return RemovableHandle.next_id


def hooks_of(model: nn.Module) -> set[int]:
    """The numbers of the hooks that run with the forward or the backward of ``model`` or a module in it.

    No number is given twice.
    """
    dictionaries = (getattr(m, kind, None) or () for m in model.modules() for kind in _KINDS)
    return set().union(*dictionaries)


def hooks_of_all_modules() -> bool:
    """Whether there are hooks that run with every module: ``register_module_forward_hook`` makes one.

    PyTorch runs them with the modules that hold its graphs, too, while it traces those.
    """
    return any(_OF_ALL_MODULES)
