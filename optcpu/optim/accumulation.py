"""Gradients of several backward passes, added up at the speed of memory.

With gradient accumulation autograd adds each new gradient to the one that is there. In BF16 PyTorch's own
addition is bound by its conversions, and takes more than four times as long as memory does. The update's
kernel has an addition as a special case: gradient descent by a step of -1. Its bits are the same.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, increment_version

from optcpu.memory_order import in_one_order, is_dense
from optcpu.optim import native
from optcpu.optim.formats import Format, Stored
from optcpu.optim.rules import Constants, Slot

_ADD = Constants(step_size=-1.0)
_LEAST_NUMBERS = 2**14  # of a gradient that is worth a call


def add_gradients_of(node: Any) -> None:
    """Let the kernel add the gradients in BF16 that ``node`` will give to those that are there.

    Left to autograd are those that someone is to see before they are added, a hook say, and those of
    which the node gives several parts.

    Args:
        node: of autograd; its backward is to come.
    """
    leaves = [getattr(edge, "variable", None) for edge, _ in node.next_functions]
    times = Counter(map(id, leaves))
    leaves = [leaf if times[id(leaf)] == 1 else None for leaf in leaves]
    node.register_hook(functools.partial(_added, leaves))


def add(total: Tensor, gradient: Tensor) -> None:
    """``total += gradient``, by the kernel if it can."""
    if _fit(total, gradient):
        _add([(total, gradient)])
    else:
        total += gradient


def _added(
    leaves: Sequence[Tensor | None], gradients: Sequence[Any], _: Any
) -> tuple[Any, ...] | None:
    """What is left for autograd to add when the kernel has added what it can."""
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    for place, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        if leaf is None or not isinstance(gradient, Tensor):
            continue
        total = leaf.grad
        if total is not None and _fit(total, gradient) and _adds_unseen(leaf):
            pairs[place] = total, gradient
    if not pairs:
        return None
    _add(list(pairs.values()))
    return tuple(None if place in pairs else given for place, given in enumerate(gradients))


def _add(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    native.sgd([Slot(_ADD, _stored(total), _stored(gradient)) for total, gradient in pairs])
    increment_version([total for total, _ in pairs])


def _stored(numbers: Tensor) -> Stored:
    return Stored(Format.NEAREST, numbers)


def _fit(total: Tensor, gradient: Tensor) -> bool:
    """Whether the kernel can add them, and it is worth the call."""
    return (
        total.dtype == gradient.dtype == torch.bfloat16
        and type(total) is type(gradient) is Tensor
        and total.layout == gradient.layout == torch.strided
        and total.device.type == gradient.device.type == "cpu"
        and total.shape == gradient.shape
        and total.numel() >= _LEAST_NUMBERS
        and not total.requires_grad
        and not gradient.requires_grad
        and is_dense(total)
        and in_one_order(total, gradient)
        and native.library_or_none() is not None
    )


def _adds_unseen(leaf: Tensor) -> bool:
    """Whether autograd is to add the gradient that comes, and nothing looks at it on the way."""
    if leaf._backward_hooks or leaf._post_accumulate_grad_hooks:  # type: ignore[attr-defined]
        return False
    node = get_gradient_edge(leaf).node
    try:
        return bool(torch._C._will_engine_execute_node(node))  # type: ignore[attr-defined]
    except RuntimeError:  # torch.autograd.grad() is to return it
        return False
