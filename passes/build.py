"""C++ kernels, built on first use.

A kernel is one ``.cpp`` file with a C interface, and the headers beside it. It is compiled once for each
machine type, compiler and version of PyTorch, in a few seconds, and kept in the user's cache directory.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from passes import cache

_BASE_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
# Loops with square roots and divisions are vectorised only with these, which change no result, and in
# full width only with the last.
_FLAGS = (*_BASE_FLAGS, "-fno-math-errno", "-fno-trapping-math", "-mprefer-vector-width=512")
_SECONDS_TO_BUILD = 120


def load(source: Path) -> ctypes.CDLL | None:
    """The library made from ``source``; None where it cannot be built, for want of a compiler say."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_built(source, compiler)))
    except (OSError, subprocess.SubprocessError):
        return None


def _built(source: Path, compiler: str) -> Path:
    """The shared library made from ``source``, from the cache or newly compiled."""
    version = _run(compiler, "--version")
    files = [source, *sorted(source.parent.glob("*.h"))]
    settings = [version, cache.machine().encode(), repr(_FLAGS).encode()]
    key = hashlib.sha256(b"\0".join([file.read_bytes() for file in files] + settings))
    target = cache.folder() / f"{source.stem}-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    root = Path(torch.__file__).parent
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=target.parent))
    except OSError:
        folder = Path(tempfile.mkdtemp())  # used by this process alone
        target = folder / target.name
    built = folder / "kernel.so"
    command = [compiler, *_FLAGS, str(source), "-o", str(built), "-DAT_PARALLEL_OPENMP=1"]
    command += [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    command += [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    _run(*command)
    os.replace(built, target)
    if folder != target.parent:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def _run(*command: str) -> bytes:
    """What a command prints; Ctrl-C does not reach it, since that would look like a broken compiler."""
    return subprocess.run(
        command, capture_output=True, check=True, timeout=_SECONDS_TO_BUILD, start_new_session=True
    ).stdout
