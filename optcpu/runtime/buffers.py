"""The buffers and extra states of a model, put back where a step is left out."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


class BufferKeeper:
    """Puts buffers back that the forward pass of a step has changed, as a step that is left out must.

    So it does with what a module gives as its extra state (``torch.nn.Module.get_extra_state``).

    Args:
        owners: modules, with the running statistics of batch norms, say; anything else is passed over.
    """

    def __init__(self, *owners: Any) -> None:
        modules = [m for o in owners if isinstance(o, nn.Module) for m in o.modules()]
        self._with_extra = [m for m in modules if _has_extra_state(m)]
        self._extra: list[Any] = []
        self._modules = [module for module in modules if module._buffers]
        self._places: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
        self._ids: list[int] = []
        self._kept: list[_KeptBuffer] = []
        self._statistics = _Statistics([])
        self._others: list[_KeptBuffer] = []

    def keep(self) -> None:
        """Take note of what the buffers are; large ones that have not changed since then cost nothing."""
        if self._with_extra:
            self._extra = self._extra_now()
        # Each step does this, behind kernels that leave nothing of Python in the caches: few calls count.
        present = chain.from_iterable(map(dict.values, map(_buffers_of, self._modules)))
        if list(map(id, present)) != self._ids or not self._statistics.update():
            self._keep_anew()
            return
        for one in self._others:
            if not one.update():
                self._keep_anew()
                return

    def _keep_anew(self) -> None:
        self._places = [(module, dict(module._buffers)) for module in self._modules]
        self._ids = [id(buffer) for _, buffers in self._places for buffer in buffers.values()]
        kept: dict[Any, _KeptBuffer] = {}
        for module, buffers in self._places:
            for name, buffer in buffers.items():
                if (
                    buffer is not None
                ):  # one that modules share is kept once, if it can be written to
                    key = (id(module), name) if buffer.is_inference() else id(buffer)
                    if key not in kept:
                        kept[key] = _KeptBuffer(module, name, buffer)
        self._kept = list(kept.values())
        at_once = [one for one in self._kept if one.is_statistic and _has_memory(one.buffer)]
        self._statistics = _Statistics(at_once)
        those = set(map(id, at_once))
        self._others = [one for one in self._kept if id(one) not in those]

    @torch.no_grad()
    def put_back(self) -> None:
        """Make the buffers what they were when they were kept, also those that were replaced or added."""
        for module, buffers in self._places:
            module._buffers.clear()
            module._buffers.update(buffers)
        self._statistics.spell_out()
        for one in self._kept:
            one.write(one.copy)
        self._set_extra(self._extra)

    def _extra_now(self) -> list[Any]:
        return [copy.deepcopy(module.get_extra_state()) for module in self._with_extra]

    def _set_extra(self, states: list[Any]) -> None:
        for module, state in zip(self._with_extra, states, strict=False):  # as many as were kept
            module.set_extra_state(copy.deepcopy(state))

    @contextmanager
    @torch.no_grad()
    def put_back_meanwhile(self) -> Iterator[list[Any]]:
        """Within the block buffers and extra states are what they were when they were kept.

        Yields:
            Copies of what they are outside of it, for :meth:`write`.
        """
        places = [(module, dict(module._buffers)) for module in self._modules]
        now = [one.present.detach().clone() for one in self._kept]
        extra = self._extra_now()
        self.put_back()
        try:
            yield [*now, *extra]
        finally:
            for module, buffers in places:
                module._buffers.clear()
                module._buffers.update(buffers)
            for one, value in zip(self._kept, now, strict=True):
                if one.present is one.buffer:
                    one.write(value)
            self._set_extra(extra)

    @torch.no_grad()
    def write(self, values: list[Any]) -> None:
        """Give buffers and extra states what :meth:`put_back_meanwhile` gave; what was kept stays so."""
        count = len(self._kept)
        for one, value in zip(self._kept, values[:count], strict=True):
            one.write(value)
        self._set_extra(values[count:])


def _has_extra_state(module: nn.Module) -> bool:
    """Whether it gives one, and takes it back: that of some only tells a version, say."""
    kind = type(module)
    gives = kind.get_extra_state is not nn.Module.get_extra_state
    return gives and kind.set_extra_state is not nn.Module.set_extra_state


_buffers_of = operator.attrgetter("_buffers")

# Bytes. Smaller buffers are copied in each step: as good as any may be written through ``.data``, which is
# not counted as a change.
_SMALL = 2**18


class _KeptBuffer:
    """A buffer of a module, and a copy of it."""

    __slots__ = ("buffer", "copy", "counted", "module", "name", "version")

    def __init__(self, module: nn.Module, name: str, buffer: Tensor) -> None:
        self.module, self.name, self.buffer = module, name, buffer
        self.copy = buffer.detach().clone()
        large = buffer.numel() * buffer.element_size() > _SMALL
        self.counted = large and not self.is_statistic and not buffer.is_inference()
        self.version = buffer._version if self.counted else None

    @property
    def is_statistic(self) -> bool:
        """Whether a batch norm keeps it, whose kernels write without counting that as a change."""
        return isinstance(self.module, nn.modules.batchnorm._NormBase)

    def update(self) -> bool:
        """Copy the buffer anew; whether that is possible, as nobody has changed its shape."""
        if self.buffer.shape != self.copy.shape:
            return False
        if self.counted:
            if self.version == self.buffer._version:
                return True
            self.version = self.buffer._version
        self.copy.copy_(self.buffer.detach())
        return True

    @property
    def present(self) -> Tensor:
        """The buffer, or the one that has taken its place."""
        present = self.module._buffers.get(self.name)
        return self.buffer if present is None else present

    def write(self, value: Tensor) -> None:
        """Make the buffer ``value``."""
        if self.buffer.is_inference():
            self.module._buffers[self.name] = value.clone()
        elif self.buffer.shape != value.shape:
            self.buffer.data = value.clone()
        elif not _is_expanded(self.buffer):  # those cannot be written to
            self.buffer.copy_(value)


class _Statistics:
    """Running statistics, of which one call copies all bytes at once.

    That takes a fraction of the time that a call for each would. (Not for all buffers: memory that NumPy
    has seen cannot be resized any more.)

    Args:
        kept: those that NumPy can see (:func:`_memory_of`).
    """

    def __init__(self, kept: list[_KeptBuffer]) -> None:
        self._kept = kept
        self._buffers = [one.buffer for one in kept]
        self._memory = [_memory_of(buffer) for buffer in self._buffers]
        self._addresses = list(map(Tensor.data_ptr, self._buffers))
        self._bytes = b"".join(self._memory)

    def update(self) -> bool:
        """Copy them anew; whether that is possible, as nobody has given them other memory."""
        if list(map(Tensor.data_ptr, self._buffers)) != self._addresses:
            return False
        self._bytes = b"".join(self._memory)
        return True

    def spell_out(self) -> None:
        """Give each of those that are kept its copy."""
        start = 0
        for one, memory in zip(self._kept, self._memory, strict=True):
            numbers = bytearray(self._bytes[start : start + memory.nbytes])
            one.copy = torch.frombuffer(numbers, dtype=one.copy.dtype).view(one.copy.shape)
            start += memory.nbytes


def _has_memory(tensor: Tensor) -> bool:
    try:
        _memory_of(tensor)
    except (TypeError, RuntimeError, ValueError):
        return False
    return True


def _memory_of(tensor: Tensor) -> memoryview:
    """The bytes of ``tensor``, where they are.

    Raises:
        TypeError, RuntimeError: they do not lie one after the other, or not in memory.
        ValueError: there are none.
    """
    memory = memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    if not memory.nbytes:
        raise ValueError("no bytes")
    return memory


def give_memory_to_expanded(*owners: Any) -> None:
    """Replace buffers several of whose elements are one, which cannot be written to, by copies."""
    for owner in owners:
        for module in owner.modules() if isinstance(owner, nn.Module) else ():
            for name, buffer in module._buffers.items():
                if buffer is not None and _is_expanded(buffer):
                    module._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)


def _is_expanded(tensor: Tensor) -> bool:
    strided = tensor.layout == torch.strided
    return strided and any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
