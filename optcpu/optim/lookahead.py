"""Lookahead: slow weights that follow the fast ones of another optimizer every few steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optcpu.errors import OptcpuError
from optcpu.optim.base import Group, StoredOptimizer, stored_slow
from optcpu.optim.formats import mixed
from optcpu.optim.weights import StoredWeight

PULLBACKS = ("none", "reset", "pullback")

_OWN_STATE = "lookahead"
_MOMENTA = ("exp_avg", "momentum_buffer")  # what PyTorch's optimizers call a first moment


class Lookahead(Optimizer):
    """Lookahead around any optimizer, Zhang et al. 2019, arXiv 1907.08610, algorithm 1.

    The inner optimizer moves the (fast) weights. Every ``k`` of its steps the slow weights move towards
    them by ``alpha``, and the fast weights go back to the slow ones. Around an optimizer of
    :mod:`optcpu.optim` that costs no further pass over memory. Hyper-parameters, groups and state are
    the inner optimizer's, so that schedulers work on either.

    Args:
        optimizer: the inner one. The slow weights are what its parameters are now.
        k: steps between synchronisations.
        alpha: how far the slow weights move, from 0 to 1.
        pullback: what becomes of the inner optimizer's momentum (first moment) at a synchronisation:
            ``"none"`` leaves it, ``"reset"`` makes it zero, ``"pullback"`` moves what it was at the
            last synchronisation towards it by ``alpha``.
        slow_dtype: of the slow weights: ``torch.float32``, or ``torch.bfloat16`` for half the memory,
            rounded stochastically; the fast weights are not rounded by that.

    Attributes:
        average: given the fast weights in front of each synchronisation, makes each the mean over all
            processes of a distributed run: local SGD with the slow weights as its outer step. None as
            long as nobody sets it.

    Raises:
        TypeError: ``optimizer`` is no optimizer.
        ValueError: another argument is out of its range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        k: int = 5,
        alpha: float = 0.5,
        *,
        pullback: str = "none",
        slow_dtype: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}"
            )
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"k must be an integer of at least 1, not {k!r}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie between 0 and 1, not {alpha!r}")
        if pullback not in PULLBACKS:
            raise ValueError(f"pullback must be one of {', '.join(PULLBACKS)}, not {pullback!r}")
        if slow_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"slow_dtype must be torch.float32 or torch.bfloat16, not {slow_dtype!r}"
            )
        self.optimizer = optimizer
        self.k, self.alpha, self.pullback, self.slow_dtype = k, alpha, pullback, slow_dtype
        self.steps = 0
        self.average: Callable[[list[Tensor]], None] | None = None
        self._slow: dict[Tensor, Tensor] = {}
        self._momenta: dict[Tensor, Tensor] = {}
        self.defaults = optimizer.defaults
        Optimizer.__setstate__(self, {})  # hooks; groups and state are the inner optimizer's
        self._remember_new_parameters()

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        """The groups of the inner optimizer."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the inner optimizer."""
        return self.optimizer.state

    def add_param_group(self, param_group: Group) -> None:
        """Add a group to the inner optimizer; the slow weights begin as what its parameters are."""
        self.optimizer.add_param_group(param_group)
        self._remember_new_parameters()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in PyTorch."""
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """A step of the inner optimizer, and every ``k`` steps a synchronisation.

        Args:
            closure: handed to the inner optimizer; what it returns is returned.
        """
        if (self.steps + 1) % self.k:
            loss = self.optimizer.step(closure)  # type: ignore[arg-type]
            self.steps += 1
            return loss
        self._remember_new_parameters()
        if isinstance(self.optimizer, StoredOptimizer) and self.average is None:
            with self.optimizer.synchronising(self._slow, self.alpha):
                loss = self.optimizer.step(closure)
            self.steps += 1
            self._synchronise({p: slow for p, slow in self._slow.items() if p.grad is None})
        else:
            loss = self.optimizer.step(closure)  # type: ignore[arg-type]
            self.steps += 1
            if self.average is not None:
                self.average(list(self._slow))
            self._synchronise(self._slow)
        self._pull_momenta_back()
        return loss

    def restart(self, parameters: Iterable[Tensor]) -> None:
        """The slow weights of ``parameters`` become what these are now, and their momenta are forgotten.

        Those of parameters that require no gradient are exact whatever ``slow_dtype``, so that no
        synchronisation moves what is frozen.
        """
        for parameter in parameters:
            dtype = self.slow_dtype if parameter.requires_grad else torch.float32
            self._slow[parameter] = parameter.detach().to(dtype, copy=True)
            self._momenta.pop(parameter, None)

    def synchronise(self, parameters: Iterable[Tensor]) -> None:
        """Let slow and fast weights of ``parameters`` meet out of turn, as they do every ``k`` steps."""
        self._synchronise({p: self._slow[p] for p in parameters if p in self._slow})

    @torch.no_grad()
    def _synchronise(self, slow_weights: dict[Tensor, Tensor]) -> None:
        for place, (parameter, slow) in enumerate(slow_weights.items()):
            if not parameter.requires_grad:
                continue
            moved = slow.float().lerp_(parameter.detach(), self.alpha)
            stored_slow(slow, mixed(self.steps, place)).write(moved)
            parameter.copy_(moved)

    @torch.no_grad()
    def _pull_momenta_back(self) -> None:
        if self.pullback == "none":
            return
        for parameter in self._slow:
            for name in _MOMENTA:
                momentum = self.state[parameter].get(name)
                if momentum is None:
                    continue
                if self.pullback == "reset":
                    momentum.zero_()
                else:
                    before = self._momenta.get(parameter)
                    if before is not None:
                        momentum.copy_(before.float().lerp_(momentum.float(), self.alpha))
                    self._momenta[parameter] = momentum.clone()

    @contextmanager
    @torch.no_grad()
    def slow_weights(self) -> Iterator[None]:
        """Within the block the parameters are the slow weights, for evaluation; then what they were.

        Raises:
            OptcpuError: a step is made within the block.
        """
        self._remember_new_parameters()
        fast = {p: _halves(p) for p in self._slow if p.requires_grad}
        for parameter in fast:
            parameter.copy_(self._slow[parameter].float())
        steps = self.steps
        try:
            yield
        finally:
            for parameter, halves in fast.items():
                for half, kept in zip(_halves(parameter, copy=False), halves, strict=True):
                    half.copy_(kept)
        if self.steps != steps:
            raise OptcpuError(
                "a step was made within slow_weights() and is undone now: leave the block before training"
            )

    def state_dict(self) -> dict[str, Any]:
        """That of the inner optimizer with an entry ``"lookahead"``, which PyTorch passes over.

        It holds the options, how many steps were made, and the slow weights (and momenta for
        ``pullback="pullback"``) in FP32 by (group, index in the group).
        """
        self._remember_new_parameters()
        own = {
            "k": self.k,
            "alpha": self.alpha,
            "pullback": self.pullback,
            "steps": self.steps,
            "slow": {place: self._slow[p].float().clone() for place, p in self._places()},
            "momenta": {
                place: self._momenta[p].float().clone()
                for place, p in self._places()
                if p in self._momenta
            },
        }
        return {**self.optimizer.state_dict(), _OWN_STATE: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or a checkpoint of the inner optimizer alone.

        The latter leaves the slow weights what they are.

        Raises:
            ValueError: the slow weights do not fit the parameters.
        """
        own = state_dict.get(_OWN_STATE)
        self._remember_new_parameters()
        if own is not None:
            self._check_fit(own["slow"])
        self.optimizer.load_state_dict(
            {key: entry for key, entry in state_dict.items() if key != _OWN_STATE}
        )
        if own is None:
            return
        self.k, self.alpha, self.pullback = own["k"], own["alpha"], own["pullback"]
        self.steps = own["steps"]
        self._momenta = {}
        for place, parameter in self._places():
            self._slow[parameter].copy_(own["slow"][place])
            if place in own["momenta"]:
                self._momenta[parameter] = own["momenta"][place].clone()

    def _check_fit(self, slow: dict[tuple[int, int], Tensor]) -> None:
        expected = {place: tuple(p.shape) for place, p in self._places()}
        given = {place: tuple(tensor.shape) for place, tensor in slow.items()}
        if given != expected:
            wrong = next(
                place
                for place in sorted({*given, *expected})
                if given.get(place) != expected.get(place)
            )
            raise ValueError(
                f"the checkpoint's slow weights for parameter {wrong[1]} of group {wrong[0]} have shape "
                f"{given.get(wrong)}, but the parameter has {expected.get(wrong)}: "
                "load it into the model it was made for"
            )

    def _places(self) -> Iterator[tuple[tuple[int, int], Tensor]]:
        for number, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                yield (number, index), parameter

    def _remember_new_parameters(self) -> None:
        """Those that the inner optimizer was given by itself begin where they are now."""
        self.restart([p for _, p in self._places() if p not in self._slow])

    def __getstate__(self) -> dict[str, Any]:
        names = (
            "optimizer",
            "k",
            "alpha",
            "pullback",
            "slow_dtype",
            "steps",
            "defaults",
            "average",
        )
        return {name: getattr(self, name) for name in (*names, "_slow", "_momenta")}

    def __repr__(self) -> str:
        return f"Lookahead(k={self.k}, alpha={self.alpha}, {self.optimizer!r})"


def _halves(parameter: Tensor, *, copy: bool = True) -> list[Tensor]:
    """What a parameter is stored as."""
    if isinstance(parameter, StoredWeight):
        parts = [part for part in (parameter.high, parameter.low) if part is not None]
    else:
        parts = [parameter.detach()]
    return [part.clone() for part in parts] if copy else parts
