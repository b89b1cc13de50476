"""What all optimizers here share: how state is stored, saved and loaded, and one step over all groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from optcpu.errors import OptcpuError
from optcpu.memory_order import in_one_order
from optcpu.optim.formats import Format, Stored, mixed
from optcpu.optim.in_backward import BackwardHooks
from optcpu.optim.rules import Constants, Slot
from optcpu.optim.weights import StoredWeight, count_writes

Group = dict[str, Any]

MakeConstants = Callable[..., Constants]

_FLOAT = Format.FLOAT
_OWN_STATE = "optcpu"

# Moments and slow weights must not be rounded by the same random bits as the weight.
_MOMENT_BITS, _SLOW_BITS = 0x9E3779B9, 0x3C6EF372


class Place(NamedTuple):
    """A parameter among all; ``number``, counted through the groups, is part of its seed."""

    number: int
    group: Group
    parameter: Tensor


class StoredOptimizer(Optimizer, ABC):
    """An optimizer whose state may be BF16 and whose update is one pass over memory.

    A class puts it in front of the optimizer of PyTorch that it stands for, whose options, groups and
    state it keeps: the same names, and FP32 values in ``state_dict()``, so that checkpoints go both
    ways. ``state_dict()["optcpu"]`` holds, in addition, where the random numbers stand.

    Attributes:
        state_dtype: of the moments: ``torch.bfloat16`` or ``torch.float32``.
        seed: where the random bits of stochastic rounding begin.
        steps: how many steps have drawn random bits from there.
    """

    # Which moments there are, by their names in ``state``, with the format that each has in BF16.
    moments: ClassVar[dict[str, Format]] = {}

    takes_sparse_gradients: ClassVar[bool] = False

    state_dtype: torch.dtype
    seed: int
    steps: int

    # Lookahead's slow weights and alpha, in a step that synchronises them.
    _slow_weights: Mapping[Tensor, Tensor] | None = None
    _slow_step: float = 0.0

    # What gradients are multiplied by, besides what an option of the optimizer's says.
    _gradient_scale: float = 1.0

    # Of the step that is made.
    _constants: dict[tuple[Any, ...], Constants]

    _in_backward: BackwardHooks | None = None

    def keep_state_in(self, state_dtype: torch.dtype, seed: int) -> None:
        """Store the moments as ``state_dtype`` from now on, those that are there included.

        Raises:
            ValueError: the dtype is neither BF16 nor FP32, or a parameter is none that can be updated.
        """
        if state_dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(
                f"state_dtype must be torch.bfloat16 or torch.float32, not {state_dtype!r}"
            )
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"seed must be an integer, not {seed!r}")
        for group in self.param_groups:
            _check_parameters(group["params"])
        self.state_dtype, self.seed, self.steps = state_dtype, seed, 0
        self._count_steps_in_integers()
        self._convert_state()

    def add_param_group(self, param_group: Group) -> None:
        """As in PyTorch.

        Raises:
            ValueError: a parameter is not FP32 or not on the CPU.
        """
        super().add_param_group(param_group)
        try:
            _check_parameters(self.param_groups[-1]["params"])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all parameters that have a gradient.

        Args:
            closure: computes the loss and its gradients anew; what it returns is returned.

        Raises:
            OptcpuError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update([place for place in self._places() if place.parameter.grad is not None])
        self.steps += 1
        if self._in_backward is not None:
            self._in_backward.begin_step()
        return loss

    def update_in_backward(self, accumulation_steps: int = 1) -> None:
        """Update each parameter during ``backward()``, and free its gradient, once that is complete.

        The training loop stays what it is, ``step()`` included: it ends the step, and updates what
        has a gradient still. The result is the same, bit for bit (but for the order in which parts of a
        gradient are added up that come from several compiled graphs), and gradients are never there all at
        once. A model of :func:`optcpu.optimize` is compiled anew for it, so that its backward graph hands
        each gradient over as soon as it is complete (not so with PyTorch 2.8, where graphs hand them
        over together, at their end). Whatever looks at gradients between ``backward()`` and ``step()``
        (clipping, logging, unscaling) finds none, and ``torch.autograd.grad`` of such a model's
        parameters is refused.

        Args:
            accumulation_steps: backward passes that belong to one step.

        Raises:
            ValueError: ``accumulation_steps`` is no integer of at least 1.
            OptcpuError: the optimizer needs all gradients at once.
        """
        if (
            not isinstance(accumulation_steps, int)
            or isinstance(accumulation_steps, bool)
            or accumulation_steps < 1
        ):
            raise ValueError(
                f"accumulation_steps must be an integer of at least 1, not {accumulation_steps!r}"
            )
        self.update_in_step()
        # Groups are looked up when they are needed, since load_state_dict puts others in their place.
        group_of = [n for n, group in enumerate(self.param_groups) for _ in group["params"]]
        parameters = [place.parameter for place in self._places()]

        def update(number: int) -> None:
            group = self.param_groups[group_of[number]]
            self._update([Place(number, group, parameters[number])])

        self._in_backward = BackwardHooks(parameters, update, accumulation_steps)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in PyTorch; an accumulation of gradients begins anew."""
        super().zero_grad(set_to_none)
        if self._in_backward is not None:
            self._in_backward.begin_step()

    def update_in_step(self) -> None:
        """Undo :meth:`update_in_backward`."""
        if self._in_backward is not None:
            self._in_backward.remove()
            self._in_backward = None

    def _places(self) -> Iterator[Place]:
        """All parameters, each with its group."""
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                yield Place(number, group, parameter)
                number += 1

    @torch.no_grad()
    def _update(self, places: list[Place]) -> None:
        """Update the parameters at ``places`` for the step that comes after ``steps``."""
        if not self.takes_sparse_gradients:
            _refuse_sparse(place.parameter for place in places)
        self._constants = {}
        seed = mixed(self.seed, self.steps)
        self.update([self.slot(p.group, p.parameter, mixed(seed + p.number)) for p in places])
        count_writes(place.parameter for place in places)

    @abstractmethod
    def update(self, slots: list[Slot]) -> None:
        """Run the rule on the parameters in ``slots``."""

    @abstractmethod
    def slot(self, group: Group, parameter: Tensor, seed: int) -> Slot:
        """What the rule needs for ``parameter`` in the step that begins.

        Args:
            group: the parameter's.
            parameter: one that has a gradient.
            seed: of the random bits for this parameter in this step.
        """

    def new_slot(self, constants: Constants, parameter: Tensor, seed: int) -> Slot:
        """A slot with the tensors that there are in every step and rule."""
        if isinstance(parameter, StoredWeight):
            weight = parameter.stored(seed)
        else:
            weight = Stored(_FLOAT, parameter, None, seed)
        slot = Slot(constants, weight, _gradient(parameter, weight.data))
        if self._slow_weights is not None:
            slot.slow = stored_slow(self._slow_weights[parameter], seed ^ _SLOW_BITS)
        return slot

    def shared(self, make: MakeConstants, group: Group, *arguments: Any) -> Constants:
        """``make(group, *arguments)``, made once in a step for all parameters that ask for the same."""
        key = (id(group), *arguments)
        constants = self._constants.get(key)
        if constants is None:
            constants = self._constants[key] = make(group, *arguments)
            constants.gradient_scale = self._gradient_scale * (-1.0 if group["maximize"] else 1.0)
            constants.slow_step = self._slow_step
        return constants

    def moment(self, slot: Slot, state: dict[str, Any], name: str) -> Stored:
        """The moment ``name`` in the ``state`` of a parameter, zero at first."""
        like = slot.weight.data
        data: Tensor | None = state.get(name)
        if data is None:
            data = state[name] = torch.zeros_like(like, dtype=self.state_dtype)
        elif data.stride() != like.stride() or data.numel() != like.numel():
            _check_shape(name, data, like)
            data = state[name] = torch.empty_like(like, dtype=data.dtype).copy_(data)
        if data.dtype == torch.float32:
            return Stored(_FLOAT, data)
        return Stored(self.moments[name], data, None, slot.weight.seed ^ _MOMENT_BITS)

    @contextmanager
    def synchronising(self, slow: Mapping[Tensor, Tensor], alpha: float) -> Iterator[None]:
        """Within the block a step ends as Lookahead's synchronisation does.

        ``slow`` moves towards the new weights by ``alpha``, and the weights become ``slow``, for the
        parameters that are updated.
        """
        self._slow_weights, self._slow_step = slow, alpha
        try:
            yield
        finally:
            self._slow_weights = None

    @contextmanager
    def scaling_gradients(self, scale: float) -> Iterator[None]:
        """Within the block a step takes each gradient times ``scale``, which costs no pass over memory.

        The gradients stay what they are.
        """
        self._gradient_scale = scale
        try:
            yield
        finally:
            del self._gradient_scale

    def _count_steps_in_integers(self) -> None:
        """PyTorch's optimizers count in tensors, which takes longer than a small update."""
        for state in self.state.values():
            if "step" in state:
                state["step"] = int(state["step"])

    def _convert_state(self) -> None:
        for state in self.state.values():
            for name in self.moments:
                if isinstance(state.get(name), Tensor):
                    state[name] = state[name].to(self.state_dtype)

    def state_dict(self) -> dict[str, Any]:
        """As in PyTorch, with FP32 moments and an entry ``"optcpu"`` that PyTorch passes over."""
        with self.register_state_dict_post_hook(_export, prepend=True):  # in front of the user's
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in PyTorch; takes the checkpoints of the PyTorch optimizer, too."""
        with self.register_load_state_dict_pre_hook(_take_own_state):  # behind the user's
            super().load_state_dict(state_dict)
        self._convert_state()
        if self._in_backward is not None:
            self._in_backward.begin_step()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._count_steps_in_integers()

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("state_dtype", "seed", "steps")}
        return {**super().__getstate__(), **own}


def stored_slow(slow: Tensor, seed: int) -> Stored:
    """Slow weights as update rules take them."""
    format = Format.FLOAT if slow.dtype == torch.float32 else Format.STOCHASTIC
    return Stored(format, slow, seed=seed)


def fits(parameter: Tensor) -> bool:
    """Whether an optimizer here can update ``parameter``."""
    return parameter.device.type == "cpu" and parameter.dtype == torch.float32


def _check_parameters(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        if not fits(parameter):
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype} on "
                f"{parameter.device}; this optimizer updates FP32 parameters on the CPU: call "
                "model.float().cpu() first"
            )


def count_step(state: dict[str, Any]) -> int:
    """Count a step in the ``state`` of a parameter; the first is 1."""
    step: int = state.get("step", 0) + 1
    state["step"] = step
    return step


def _refuse_sparse(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise OptcpuError(
                f"the gradient of a parameter of shape {tuple(parameter.shape)} is "
                f"{parameter.grad.layout}, and only dense gradients can be used: make its layer with "
                "sparse=False, or give its parameters to torch.optim.SparseAdam"
            )


def _check_shape(name: str, data: Tensor, parameter: Tensor) -> None:
    if data.shape != parameter.shape:
        raise ValueError(
            f"the state {name!r} of a parameter of shape {tuple(parameter.shape)} has shape "
            f"{tuple(data.shape)}: load a checkpoint of this model, or, if the parameter was resized, "
            "delete optimizer.state[parameter]"
        )


def _gradient(parameter: Tensor, like: Tensor) -> Stored:
    """The gradient of ``parameter``, in the memory order of ``like``."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout != torch.strided:
        gradient = gradient.to_dense()
    if not in_one_order(gradient, like):
        gradient = torch.empty_like(like, dtype=gradient.dtype).copy_(gradient)
    if gradient.dtype == torch.float32:
        return Stored(_FLOAT, gradient)
    if gradient.dtype == torch.bfloat16:
        return Stored(Format.NEAREST, gradient)
    return Stored(_FLOAT, gradient.float())


def _export(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A ``state_dict()`` as PyTorch's optimizers give it, with where the random numbers stand."""
    assert isinstance(optimizer, StoredOptimizer)
    state = {
        key: {name: _exported(entry) for name, entry in entries.items()}
        for key, entries in state_dict["state"].items()
    }
    return {
        **state_dict,
        "state": state,
        _OWN_STATE: {"seed": optimizer.seed, "steps": optimizer.steps},
    }


def _take_own_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    own = state_dict.get(_OWN_STATE, {})
    for name in ("seed", "steps"):
        setattr(optimizer, name, own.get(name, getattr(optimizer, name)))


def _exported(entry: Any) -> Any:
    """An entry of ``state`` as PyTorch's optimizers hold it, who count steps in tensors."""
    if isinstance(entry, int):
        return torch.tensor(float(entry))
    return entry.float() if isinstance(entry, Tensor) and entry.dtype == torch.bfloat16 else entry
