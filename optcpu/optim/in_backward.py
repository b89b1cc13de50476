"""Updates during the backward pass: a gradient is used and freed as soon as it is complete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from optcpu.errors import OptcpuError
from optcpu.memory_order import in_one_order, is_dense
from optcpu.optim.accumulation import add
from optcpu.optim.weights import StoredWeight

_OUTSIDE = -1  # of any backward pass, as PyTorch numbers them

_changes = 0


def changes() -> int:
    """How often parameters began to be updated in the backward pass in this process, or ceased to be."""
    return _changes


class BackwardHooks:
    """Calls an update for each parameter when its gradient is complete, and frees the gradient.

    Args:
        parameters: whom to watch.
        update: given the place of a parameter among ``parameters``, updates it.
        accumulation_steps: how many backward passes make a gradient complete.

    Attributes:
        accumulation_steps: as given.
    """

    def __init__(
        self, parameters: list[Tensor], update: Callable[[int], None], accumulation_steps: int
    ) -> None:
        self.accumulation_steps = accumulation_steps
        self._passes = [0] * len(parameters)
        self._last_pass = [_OUTSIDE] * len(parameters)
        self._update = update
        self._handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(_Hook(self, place))
            for place, parameter in enumerate(parameters)
            if parameter.requires_grad
        ]
        _count_change()

    def gradient_came(self, place: int, parameter: Tensor) -> None:
        """Count a backward pass for ``parameter``, and update it if its gradient is complete."""
        if parameter.grad is None:
            return  # autograd calls hooks where nothing came, too
        this_pass = torch._C._current_graph_task_id()  # type: ignore[attr-defined]
        again = this_pass == self._last_pass[place] != _OUTSIDE
        is_updated = self._passes[place] == self.accumulation_steps
        if again and not is_updated:
            return  # another part of the gradient of a pass that is counted
        if again:
            raise OptcpuError(
                f"a parameter of shape {tuple(parameter.shape)} was updated during this backward pass, "
                "and then more of its gradient came: it is used outside of the compiled model as well. "
                "Call optimizer.update_in_step() in place of update_in_backward()"
            )
        if is_updated:
            raise OptcpuError(
                f"there were more than accumulation_steps = {self.accumulation_steps} backward "
                "passes since the last optimizer.step(): call it after each "
                f"{self.accumulation_steps}, though parameters are updated before"
            )
        self._last_pass[place] = this_pass
        self._passes[place] += 1
        if self._passes[place] == self.accumulation_steps:
            self._update(place)
            parameter.grad = None

    def begin_step(self, done: int = 0) -> None:
        """Expect as many backward passes anew, of which ``done`` have been made."""
        self._passes = [done] * len(self._passes)

    def remove(self) -> None:
        """Watch nobody any more."""
        for handle in self._handles:
            handle.remove()
        _count_change()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of an optimizer has other parameters: it updates them in ``step()``."""


def _count_change() -> None:
    global _changes
    _changes += 1


class _Hook:
    """What PyTorch calls for the parameter at ``place`` among those that ``hooks`` watch."""

    def __init__(self, hooks: BackwardHooks, place: int) -> None:
        self._hooks, self._place = hooks, place

    def __call__(self, parameter: Tensor) -> None:
        self._hooks.gradient_came(self._place, parameter)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        """A copy of a parameter is watched by nobody: what it is of does not come here either."""
        return self


def is_updated_in_backward(parameter: Tensor) -> bool:
    """Whether an optimizer updates ``parameter`` as soon as its gradient is there."""
    return bool(_hooks_of(parameter))


# In how many graphs, whose backward is to come, each parameter is, by its id.
_TO_COME: Counter[int] = Counter()


