"""Compilers that Ctrl-C does not reach, and that no forked process keeps from ending.

A terminal sends it to every process of the group, as torchrun does SIGTERM. To Inductor a compiler that was
ended so is one that cannot do what it was asked to: it goes on with other code, say without vector
instructions, and what is trained with that is rounded otherwise. Python has the signal, too, and ends what
it waits for if it wants to end itself.

What a compiler prints is read from a pipe until nobody can write to it any more. A process that is forked
just while the compiler is started, by a thread, has the writing end as well: one that loads data would keep
it for hours, and who waits for the compiler would wait as long. So forks wait until compilers are started.
"""

from __future__ import annotations

import functools
import os
import subprocess
import threading
from types import FunctionType, SimpleNamespace
from typing import Any

from torch._inductor import cpp_builder, cpu_vec_isa

_starting = threading.RLock()
if hasattr(os, "register_at_fork"):
    release = _starting.release
    os.register_at_fork(before=_starting.acquire, after_in_parent=release, after_in_child=release)


class _Compiler(subprocess.Popen[Any]):
    """A process in a session of its own, whose pipes no process has that is forked meanwhile."""

    def __init__(self, *args: Any, **options: Any) -> None:
        with _starting:
            super().__init__(*args, **{"start_new_session": True, **options})


def _with_compilers() -> SimpleNamespace:
    """The module ``subprocess``, whose functions start a :class:`_Compiler`."""
    names: dict[str, Any] = {**vars(subprocess), "Popen": _Compiler}
    for name in ("run", "call", "check_call", "check_output"):
        plain = vars(subprocess)[name]
        names[name] = FunctionType(plain.__code__, names, name, plain.__defaults__)
        names[name].__kwdefaults__ = plain.__kwdefaults__
    return SimpleNamespace(**names)


compilers = _with_compilers()


@functools.cache
def shield_compilers() -> None:
    """Have Inductor start compilers, and what it tries them with, in that way; once."""
    for module in (cpp_builder, cpu_vec_isa):
        module.__dict__["subprocess"] = compilers
