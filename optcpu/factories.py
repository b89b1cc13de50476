"""Functions of the user's that a shell command names: ``package.module:factory``."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from torch import nn

from optcpu.errors import add_note


def find_factory(name: str) -> tuple[ModuleType, Callable[..., Any]]:
    """The function that ``name`` stands for, and its module.

    Raises:
        ValueError: there is no such module or attribute.
        TypeError: it is no function.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{name!r} is incomplete; expected package.module:factory")
    module = _import(module_name, name)
    return module, _attribute(module, attribute, name)


def _import(module_name: str, name: str) -> ModuleType:
    advice = "expected package.module:factory, importable from the current directory"
    if module_name.endswith(".py") or "/" in module_name:
        dotted = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise ValueError(
            f"{module_name!r} in {name!r} is a file, not a module; write {dotted}:factory"
        )
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that the user's module fails to import is another problem than a wrong name.
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise ValueError(f"no module {error.name!r} for {name!r}; {advice}") from error
        raise ValueError(f"{module_name} cannot be imported: {error}") from error
    except Exception as error:
        raise ValueError(
            f"{module_name} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _attribute(module: ModuleType, attribute: str, name: str) -> Callable[..., Any]:
    try:
        factory = getattr(module, attribute)
    except AttributeError:
        public = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ValueError(
            f"{module.__name__} has no attribute {attribute!r}{nearest(attribute, public)}"
        ) from None
    if not callable(factory) or isinstance(factory, nn.Module):
        raise TypeError(f"{name} must be a function, got {describe(factory)}")
    result: Callable[..., Any] = factory
    return result


def call_factory(factory: Callable[..., Any], name: str, given: dict[str, int]) -> object:
    """Call the user's function with as much of ``given`` as it has parameters for.

    Raises:
        TypeError: it needs more than that.
    """
    parameters = inspect.signature(factory).parameters
    arguments = {key: value for key, value in given.items() if key in parameters}
    missing = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in arguments
    ]
    if missing:
        raise TypeError(
            f"{name} needs a value for {', '.join(missing)}; it is called with batch_size (where "
            "one was asked for) and seed only, so give its parameters defaults"
        )
    try:
        return factory(**arguments)
    except Exception as error:
        add_note(error, f"it comes from {name}()")
        raise


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def describe(value: object) -> str:
    """What kind of thing this is, in words."""
    if isinstance(value, tuple):
        return f"a tuple of ({', '.join(type(item).__name__ for item in value)})"
    return f"a {type(value).__name__}"
