"""Operators that an extension has replaced are differentiated as PyTorch's own are.

PyTorch has no derivative for an operator that is composed of others, such as ``layer_norm``: autograd
sees those that it consists of. Once an extension has registered a kernel of its own for processors, that
holds no longer. Run eagerly, the kernel's own calls are seen; while AOTAutograd traces, nothing is, and
weights below the operator get no gradients, without a word. Intel's extension does this to ``layer_norm``
and ``group_norm`` when it is imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._C import DispatchKey


def take_replaced_apart() -> None:
    """See to it that tracing finds what replaced composite operators consist of.

    It lasts for the process and concerns tracing only: run eagerly, the extension's kernels are called as
    before.
    """
    for operator in _replaced():
        if DispatchKey.AutogradCPU not in operator.py_kernels:
            operator.py_impl(DispatchKey.AutogradCPU)(operator.decompose)


def _replaced() -> list[Any]:
    """Composite operators of ATen that have a kernel for processors and no derivative for it."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key
    names = set(registered("CompositeImplicitAutograd")) & set(registered("CPU"))
    names -= {*registered("AutogradCPU"), *registered("Autograd")}
    return [_operator(name) for name in names if name.startswith("aten::")]


def _operator(name: str) -> Any:
    packet, _, overload = name.removeprefix("aten::").partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")
