"""Compilers that Ctrl-C does not reach.

A terminal sends it to every process of the group, as torchrun does SIGTERM. To Inductor a compiler that was
ended so is one that cannot do what it was asked to: it goes on with other code, say without vector
instructions, and what is trained with that is rounded otherwise. Python has the signal, too, and ends what
it waits for if it wants to end itself.
"""

from __future__ import annotations

import functools
import subprocess
from types import SimpleNamespace
from typing import Any

from torch._inductor import cpp_builder, cpu_vec_isa


@functools.cache
def shield_compilers() -> None:
    """Have Inductor start compilers, and what it tries them with, in sessions of their own; once."""
    names = ("run", "check_call", "check_output")
    apart = SimpleNamespace(**{**vars(subprocess), **{name: _apart(name) for name in names}})
    for module in (cpp_builder, cpu_vec_isa):
        module.__dict__["subprocess"] = apart


def _apart(name: str) -> Any:
    def start(*args: Any, **options: Any) -> Any:
        return getattr(subprocess, name)(*args, **{"start_new_session": True, **options})

    return start
