"""How operators of our own are defined: those that passes rewrite to, in ``torch.ops.optcpu``.

Each is implemented in Python, which calls kernels; generated code calls that directly
(:mod:`passes.call_sites`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

LIBRARY = torch.library.Library("optcpu", "DEF")

# What an operator may say of itself: that PyTorch's compiler can take it, and that this must not change how
# the operands lie in memory.
COMPILED = (torch.Tag.pt2_compliant_tag,)
COMPILED_AS_LAID_OUT = (torch.Tag.needs_fixed_stride_order, *COMPILED)

# What the operators do, by their names in ``torch.ops.optcpu``.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    tags: Sequence[torch.Tag] = (),
) -> OpOverload:
    """Define an operator.

    Args:
        schema: as PyTorch writes it, from the name to what is returned.
        implementation: on the CPU.
        fake: gives results without numbers, for tensors that have none.
        tags: what the compiler may know of it.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=tags)
    LIBRARY.impl(name, implementation, "CPU")
    torch.library.register_fake(f"optcpu::{name}", fake, lib=LIBRARY)
    IMPLEMENTATIONS[name] = implementation
    operator: OpOverload = getattr(torch.ops.optcpu, name).default
    return operator
