"""The gradient norms of blocks, added up over a window of optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optcpu.errors import OptcpuError
from optcpu.optim.base import StoredOptimizer
from optcpu.optim.lookahead import Lookahead
from optcpu.runtime.freezing.blocks import Block


class GradientObserver:
    """Looks at the gradients whenever ``optimizer`` makes a step.

    Args:
        optimizer: whose steps count.
        blocks: in order.
        every: look in the first of so many steps, counted from the start of the window.

    Attributes:
        steps: optimizer steps so far.
        position: those of this window.
        frozen: how many blocks, from the first, need not be looked at.
    """

    def __init__(self, optimizer: Optimizer, blocks: Sequence[Block], every: int) -> None:
        refuse_updates_in_backward(optimizer)
        self.steps = self.frozen = 0
        self._blocks, self._every = blocks, every
        self.begin_window()
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def begin_window(self) -> None:
        """Forget the norms so far."""
        self.position = self._looks = 0
        self._sums = torch.zeros(len(self._blocks), dtype=torch.float64)

    def mean_norms(self) -> list[float]:
        """Of each block's gradients, over the steps of this window that were looked at."""
        means: list[float] = (self._sums / max(self._looks, 1)).tolist()
        return means

    def close(self) -> None:
        """Look no more."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Where in which window this is; sums that are no number are None."""
        return {
            "steps": self.steps,
            "position": self.position,
            "looks": self._looks,
            "sums": [s if math.isfinite(s) else None for s in self._sums.tolist()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.steps, self.position, self._looks = state["steps"], state["position"], state["looks"]
        sums = [math.nan if s is None else s for s in state["sums"]]
        self._sums = torch.tensor(sums, dtype=torch.float64)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_updates_in_backward(optimizer)
        if not _has_closure(args, kwargs):
            self._look()

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _has_closure(args, kwargs):
            self._look()  # the step itself has computed the gradients
        self.steps += 1
        self.position += 1

    @torch.no_grad()
    def _look(self) -> None:
        if self.position % self._every:
            return
        self._looks += 1
        for place in range(self.frozen, len(self._blocks)):
            self._sums[place] += gradient_norm(self._blocks[place].parameters)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The 2-norm of the gradients of ``parameters`` together; zero where there is none.

    Computed in FP32. Of a BF16 gradient each row is, and the row's norm rounded to BF16, since PyTorch
    would make an FP32 copy of the whole gradient otherwise; over the rows that averages out.

    Returns:
        A float64 tensor of no dimensions.
    """
    gradients = [_numbers(p.grad) for p in parameters if p.grad is not None]
    full = [gradient for gradient in gradients if gradient.dtype == torch.float32]
    norms = list(torch._foreach_norm(full)) if full else []
    norms += [_norm_by_rows(g) for g in gradients if g.dtype != torch.float32]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return _norm(torch.stack([norm.double() for norm in norms]))


def refuse_updates_in_backward(optimizer: Optimizer) -> None:
    """Raise OptcpuError where gradients are gone before ``optimizer.step()``."""
    inner = optimizer.optimizer if isinstance(optimizer, Lookahead) else optimizer
    if isinstance(inner, StoredOptimizer) and inner._in_backward is not None:
        raise OptcpuError(
            "DynamicFreezer looks at the gradients when optimizer.step() begins, but "
            "update_in_backward() frees them before: call optimizer.update_in_step()"
        )


def _norm_by_rows(gradient: Tensor) -> Tensor:
    if gradient.dim() < 2 or gradient.dtype == torch.float64:
        return _norm(gradient.double())
    return _norm(torch.linalg.vector_norm(gradient.flatten(1), dim=1).double())


def _norm(numbers: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(numbers)
    return norm


def _numbers(gradient: Tensor) -> Tensor:
    """The numbers of a gradient; a sparse one's are those of the rows that it has."""
    return gradient if gradient.layout == torch.strided else gradient.coalesce().values()


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    # The optimizer itself stands first among the arguments.
    return kwargs.get("closure", args[1] if len(args) > 1 else None) is not None
