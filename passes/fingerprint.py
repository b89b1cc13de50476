"""A text that says what a piece of Python code does, equal in every process that would run the same.

It covers a function's code, defaults, closure and the globals it names, the file that defines it, and
so on for the functions and classes among these. PyTorch, the standard library and this package stand
for themselves by name: their versions are part of the cache key by other ways. What cannot be
described is told by its address, so that it never passes for something else.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
_BY_REPR = (torch.dtype, torch.device, torch.layout, torch.memory_format, range, slice)
_KNOWN_PACKAGES = frozenset({"torch", "passes", "builtins", *sys.stdlib_module_names}) - {
    "__main__"
}


def fingerprint(thing: object) -> str:
    """Describe ``thing``: a value, a function, a class or an instance."""
    return _Describer().describe(thing)


class _Describer:
    """One walk over a thing and what it refers to; what was met before is not followed again."""

    def __init__(self) -> None:
        self._met: dict[
            int, tuple[int, object]
        ] = {}  # the object is held so that its id stays its own

    def describe(self, thing: object) -> str:
        if isinstance(thing, (*_PLAIN, *_BY_REPR)):
            return repr(thing)
        if isinstance(thing, enum.Enum):
            return f"{type(thing).__qualname__}.{thing.name}"
        if id(thing) in self._met:
            return f"met {self._met[id(thing)][0]}"
        self._met[id(thing)] = (len(self._met), thing)
        name = _known_name(thing)
        return name if name is not None else "(" + " ".join(self._parts(thing)) + ")"

    def _parts(self, thing: object) -> Iterator[str]:
        yield type(thing).__qualname__
        if isinstance(thing, torch.Tensor):
            yield repr((thing.dtype, thing.tolist()))
        elif isinstance(thing, dict):
            yield from (f"{self.describe(k)}: {self.describe(v)}" for k, v in thing.items())
        elif isinstance(thing, (tuple, list)):
            yield from map(self.describe, thing)
        elif isinstance(thing, (set, frozenset)):
            yield from sorted(map(self.describe, thing))
        elif isinstance(thing, types.ModuleType):
            yield _source(thing)
        elif isinstance(thing, functools.partial):
            yield from map(self.describe, (thing.func, thing.args, thing.keywords))
        elif isinstance(thing, types.MethodType):
            yield from map(self.describe, (thing.__func__, thing.__self__))
        elif isinstance(thing, types.FunctionType):
            yield from self._function(thing)
        elif isinstance(thing, type):
            yield from self._class(thing)
        else:
            yield from self._instance(thing)

    def _function(self, function: types.FunctionType) -> Iterator[str]:
        yield _source(function)
        yield from map(self.describe, (function.__defaults__, function.__kwdefaults__))
        yield from (self.describe(_contents(cell)) for cell in function.__closure__ or ())
        yield from self._code(function.__code__, function.__globals__)

    def _code(self, code: types.CodeType, names: dict[str, Any]) -> Iterator[str]:
        yield code.co_code.hex()
        yield repr(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                yield from self._code(constant, names)
            else:
                yield self.describe(constant)
        for name in code.co_names:
            if name in names:
                yield self.describe(names[name])
                yield from self._attributes_read(names[name], code)

    def _attributes_read(self, thing: object, code: types.CodeType) -> Iterator[str]:
        """What the code may read from a module: settings there can change while it is loaded."""
        if isinstance(thing, types.ModuleType) and _known_name(thing) is None:
            found = (name for name in code.co_names if hasattr(thing, name))
            yield from (f"{name}={self.describe(getattr(thing, name))}" for name in found)

    def _class(self, cls: type) -> Iterator[str]:
        yield _source(cls)
        yield from map(self.describe, cls.__bases__)
        for name, member in vars(cls).items():
            function: Any = getattr(member, "__func__", getattr(member, "fget", member))
            if isinstance(function, types.FunctionType) or not name.startswith("__"):
                yield f"{name}={self.describe(function)}"

    def _instance(self, thing: object) -> Iterator[str]:
        yield self.describe(type(thing))
        if dataclasses.is_dataclass(thing):
            state = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing)}
        elif hasattr(thing, "__dict__"):
            state = vars(thing)
        else:
            yield object.__repr__(thing)
            return
        yield from (f"{name}={self.describe(value)}" for name, value in state.items())


def _known_name(thing: Any) -> str | None:
    """The full name of an operator, module, function or class of a known package."""
    if isinstance(thing, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(thing)
    if isinstance(thing, types.ModuleType):
        module, name = thing.__name__, ""
    elif isinstance(thing, (type, types.FunctionType, types.BuiltinFunctionType)):
        module, name = thing.__module__ or "builtins", thing.__qualname__
    else:
        return None
    is_local = "<locals>" in name  # its closure decides as well
    # Python functions that claim to be builtins were made by exec().
    is_made_up = isinstance(thing, types.FunctionType) and module == "builtins"
    if is_local or is_made_up or module.split(".")[0] not in _KNOWN_PACKAGES:
        return None
    return f"{module}.{name}"


def _contents(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"


def _source(thing: type | Callable[..., Any] | types.ModuleType) -> str:
    """The text of the file that defines ``thing``; empty for code that was typed in."""
    try:
        return Path(inspect.getsourcefile(thing) or "").read_text(encoding="utf-8")
    except (TypeError, OSError):
        return ""
