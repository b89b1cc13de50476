"""C++ kernels for what neither PyTorch's operators nor generated code reach, built on first use.

A kernel is one ``.cpp`` file in ``passes/kernels`` with a C interface. It is compiled once for each
machine type, compiler and version of PyTorch, in about two seconds, and kept in the user's cache
directory. Where it cannot be built, its Python counterpart does the same more slowly.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from passes.gemm import cache_file

_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
_SECONDS_TO_BUILD = 120


def weight_gradient_available() -> bool:
    """Whether :func:`weight_gradient` can run here; builds the kernel if need be."""
    return _weight_gradient_library() is not None


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """``gradient.T @ x`` in FP32 from BF16 operands, rounded nowhere.

    Args:
        gradient: shape (M, N), BF16.
        x: shape (M, K), BF16.

    Returns:
        Shape (N, K), FP32.

    Raises:
        RuntimeError: the kernel is not available.
    """
    library = _weight_gradient_library()
    if library is None:
        raise RuntimeError("the weight gradient kernel could not be built on this machine")
    gradient, x = gradient.contiguous(), x.contiguous()
    (batch, out), width = gradient.shape, x.shape[1]
    padded = batch + batch % 2
    tile = library.tile_columns()
    transposed = gradient.new_empty(out * padded)
    panels = x.new_empty(-(-width // tile) * tile * padded)
    result = torch.empty(out, width, dtype=torch.float32, device="cpu")
    library.weight_gradient(
        *(ctypes.c_void_p(t.data_ptr()) for t in (gradient, x, result)),
        *(ctypes.c_int64(size) for size in (batch, out, width)),
        *(ctypes.c_void_p(t.data_ptr()) for t in (transposed, panels)),
    )
    return result


@functools.cache
def _weight_gradient_library() -> ctypes.CDLL | None:
    """The compiled kernel; None where it cannot be built or the processor has no BF16."""
    if not torch.cpu._is_avx512_bf16_supported():
        return None
    library = _load(Path(__file__).parent / "kernels" / "weight_gradient.cpp")
    if library is not None:
        library.tile_columns.restype = ctypes.c_int64
        library.weight_gradient.restype = None
    return library


def _load(source: Path) -> ctypes.CDLL | None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_built(source, compiler)))
    except (OSError, subprocess.SubprocessError):
        return None


def _built(source: Path, compiler: str) -> Path:
    """The shared library made from ``source``, from the cache or newly compiled."""
    machine = cache_file().stem
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=_SECONDS_TO_BUILD
    ).stdout
    key = hashlib.sha256(source.read_bytes() + version + machine.encode() + repr(_FLAGS).encode())
    target = cache_file().parent / f"{source.stem}-{key.hexdigest()[:16]}.so"
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
    subprocess.run(command, capture_output=True, check=True, timeout=_SECONDS_TO_BUILD)
    os.replace(built, target)
    if folder != target.parent:
        shutil.rmtree(folder, ignore_errors=True)
    return target
