"""Updates in the backward pass, for as long as a trainer trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.optim import Optimizer

from optcpu.optim import Lookahead
from optcpu.optim.base import StoredOptimizer


@contextmanager
def updates_in_backward(
    optimizer: Optimizer, accumulation_steps: int, processes: int
) -> Iterator[None]:
    """Within the block ``optimizer`` updates in the backward pass of a step's last micro-batch.

    Behind it the parameters are watched no more, so that another optimizer may train them, and
    ``optimizer`` updates as it did before.

    Args:
        optimizer: one of :mod:`optcpu.optim`, or a Lookahead around it.
        accumulation_steps: micro-batches in a step.
        processes: that train together.

    Raises:
        ValueError: it is another, or processes have to add up their gradients first.
        OptcpuError: it needs all gradients at once.
    """
    inner = _inner(optimizer)
    if not isinstance(inner, StoredOptimizer):
        raise ValueError(
            f"update_in_backward needs an optimizer of optcpu.optim, not {type(inner).__name__}"
        )
    if processes > 1:
        raise ValueError(
            "update_in_backward is for one process: several add up their gradients before the update; "
            "leave it out"
        )
    before = inner._in_backward
    inner.update_in_backward(accumulation_steps)
    try:
        yield
    finally:
        inner.update_in_step()
        if before is not None:
            inner.update_in_backward(before.accumulation_steps)


def count_passes(optimizer: Optimizer, done: int) -> None:
    """Tell one that updates in the backward pass how many of those of the step have been made."""
    inner = _inner(optimizer)
    if isinstance(inner, StoredOptimizer) and inner._in_backward is not None:
        inner._in_backward.begin_step(done)


def _inner(optimizer: Optimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, Lookahead) else optimizer
