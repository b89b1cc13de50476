"""Weights of a module: stored for training, and plain again; plain to whoever asks for its state."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor, nn

from optcpu.optim.formats import Format
from optcpu.optim.weights import StoredWeight, become, is_in_a_graph, plain_copy


def store_weights(
    module: nn.Module, parameters: Iterable[nn.Parameter], format: Format
) -> list[str]:
    """Store weights of ``module`` in ``format``, in place.

    Weights of two dimensions or more change; the others are small and stay plain, as do those that a
    layer changes itself (embeddings with ``max_norm``). The ``Parameter`` objects remain the same, so that
    whoever holds them, an optimizer say, sees the change. ``state_dict()`` of the module and of those
    within it gives plain FP32 tensors.

    Args:
        module: whose parameters may change.
        parameters: those that somebody updates who knows how, and that may change therefore.
        format: ``SPLIT`` or ``STOCHASTIC``.

    Returns:
        The names of weights that had to stay plain, since something else refers to their memory.
    """
    known = {id(parameter) for parameter in parameters} - _written_in_forward(module)
    tied = _in_one_place(module.parameters())
    left: list[str] = []
    done: set[int] = set()
    for prefix, owner in module.named_modules():
        for name, parameter in _own_parameters(owner):
            if id(parameter) not in known or parameter.dim() < 2 or not parameter.numel():
                continue
            if id(parameter) not in done and not isinstance(parameter, StoredWeight):
                done.add(id(parameter))
                if id(parameter) in tied or is_in_a_graph(parameter):
                    left.append(f"{prefix}.{name}".lstrip("."))
                else:
                    stored = StoredWeight.of(parameter.detach(), format)
                    become(parameter, nn.Parameter(stored, parameter.requires_grad))
            if isinstance(parameter, StoredWeight):
                _register_anew(owner, name)
                if _export not in owner._state_dict_hooks.values():
                    owner._register_state_dict_hook(_export)
    return left


def restore_weights(module: nn.Module) -> None:
    """Undo :func:`store_weights`: the parameters are plain FP32 again, bit for bit."""
    for owner in module.modules():
        for _, parameter in _own_parameters(owner):
            if isinstance(parameter, StoredWeight):
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.float()
                become(parameter, plain_copy(parameter))
        for key, hook in list(owner._state_dict_hooks.items()):
            if hook is _export:
                del owner._state_dict_hooks[key]
                for name, _ in _own_parameters(owner):
                    _register_anew(owner, name)


def _own_parameters(owner: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Those of the module itself, tied ones included."""
    return list(owner.named_parameters(recurse=False, remove_duplicate=False))


def _written_in_forward(module: nn.Module) -> set[int]:
    """The ids of weights that a layer changes when it is called."""
    layers = (layer for layer in module.modules() if getattr(layer, "max_norm", None) is not None)
    return {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}


def _in_one_place(parameters: Iterable[Tensor]) -> set[int]:
    """The ids of parameters that begin where another one does: ``a.data = b.data`` ties them so."""
    by_address: dict[int, set[int]] = {}
    for parameter in parameters:
        if not isinstance(parameter, StoredWeight) and parameter.numel():
            by_address.setdefault(parameter.data_ptr(), set()).add(id(parameter))
    return set().union(*(ids for ids in by_address.values() if len(ids) > 1))


def _register_anew(owner: nn.Module, name: str) -> None:
    """Let compiled code see that a parameter is of another kind.

    Where a module's dictionary is the one that it knows, Dynamo of PyTorch 2.8 does not look at what
    is in there, and would hand the graph a tensor that has no memory of its own.
    """
    parameter, owner._parameters[name] = owner._parameters[name], None
    owner._parameters[name] = parameter


class _Export:
    """A hook that puts plain tensors for stored weights into a ``state_dict()``.

    A weight that several layers share is one tensor there, as in that of a plain model.
    """

    def __init__(self) -> None:
        # By the id of a state_dict that is alive: its tensors, by the half, and its version, of each.
        self._made: dict[int, WeakValueDictionary[tuple[int, int], Tensor]] = {}

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        for name, weight in module._parameters.items():
            entry = state_dict.get(prefix + name)
            if isinstance(entry, StoredWeight) and not isinstance(entry, nn.Parameter):
                assert isinstance(weight, StoredWeight)
                state_dict[prefix + name] = self._once(weight, state_dict)

    def _once(self, weight: StoredWeight, state_dict: dict[str, Any]) -> Tensor:
        """The numbers of ``weight``: the tensor that ``state_dict`` has of them already, or a new one."""
        if not isinstance(state_dict, OrderedDict):
            return weight.full()  # a dictionary of the user's, whose end nobody tells
        if id(state_dict) not in self._made:
            self._made[id(state_dict)] = WeakValueDictionary()
            weakref.finalize(state_dict, self._made.pop, id(state_dict), None)
        made = self._made[id(state_dict)]
        numbers = weight.high.data_ptr(), weight.high._version
        plain = made.get(numbers)
        if plain is None:
            plain = made[numbers] = weight.full()
        return plain

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has plain weights: there a function of Python's that does nothing stands instead."""
        return getattr, (nullcontext(), "__exit__")


_export = _Export()
