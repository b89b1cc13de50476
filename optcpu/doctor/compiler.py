"""Checks of what code generation needs: a C++ compiler, and a folder for what it builds."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from optcpu.doctor.finding import Finding

_LARGE_CACHE_BYTES = 10 * 2**30
_TIMEOUT_SECONDS = 180

# What Inductor's generated code needs: OpenMP, and Python's headers for its entry points.
_PROGRAM = """
#include <Python.h>
#include <omp.h>
int main() {
    int threads = 0;
    #pragma omp parallel reduction(+ : threads)
    threads += 1;
    return threads > 0 ? 0 : 1;
}
"""


def check_compiler() -> Finding:
    """Does the C++ compiler that Inductor will call build and run an OpenMP program?"""
    compiler = shlex.split(os.environ.get("CXX") or _default_compiler())
    install = (
        "install one: apt-get install g++, dnf install gcc-c++, or conda install gxx; "
        "or name yours in CXX"
    )
    if not compiler or shutil.which(compiler[0]) is None:
        name = compiler[0] if compiler else "CXX"
        return Finding(
            "C++ compiler", "error", f"{name} is not there: every model would run eagerly", install
        )
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "openmp.cpp", Path(folder) / "openmp"
        source.write_text(_PROGRAM)
        openmp = ["-Xclang", "-fopenmp", "-lomp"] if sys.platform == "darwin" else ["-fopenmp"]
        include = sysconfig.get_path("include")
        built = subprocess.run(
            [*compiler, "-std=c++17", f"-I{include}", source, "-o", program, *openmp],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
        )
        if built.returncode:
            return Finding(
                "C++ compiler",
                "error",
                f"{shlex.join(compiler)} fails: {_first_error(built.stderr)}",
                _compiler_remedy(built.stderr, install),
            )
        ran = subprocess.run([program], capture_output=True, timeout=_TIMEOUT_SECONDS)
    if ran.returncode:
        return Finding(
            "C++ compiler",
            "error",
            f"what {shlex.join(compiler)} builds ends with status {ran.returncode}",
            "set TMPDIR to a folder from which programs may run, or use another compiler (CXX)",
        )
    return Finding("C++ compiler", "ok", f"{_version_of(compiler)}: builds and runs OpenMP code")


def _default_compiler() -> str:
    return "clang++" if sys.platform == "darwin" else "g++"


def _compiler_remedy(stderr: str, install: str) -> str:
    if "Python.h" in stderr:
        return "install Python's headers: apt-get install python3-dev, dnf install python3-devel"
    if "omp" in stderr:
        return "install OpenMP: apt-get install libgomp1 g++, or brew install libomp"
    return install


def _first_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")


def _version_of(compiler: list[str]) -> str:
    told = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
    )
    return told.stdout.splitlines()[0] if told.stdout else shlex.join(compiler)


def check_compile_cache() -> Finding:
    """Can compiled code be kept, and how much is there?"""
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or _default_cache())
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding(
            "compile cache",
            "warning",
            f"{folder} is not writable ({error.strerror})",
            "set TORCHINDUCTOR_CACHE_DIR to a folder of yours",
        )
    size = sum(_size(path) for path in folder.rglob("*"))
    detail = f"{folder}: writable, {size / 2**20:,.0f} MiB"
    if size > _LARGE_CACHE_BYTES:
        return Finding("compile cache", "note", detail, f"rm -r {folder} frees it")
    return Finding("compile cache", "ok", detail)


def _default_cache() -> str:
    # Imported only here: where the cache cannot be made, the import itself fails.
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return default_cache_dir()


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:  # removed meanwhile
        return 0
