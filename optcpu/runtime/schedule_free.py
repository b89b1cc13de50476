"""Optimizers that evaluate other weights than they train, as schedule-free ones do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optcpu.optim.lookahead import Lookahead


def to_training_weights(optimizer: Optimizer) -> None:
    """Have the weights in the model that ``optimizer`` trains; some make no step without being told so."""
    inner = _within_lookahead(optimizer)
    if _switches(inner):
        inner.train()  # type: ignore[attr-defined]


@contextmanager
def evaluation_weights(optimizer: Optimizer) -> Iterator[None]:
    """Within the block the model has the weights that ``optimizer`` means to be evaluated.

    Afterwards weights and state have the very bits that they had before, which ``optimizer.train()`` alone
    does not give back. Nothing happens where the optimizer has only one kind of weights, has made no step,
    or has those for evaluation in the model already.
    """
    optimizer = _within_lookahead(optimizer)
    if not _switches(optimizer) or not optimizer.state or not _trains(optimizer):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    weights = [p.detach().clone() for p in parameters]
    state = {p: _copied(entries) for p, entries in optimizer.state.items()}
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        to_training_weights(optimizer)
        with torch.no_grad():
            for parameter, before in zip(parameters, weights, strict=True):
                parameter.copy_(before)
            _put_back(optimizer, state)


def _within_lookahead(optimizer: Optimizer) -> Optimizer:
    while isinstance(optimizer, Lookahead):
        optimizer = optimizer.optimizer
    return optimizer


def _switches(optimizer: Optimizer) -> bool:
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def _trains(optimizer: Optimizer) -> bool:
    """Whether the weights in the model are those that are trained."""
    modes = [group.get("train_mode", True) for group in optimizer.param_groups]
    return bool(getattr(optimizer, "train_mode", any(modes)))


def _copied(entries: dict[str, Any]) -> dict[str, Any]:
    return {n: one.clone() if isinstance(one, Tensor) else one for n, one in entries.items()}


def _put_back(optimizer: Optimizer, state: dict[Any, dict[str, Any]]) -> None:
    """The state as it was; tensors stay the same objects, which an optimizer may know elsewhere, too."""
    for parameter in [p for p in optimizer.state if p not in state]:
        del optimizer.state[parameter]
    for parameter, before in state.items():
        entries = optimizer.state[parameter]
        for name in [name for name in entries if name not in before]:
            del entries[name]
        for name, value in before.items():
            if isinstance(value, Tensor) and name in entries:
                entries[name].copy_(value)
            else:
                entries[name] = value
