"""What a model knows beyond its ``state_dict()``, without which it would not go on as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from optcpu.runtime.data.randomness import (
    generator_state,
    generators_in,
    is_plain,
    set_generator_state,
)

_IN_STATE_DICT = ("_parameters", "_buffers", "_modules")


class Unsaved:
    """Random generators, buffers that are not persistent, and which parameters are trained.

    Of the last two only what has changed since this was made is given: masks and tables, which modules make
    anew, are not, nor are parameters that the user has frozen from the start.

    Args:
        owners: modules, and functions or objects that may have generators.
        others: likewise, by name; only their generators count.
    """

    def __init__(self, *owners: Any, **others: Any) -> None:
        self._modules = {
            f"{number}.{name}": module
            for number, owner in enumerate(owners)
            if isinstance(owner, nn.Module)
            for name, module in owner.named_modules()
        }
        parts = {
            f"{path}.{name}": value
            for path, module in self._modules.items()
            for name, value in vars(module).items()
            if name not in _IN_STATE_DICT and not is_plain(value)
        }
        others |= {str(n): one for n, one in enumerate(owners) if not isinstance(one, nn.Module)}
        self._generators = {p: one for p, one in parts.items() if _is_generator(one)}
        for group in (parts, *({path: one} for path, one in others.items())):
            self._generators |= generators_in(group)
        self._trained = {path: p.requires_grad for path, p in self._parameters()}
        self._first: dict[str, Tensor | None] = {}
        copies: dict[int, Tensor] = {}  # modules may share a large mask
        for path, _, _, buffer in self._buffers():
            if buffer is not None and id(buffer) not in copies:
                copies[id(buffer)] = buffer.detach().clone()
            self._first[path] = None if buffer is None else copies[id(buffer)]

    def generators(self) -> dict[str, Any]:
        """The states of the generators, by where they are."""
        return {path: generator_state(one) for path, one in self._generators.items()}

    def set_generators(self, states: dict[str, Any]) -> None:
        """Put back what :meth:`generators` gave, as far as the generators are there."""
        for path in states.keys() & self._generators.keys():
            set_generator_state(self._generators[path], states[path])

    def trained(self) -> dict[str, bool]:
        """Whether parameters are trained of which that has changed, by where they are."""
        return {
            path: p.requires_grad
            for path, p in self._parameters()
            if p.requires_grad != self._trained.get(path, p.requires_grad)
        }

    def set_trained(self, saved: dict[str, bool]) -> None:
        """Put back what :meth:`trained` gave; those that had not changed become what they were at first."""
        for path, parameter in self._parameters():
            parameter.requires_grad_(
                saved.get(path, self._trained.get(path, parameter.requires_grad))
            )

    def buffers(self) -> dict[str, Tensor]:
        """The buffers that have changed, by where they are; not copies."""
        return {
            path: buffer
            for path, _, _, buffer in self._buffers()
            if buffer is not None and not self._is_as_at_first(path, buffer)
        }

    @torch.no_grad()
    def set_buffers(self, saved: dict[str, Tensor]) -> None:
        """Put back what :meth:`buffers` gave; those that had not changed become what they were."""
        for path, module, name, buffer in self._buffers():
            if path in saved:
                _set(module, name, buffer, saved[path])
            elif path in self._first and not self._is_as_at_first(path, buffer):
                _set(module, name, buffer, self._first[path])
        for path in saved.keys() - {path for path, *_ in self._buffers()}:
            owner, _, name = path.rpartition(".")
            holder = self._modules.get(owner)
            if holder is not None and not hasattr(holder, name):  # it is made in forward
                holder.register_buffer(name, saved[path].clone(), persistent=False)

    def _is_as_at_first(self, path: str, buffer: Tensor | None) -> bool:
        """By its numbers: what is written through ``.data`` is not counted as a change of the tensor."""
        if path not in self._first:
            return False
        first = self._first[path]
        if buffer is None or first is None:
            return buffer is first
        return _alike(buffer, first) and _equal(buffer, first)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for path, module in self._modules.items():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield f"{path}.{name}", parameter

    def _buffers(self) -> Iterator[tuple[str, nn.Module, str, Tensor | None]]:
        for path, module in self._modules.items():
            for name in sorted(module._non_persistent_buffers_set):
                if name in module._buffers:
                    yield f"{path}.{name}", module, name, module._buffers[name]


def _is_generator(value: object) -> bool:
    try:
        return generator_state(value) is not None
    except Exception:  # an odd object, which no generator is
        return False


def _set(module: nn.Module, name: str, buffer: Tensor | None, value: Tensor | None) -> None:
    if buffer is None or value is None or not _alike(buffer, value) or buffer.is_inference():
        setattr(module, name, None if value is None else value.clone())
    else:
        buffer.copy_(value)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether the numbers are the same; those of sparse and meta tensors are not looked at."""
    try:
        return torch.equal(one, other)
    except RuntimeError:
        return True
