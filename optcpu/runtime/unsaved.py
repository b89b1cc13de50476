"""What a model knows beyond its ``state_dict()``, without which it would not go on as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from optcpu.runtime.data.randomness import generator_state, set_generator_state


class Unsaved:
    """Generators that are attributes of modules, and buffers that are not persistent.

    Of the buffers only those are looked at that have changed since this was made: masks and tables, which
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
        self._at_first = {path: _mark(buffer) for path, _, _, buffer in self._buffers()}

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
            if buffer is not None and self._at_first.get(path) != _mark(buffer)
        }

    @torch.no_grad()
    def set_buffers(self, saved: dict[str, Tensor]) -> None:
        """Put back what :meth:`buffers` gave."""
        for path, module, name, buffer in self._buffers():
            if path not in saved:
                continue
            if buffer is not None and buffer.shape == saved[path].shape:
                buffer.copy_(saved[path])
            else:
                setattr(module, name, saved[path].clone())

    def _buffers(self) -> Iterator[tuple[str, nn.Module, str, Tensor | None]]:
        for path, module in self._modules.items():
            for name in sorted(module._non_persistent_buffers_set):
                if name in module._buffers:
                    yield f"{path}.{name}", module, name, module._buffers[name]


def _mark(buffer: Tensor | None) -> tuple[int, int] | None:
    """Another one for another tensor, and for one that was written to."""
    return None if buffer is None else (id(buffer), buffer._version)
