"""What a model knows beyond its ``state_dict()``, without which it would not go on as it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optcpu.runtime.data.randomness import generator_state, set_generator_state


class Unsaved:
    """Generators that are attributes of modules, and buffers that are not persistent.

    Of the buffers only those are given that have changed since this was made: masks and tables, which
    modules make anew, are not.

    Args:
        owners: modules; anything else is passed over.
    """

    def __init__(self, *owners: Any) -> None:
        self._modules = {
            f"{number}.{name}": module
            for number, owner in enumerate(owners)
            if isinstance(owner, nn.Module)
            for name, module in owner.named_modules()
        }
        self._generators = {
            f"{path}.{name}": value
            for path, module in self._modules.items()
            for name, value in vars(module).items()
            if generator_state(value) is not None
        }
        self._first = {path: _First.of(buffer) for path, _, _, buffer in self._buffers()}

    def generators(self) -> dict[str, Any]:
        """The states of the generators, by where they are."""
        return {path: generator_state(one) for path, one in self._generators.items()}

    def set_generators(self, states: dict[str, Any]) -> None:
        """Put back what :meth:`generators` gave, as far as the generators are there."""
        for path in states.keys() & self._generators.keys():
            set_generator_state(self._generators[path], states[path])

    def buffers(self) -> dict[str, Tensor]:
        """The buffers that have changed, by where they are; not copies."""
        return {
            path: buffer
            for path, _, _, buffer in self._buffers()
            if buffer is not None and not self._is_first(path, buffer)
        }

    def _is_first(self, path: str, buffer: Tensor | None) -> bool:
        return path in self._first and self._first[path].is_still(buffer)

    @torch.no_grad()
    def set_buffers(self, saved: dict[str, Tensor]) -> None:
        """Put back what :meth:`buffers` gave; those that had not changed become what they were."""
        for path, module, name, buffer in self._buffers():
            if path not in saved and (path not in self._first or self._is_first(path, buffer)):
                continue
            value = saved[path] if path in saved else self._first[path].copy
            if value is not None and buffer is not None and buffer.shape == value.shape:
                buffer.copy_(value)
            else:
                setattr(module, name, None if value is None else value.clone())

    def _buffers(self) -> Iterator[tuple[str, nn.Module, str, Tensor | None]]:
        for path, module in self._modules.items():
            for name in sorted(module._non_persistent_buffers_set):
                if name in module._buffers:
                    yield f"{path}.{name}", module, name, module._buffers[name]


@dataclass(frozen=True)
class _First:
    """A buffer as it was at first.

    Attributes:
        buffer: the tensor itself, held so that no other one can be taken for it.
        version: how often it had been written to.
        copy: of its numbers.
    """

    buffer: Tensor | None
    version: int
    copy: Tensor | None

    @classmethod
    def of(cls, buffer: Tensor | None) -> _First:
        if buffer is None:
            return cls(None, 0, None)
        return cls(buffer, buffer._version, buffer.detach().clone())

    def is_still(self, buffer: Tensor | None) -> bool:
        return buffer is self.buffer and (buffer is None or buffer._version == self.version)