class ExpectedGradients:
    """The gradients that the backward of one compiled graph will hand over, one by one.

    Each is added to its parameter's, as autograd does; the parameter is updated then and its gradient
    freed. Where several graphs have parts of a gradient, the last one completes it. Other hooks behind a
    gradient are autograd's to call, which it does when the graph has ended.

    Args:
        parameters: by the numbers that they have in the graph.
        kept: those of the numbers whose parameters the graph may read until its end; they are updated
            behind it.
    """

    def __init__(self, parameters: Mapping[int, Tensor], kept: Collection[int] = ()) -> None:
        self._parameters, self._kept = parameters, kept
        self._to_come = set(parameters)
        _TO_COME.update(map(id, parameters.values()))

    @classmethod
    def of(cls, inputs: Sequence[Any], leaves: Sequence[int]) -> ExpectedGradients:
        """Those of ``leaves``, the numbers of parameters among the ``inputs`` of a graph.

        One whose memory is that of another input, too, is not updated before the graph has ended.
        """
        memory = [_addresses(given) for given in inputs]
        times = Counter(address for addresses in memory for address in addresses)
        kept = {place for place in leaves if any(times[address] > 1 for address in memory[place])}
        return cls({place: inputs[place] for place in leaves}, kept)

    def __call__(self, number: int, gradient: Tensor) -> None:
        """Take a gradient; its memory is used again once this returns."""
        parameter = self._parameters[number]
        self._came(number)
        if not _is_wanted(parameter):
            return
        if parameter._backward_hooks:
            raise OptcpuError(
                f"a hook was registered on a parameter of shape {tuple(parameter.shape)} between forward "
                "and backward, which hands its gradient over: register hooks before the forward pass"
            )
        before = parameter.grad
        if before is None:
            parameter.grad = _in_dtype_of_gradients(parameter, gradient)
        else:
            add(before, gradient)
        if not _TO_COME[id(parameter)] and number not in self._kept:
            for hook in _hooks_of(parameter):
                hook(parameter)
        if before is None and parameter.grad is not None:
            parameter.grad = _copy(parameter.grad, parameter)

    def _came(self, number: int) -> None:
        if number in self._to_come:  # not so in a second backward of the same graph
            self._to_come.remove(number)
            key = id(self._parameters[number])
            _TO_COME[key] -= 1
            if not _TO_COME[key]:
                del _TO_COME[key]

    def __del__(self) -> None:
        for number in list(self._to_come):
            self._came(number)


def _addresses(given: Any) -> set[int]:
    """Where the memory of an input begins."""
    if isinstance(given, StoredWeight):
        halves = [half for half in (given.high, given.low) if half is not None]
        return {half.untyped_storage().data_ptr() for half in halves}
    if isinstance(given, Tensor) and given.layout == torch.strided:
        return {given.untyped_storage().data_ptr()}
    return set()


def _hooks_of(parameter: Tensor) -> list[_Hook]:
    hooks = parameter._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    return [hook for hook in (hooks or {}).values() if isinstance(hook, _Hook)]


def _is_wanted(parameter: Tensor) -> bool:
    """Whether the backward pass that runs is to give ``parameter`` a gradient.

    Raises:
        OptcpuError: it is to return the gradient in place of keeping it.
    """
    node = get_gradient_edge(parameter).node
    try:
        wanted: bool = torch._C._will_engine_execute_node(node)  # type: ignore[attr-defined]
    except RuntimeError as error:
        raise OptcpuError(
            "torch.autograd.grad() of a compiled model's parameters cannot return gradients that "
            "are used during the backward pass: call optimizer.update_in_step() before the model"
        ) from error
    return wanted


def _in_dtype_of_gradients(parameter: Tensor, gradient: Tensor) -> Tensor:
    dtype = getattr(parameter, "grad_dtype", parameter.dtype)
    return gradient if dtype is None else gradient.to(dtype)


def _copy(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in memory of its own, in the order of the parameter's."""
    if not is_dense(parameter) or in_one_order(gradient, parameter):
        return gradient.clone()
    size, strides = parameter.size(), parameter.stride()
    return torch.empty_strided(size, strides, dtype=gradient.dtype).copy_(gradient)
