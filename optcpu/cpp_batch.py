"""Several kernels in one run of the C++ compiler.

Most of what the compiler does for a kernel of Inductor's, it does for the headers: a kernel more in the
same run costs a fifth of one in a run of its own. So a thread takes all kernels that wait (as does whoever
would have to wait for them), compiles them as one source, with the options that each would have had, and
puts a copy of the library where Inductor looks for that of each kernel. What cannot be compiled so,
Inductor compiles itself, one by one.

The sources all define ``kernel`` and its Python module's ``PyInit_kernel``. In the common source they get a
number, and a copy makes the module that its own file is named for.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._inductor.async_compile import AsyncCompile

from optcpu.cpp_signals import compilers

logger = logging.getLogger(__name__)

_LONGEST = 600  # seconds for one run of the compiler


class BatchCompile(AsyncCompile):
    """Inductor's compiler of kernels, but kernels that wait at the same time are compiled together."""

    @classmethod
    def submit(cls, task: Callable[..., Any]) -> Any:
        """Compile a kernel in a thread.

        Args:
            task: Inductor's own function for it, which does nothing for a library that is there.

        Returns:
            A future that is done once the library is there or ``task`` has to be called.
        """
        job = _Job.of(task) if sys.platform == "linux" else None
        return super().submit(task) if job is None else _submit(job)


@dataclass(frozen=True)
class _Job:
    """A kernel to be compiled: ``command`` makes the library ``target`` of the file ``source``."""

    command: tuple[str, ...]
    source: str
    target: str
    done: Future[None]

    @classmethod
    def of(cls, task: Any) -> _Job | None:
        """What an ``_worker_compile_cpp`` of Inductor's would do; None if it is more than one step."""
        try:
            _, (builder,) = task.args
            target = str(builder.get_target_file_path())
            command = tuple(shlex.split(builder.get_command_line()))
            (source,) = (word for word in command if word.endswith(".cpp"))
        except (AttributeError, TypeError, ValueError):
            return None
        return cls(command, source, target, Future()) if target in command else None

    def run_as(self, source: str, target: str, *options: str) -> None:
        """Run the command on another file.

        Raises:
            subprocess.SubprocessError: the compiler says no, or does not end.
        """
        words = {self.source: source, self.target: target}
        command = [words.get(word, word) for word in self.command]
        compilers.run([*command, *options], check=True, capture_output=True, timeout=_LONGEST)

    def alike(self) -> tuple[str, ...]:
        """The command without the names of files: what those compiled together have in common."""
        return tuple(word for word in self.command if word not in (self.source, self.target))


_lock = threading.Lock()
_waiting: list[_Job] = []
_is_working = False


def _begin_anew() -> None:
    """A process that was forked has neither the thread nor what it was about to compile."""
    global _lock, _is_working
    _lock = threading.Lock()
    _waiting.clear()
    _is_working = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def _submit(job: _Job) -> Future[None]:
    global _is_working
    with _lock:
        _waiting.append(job)
        if not _is_working:
            _is_working = True
            threading.Thread(target=_work_off, name="optcpu-compile-kernels", daemon=True).start()
    return job.done


def _work_off() -> None:
    """Compile what waits until nothing does; whatever goes wrong, nobody is left waiting."""
    global _is_working
    while True:
        with _lock:
            jobs = _waiting.copy()
            _waiting.clear()
            if not jobs:
                _is_working = False
                return
        _compile(jobs)


def help_out() -> None:
    """Compile what waits in this thread, which has nothing else to do than to wait for it.

    The other thread may be in the middle of its last kernels, on one core of several.
    """
    with _lock:
        jobs = _waiting.copy()
        _waiting.clear()
    _compile(jobs)


def _compile(jobs: Sequence[_Job]) -> None:
    groups: dict[tuple[str, ...], list[_Job]] = defaultdict(list)
    for job in jobs:
        groups[job.alike()].append(job)
    try:
        for group in groups.values():
            try:
                _compile_together(group)
            except Exception as error:
                logger.debug("%d kernels were not compiled together: %s", len(group), error)
    finally:  # Ctrl-C may end this
        for job in jobs:
            if job.done.set_running_or_notify_cancel():
                job.done.set_result(None)


def _compile_together(jobs: Sequence[_Job]) -> None:
    with tempfile.TemporaryDirectory(prefix="optcpu-kernels-") as folder:
        source, library = Path(folder) / "kernels.cpp", f"{folder}/kernels.so"
        source.write_bytes(os.fsencode(_common_source(jobs)))
        jobs[0].run_as(str(source), library, "-w")
        for job in jobs:
            _put(library, job.target)


def _put(library: str, target: str) -> None:
    """Copy a library to where others look for it, who must never see half of one."""
    file, unfinished = tempfile.mkstemp(dir=os.path.dirname(target), suffix=".tmp")
    os.close(file)
    try:
        shutil.copy(library, unfinished)
        os.replace(unfinished, target)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _common_source(jobs: Sequence[_Job]) -> str:
    parts = [f"#include <{header}>" for header in _HEADERS]
    for number, job in enumerate(jobs):
        parts.append(_KERNEL.format(number=number, source=job.source))
    modules = (
        _MODULE.format(number=number, file=os.path.basename(job.target))
        for number, job in enumerate(jobs)
    )
    parts.append(_INIT.replace("MODULES", "".join(modules)))
    return "\n".join(parts)


# What the sources include, which must not happen first within their namespaces, and what _INIT needs.
_HEADERS = (
    "torch/csrc/inductor/cpp_prefix.h",
    "Python.h",
    "sstream",
    "cstdlib",
    "dlfcn.h",
    "string",
)

_KERNEL = """
#define kernel kernel_{number}
#define PyInit_kernel PyInit_kernel_{number}
namespace of_kernel_{number} {{
#include "{source}"
}}
#undef kernel
#undef PyInit_kernel
"""

_INIT = """
PyMODINIT_FUNC PyInit_kernel(void) {
    static const char here = 0;
    Dl_info library;
    const bool found = dladdr(&here, &library) != 0 && library.dli_fname != nullptr;
    const std::string file = found ? library.dli_fname : "";
MODULES    PyErr_Format(PyExc_ImportError, "no kernel belongs to the name of %s", file.c_str());
    return nullptr;
}
"""

_MODULE = """\
    if (file.find("{file}") != std::string::npos) return of_kernel_{number}::PyInit_kernel_{number}();
"""
