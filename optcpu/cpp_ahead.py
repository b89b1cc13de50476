"""The C++ compiler's work, begun before Inductor would begin it.

Inductor writes the code of a whole graph, and only then starts the C++ compiler on all of its kernels;
before the first of them it finds out what the compiler can do and translates its headers. Here both begin
as early as they can, on a core that has nothing else to do while Python traces graphs. Nothing but the time
is different: Inductor finds the work under way, by the hash of the source, or does it itself.
"""

from __future__ import annotations

import ast
import functools
import importlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec
from unittest import mock

from torch._inductor import cpu_vec_isa
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.cpu_vec_isa import VecISA

from optcpu.cpp_batch import BatchCompile, help_out
from optcpu.cpp_signals import shield_compilers

P = ParamSpec("P")

logger = logging.getLogger(__name__)

_BINDING = "async_compile.cpp_pybinding("  # what the definition of a kernel in C++ begins with
_IN_AVX512 = frozenset({"-mavx2", "-mf16c"})
_SMALLEST_KERNEL = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(float* x) { at::vec::Vectorized<float>(0.0f).store(x); }
"""


def _left_to_inductor(work: Callable[P, None]) -> Callable[P, None]:
    """``work``, but an error goes by: Inductor will meet it again, where it is told and handled."""

    @functools.wraps(work)
    def attempt(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            work(*args, **kwargs)
        except Exception as error:
            logger.debug("a kernel could not be compiled ahead: %s", error)

    return attempt


@functools.cache
def prepare_compiler() -> None:
    """Let the first kernel find a tried compiler and translated headers; once in a process.

    Both are kept on disk and take 4 s each where they are not there yet, and then a second to look at: in
    a thread, which compiles by itself. A pool of threads that Inductor has begun to use must not be there
    yet when a process forks.
    """
    shield_compilers()
    # Inductor imports it to build anything, and it moves sys.meta_path meanwhile: if the thread did that,
    # an import in this one could miss the finder of files, and a module that is there would not be found.
    with suppress(ImportError):
        importlib.import_module("setuptools")
    work = threading.Thread(target=_compile_smallest, name="optcpu-prepare-compiler", daemon=True)
    work.start()


@contextmanager
def kernels_compiled_as_written() -> Iterator[None]:
    """Start the C++ compiler on each kernel as soon as Inductor has written it."""
    define = PythonWrapperCodegen.define_kernel

    def define_and_start(
        wrapper: PythonWrapperCodegen, name: str, body: str, *args: Any, **options: Any
    ) -> None:
        if body.startswith(_BINDING):
            _start(body)
        define(wrapper, name, body, *args, **options)

    wait = AsyncCompile.wait

    def help_and_wait(kernels: AsyncCompile, scope: dict[str, Any]) -> None:
        help_out()
        wait(kernels, scope)

    with (
        mock.patch.object(PythonWrapperCodegen, "define_kernel", define_and_start),
        mock.patch.object(AsyncCompile, "wait", help_and_wait),
    ):
        yield


@_left_to_inductor
def _compile_smallest() -> None:
    _find_instruction_sets()
    CppPythonBindingsCodeCache.load_pybinding(["float*"], _SMALLEST_KERNEL)


def _find_instruction_sets() -> None:
    """Have Inductor find out which vector instructions may be used, without trying the same ones twice.

    It compiles and loads a program for each of the processor's instruction sets, the richest first, and
    uses that one: 8 s. A compiler and a PyTorch that have passed with more of them have those, too.
    """
    try_out = VecISA.check_build
    passed: list[frozenset[str]] = []

    def try_once(isa: VecISA, program: str) -> bool:
        flags = _instructions(isa)
        if any(flags <= more for more in passed):
            return True
        works = try_out(isa, program)
        if works:
            passed.append(flags)
        return works

    with mock.patch.object(VecISA, "check_build", try_once):
        cpu_vec_isa.valid_vec_isa_list()


def _instructions(isa: VecISA) -> frozenset[str]:
    flags = frozenset(isa.build_arch_flags().split())
    return flags | _IN_AVX512 if "-mavx512f" in flags else flags


@_left_to_inductor
def _start(definition: str) -> None:
    """Have a kernel compiled in a thread, with others that wait, if it is not there yet.

    Args:
        definition: a call of ``async_compile.cpp_pybinding`` with literals.
    """
    call = ast.parse(definition.strip(), mode="eval").body
    assert isinstance(call, ast.Call)
    BatchCompile().cpp_pybinding(*(ast.literal_eval(argument) for argument in call.args))
