"""Random numbers that are a function of where they are used, and the states of generator objects.

The generator is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014): number ``c`` of stream ``key`` is ``mix(key + c * GAMMA)``, so that any of them can be had
at once, in any order, in any process.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

UInt64 = npt.NDArray[np.uint64]

_BITS = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def stream_key(*parts: int) -> int:
    """The key, in 0..2**64 - 1, of the stream that these integers name; their order matters."""
    key = 0
    for part in parts:
        key = _mix_int(((key ^ (part & _BITS)) + _GAMMA) & _BITS)
    return key


def random_bits(key: int, counters: UInt64) -> UInt64:
    """Numbers ``counters`` of a stream, each 64 random bits; different counters give different ones.

    Args:
        key: of :func:`stream_key`.
        counters: uint64, any shape.
    """
    bits: UInt64 = counters * np.uint64(_GAMMA)  # a new array, changed in place from here on
    bits += np.uint64(key)
    shifted = bits >> np.uint64(30)
    bits ^= shifted
    bits *= np.uint64(_FIRST)
    np.right_shift(bits, np.uint64(27), out=shifted)
    bits ^= shifted
    bits *= np.uint64(_SECOND)
    np.right_shift(bits, np.uint64(31), out=shifted)
    bits ^= shifted
    return bits


def _mix_int(value: int) -> int:
    value = ((value ^ (value >> 30)) * _FIRST) & _BITS
    value = ((value ^ (value >> 27)) * _SECOND) & _BITS
    return value ^ (value >> 31)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's CPU generator.

    Args:
        seed: in 0..2**64 - 1.
    """
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every accelerator, 0.5 ms


def seed_generator(generator: object, seed: int) -> None:
    """Seed one of the generators that :func:`generator_state` knows.

    Args:
        seed: in 0..2**64 - 1.
    """
    if isinstance(generator, np.random.Generator):
        kind = type(generator.bit_generator)
        generator.bit_generator.state = kind(seed).state  # type: ignore[call-arg]
    elif isinstance(generator, np.random.RandomState):
        generator.seed([seed & 0xFFFFFFFF, seed >> 32])
    elif isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)


_DEEPEST = 5  # attributes of attributes, or elements of lists of them
_LONGEST = 64  # what is longer holds samples, not parts
_MOST = 1000  # objects to look at


def generators_in(owners: Mapping[str, object]) -> dict[str, Any]:
    """The generators that objects, or what they consist of, have as attributes; each once, by its path.

    Looked at are attributes, elements of short lists, tuples and dictionaries, arguments of partial
    functions, and variables of enclosing ones, to a depth of five: a transform of a dataset in a dataset.

    Args:
        owners: by the names that begin the paths, as in ``"dataset.transform.rng"``.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    level: list[tuple[str, object]] = list(owners.items())
    for _ in range(_DEEPEST):
        parts: list[tuple[str, object]] = []
        for path, owner in level:
            if id(owner) in seen or len(seen) > _MOST:
                continue
            seen.add(id(owner))
            # What cannot be looked into, by its own error, may serve training well, and holds none.
            with contextlib.suppress(Exception):
                for name, value in _parts_of(owner):
                    if is_plain(value):
                        continue
                    if generator_state(value) is None:
                        parts.append((f"{path}.{name}", value))
                    elif id(value) not in seen:
                        seen.add(id(value))
                        found[f"{path}.{name}"] = value
        level = parts
    return found


def is_plain(value: object) -> bool:
    """Whether ``value`` is a number, a string, a tensor or nothing, or empty, or a short list of such."""
    if type(value) in _CONTAINERS and not value:
        return True  # as most dictionaries of hooks are
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return len(value) <= _LONGEST and all(type(one) in _PLAIN for one in value)
    return type(value) in _PLAIN


_CONTAINERS = (list, tuple, dict, OrderedDict, set, frozenset, deque)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.nn.Parameter)


def _parts_of(owner: object) -> Iterator[tuple[str, object]]:
    if isinstance(owner, functools.partial):
        yield "func", owner.func
        yield from _numbered(owner.args)
        yield from owner.keywords.items()
    elif isinstance(owner, MethodType):
        yield "self", owner.__self__
    elif isinstance(owner, FunctionType):
        for name, cell in zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # nothing is in it yet
                yield name, cell.cell_contents
    elif isinstance(owner, (list, tuple, set, frozenset, deque)):
        if len(owner) <= _LONGEST:
            yield from _numbered(owner)
    elif isinstance(owner, dict):
        if len(owner) <= _LONGEST:
            yield from ((str(key), value) for key, value in owner.items())
    elif not isinstance(owner, (torch.Tensor, np.ndarray, type, ModuleType)):
        yield from getattr(owner, "__dict__", {}).items()
        for name in _slots_of(type(owner)):
            if hasattr(owner, name):
                yield name, getattr(owner, name)


def _slots_of(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        yield from (name for name in names if not name.startswith("__"))


def _numbered(values: Iterable[object]) -> Iterator[tuple[str, object]]:
    return ((str(place), value) for place, value in enumerate(values))


def generator_state(generator: object) -> Any:
    """The state of a generator object; None if it is no generator.

    Known are ``torch.Generator``, ``numpy.random.Generator`` and ``RandomState``, ``random.Random``.
    """
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):
        return generator.getstate()  # the system's generator has none
    return None


def set_generator_state(generator: object, state: Any) -> None:
    """Put back what :func:`generator_state` gave."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, (torch.Generator, np.random.RandomState)):
        generator.set_state(state)
