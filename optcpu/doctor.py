"""What this machine can do for training on the CPU, what is missing, and the remedy for each.

Every check is one function that looks and returns a :class:`Finding`; none changes anything.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optcpu.cpu import capabilities

TESTED_TORCH = ("2.8", "2.13")
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

Status = Literal["ok", "note", "warning", "error"]
_SIGNS: dict[Status, tuple[str, str]] = {
    "ok": ("✓", "green"),
    "note": ("·", "cyan"),
    "warning": ("!", "yellow"),
    "error": ("✗", "red"),
}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: What was looked at.
        status: ``"ok"``; ``"note"`` for something optional; ``"warning"`` for what costs speed;
            ``"error"`` for what makes optcpu unusable.
        detail: What was found.
        remedy: What to do about it; empty if there is nothing to do.
    """

    check: str
    status: Status
    detail: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """The fields by name, for JSON."""
        return asdict(self)


def examine() -> list[Finding]:
    """Run every check. Takes a few seconds, as it compiles a small program."""
    return [_run(check) for check in CHECKS]


def usable(findings: Iterable[Finding]) -> bool:
    """Whether none of the findings is an error."""
    return all(finding.status != "error" for finding in findings)


def show(findings: Iterable[Finding], console: Console) -> None:
    """Print the findings for people."""
    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        sign, colour = _SIGNS[finding.status]
        told = Text(finding.detail)
        if finding.remedy:
            told.append(f"\n→ {finding.remedy}", style=colour)
        table.add_row(Text(sign, style=colour), Text(finding.check, style="bold"), told)
    console.print(table)


def _run(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # an odd machine must not hide what the other checks find
        name = check.__name__.removeprefix("check_").replace("_", " ")
        return Finding(name, "warning", f"could not be checked: {type(error).__name__}: {error}")


def check_processor() -> Finding:
    """Is there hardware for BF16?"""
    cpu = capabilities()
    name = f"{cpu.model or cpu.architecture}, {cpu.isa}"
    if cpu.bf16:
        unit = "matrix unit (AMX)" if cpu.amx else "vector unit"
        return Finding("processor", "ok", f"{name}: BF16 products in hardware, {unit}")
    detail = f'{name}: no BF16 in hardware, so precision="auto" trains in FP32'
    if cpu.emulated:
        return Finding(
            "processor",
            "warning",
            f"{detail}; {', '.join(cpu.emulated)} asks for an older processor",
            "unset " + " ".join(setting.partition("=")[0] for setting in cpu.emulated),
        )
    return Finding(
        "processor",
        "warning",
        detail,
        "BF16 needs AVX512_BF16 (AMD Zen 4, Intel Cooper Lake or later), AMX (Intel Sapphire "
        "Rapids or later) or Arm BF16 (Neoverse V1, N2 or later)",
    )


def check_threads() -> Finding:
    """Does PyTorch use as many threads as there are cores for it?"""
    import torch

    cpu = capabilities()
    threads, cores = torch.get_num_threads(), cpu.physical_cores
    limit = "" if cpu.quota is None else f", cgroup quota {cpu.quota:g} CPUs"
    detail = (
        f"{threads} threads for {cores} usable cores ({cpu.logical_cores} hardware threads{limit})"
    )
    if threads == cores:
        return Finding("threads", "ok", detail)
    if asked := os.environ.get("OMP_NUM_THREADS"):
        detail += f" (OMP_NUM_THREADS is {asked})"
    cost = "they get in each other's way" if threads > cores else "cores stay idle"
    remedy = f"torch.set_num_threads({cores}) or OMP_NUM_THREADS={cores}"
    return Finding("threads", "warning", f"{detail}: {cost}", remedy)


def check_set_num_threads() -> Finding:
    """Is the number of threads that is asked for the one that a parallel region gets?"""
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    if after == before + 1:
        return Finding("torch.set_num_threads", "ok", "is honoured")
    return Finding(
        "torch.set_num_threads",
        "warning",
        f"asked for {before + 1} threads, got {after}",
        "look for OMP_THREAD_LIMIT or MKL_DYNAMIC in the environment, and for a library that sets "
        "the number of threads after torch",
    )


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


def check_allocator() -> Finding:
    """Can freed memory stay in the process?"""
    preloaded = sorted(
        name for name in ("tcmalloc", "jemalloc", "mimalloc") if _mapped(rf"lib{name}")
    )
    if preloaded:
        return Finding(
            "allocator", "ok", f"{', '.join(preloaded)} is loaded and keeps freed memory"
        )
    try:
        has_mallopt = hasattr(ctypes.CDLL("libc.so.6"), "mallopt")
    except OSError:
        has_mallopt = False
    if not has_mallopt:
        return Finding(
            "allocator",
            "note",
            "the C library has no mallopt: large tensors are mapped anew in every step",
            "preload tcmalloc or jemalloc (LD_PRELOAD), where the system has one",
        )
    return Finding("allocator", "ok", "glibc, which optimize() tells to keep freed memory")


def check_huge_pages(
    path: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled"),
) -> Finding:
    """Does the kernel give transparent huge pages?"""
    if not path.exists():
        return Finding("huge pages", "note", "this kernel does not tell")
    match = re.search(r"\[(\w+)\]", path.read_text())
    state = match.group(1) if match else "unknown"
    if state == "never":
        return Finding(
            "huge pages",
            "note",
            "transparent huge pages are off: first touches of memory are slower",
            f"echo madvise | sudo tee {path}",
        )
    return Finding("huge pages", "ok", f"transparent huge pages: {state}")


def check_openmp() -> Finding:
    """Is there one OpenMP runtime in the process, not two?"""
    import torch  # noqa: F401  its libraries are what is looked for

    runtimes = _mapped(r"lib(?:gomp|iomp5|omp)\b[^/]*\.(?:so|dylib)")
    if len(runtimes) > 1:
        return Finding(
            "OpenMP",
            "warning",
            f"{len(runtimes)} runtimes, each with its own threads: {', '.join(runtimes)}",
            "keep one: preload it alone (LD_PRELOAD), or unset LD_PRELOAD",
        )
    return Finding("OpenMP", "ok", f"one runtime: {runtimes[0]}" if runtimes else "nothing doubled")


def check_torch() -> Finding:
    """Was optcpu tested with this PyTorch?"""
    import torch

    version = torch.__version__
    series = ".".join(version.split(".")[:2])
    tested = " and ".join(TESTED_TORCH)
    remedy = "pip install torch==2.13.0"
    if tuple(map(int, series.split("."))) < (2, 8):
        return Finding("torch", "error", f"{version} is too old; tested: {tested}", remedy)
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return Finding(
            "torch",
            "warning",
            f"{version} was built without oneDNN, which has the fast products",
            "install PyTorch's own wheel: pip install torch",
        )
    if series not in TESTED_TORCH:
        return Finding(
            "torch", "warning", f"{version} was not tested with optcpu; tested: {tested}", remedy
        )
    return Finding("torch", "ok", f"{version}, a tested series")


def check_ipex() -> Finding:
    """Does Intel's extension, where installed, fit this PyTorch?"""
    return _extension(
        "IPEX",
        package="intel-extension-for-pytorch",
        module="intel_extension_for_pytorch",
        absent="not installed; optional (archived, needs torch 2.8)",
        remedy="pip install torch==2.8.0 intel-extension-for-pytorch==2.8.0, or uninstall it",
    )


def check_zentorch() -> Finding:
    """Does AMD's extension, where installed, fit this PyTorch?"""
    return _extension(
        "zentorch",
        package="zentorch",
        module="zentorch",
        absent="not installed; optional, only compared with",
        remedy="install the release that names your torch version, or uninstall it",
    )


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


def check_optional_libraries() -> Finding:
    """Which optional libraries are missing?"""
    uses = {
        "matplotlib": "charts",
        "scikit-learn": "the digits-cnn workload",
        "tokenizers": "byte-pair tokens for gpt2-small, else bytes",
    }
    modules = {"scikit-learn": "sklearn"}
    missing = [name for name in uses if not importlib.util.find_spec(modules.get(name, name))]
    if missing:
        detail = "not installed: " + "; ".join(f"{name} ({uses[name]})" for name in missing)
        return Finding("optional libraries", "note", detail, "pip install " + " ".join(missing))
    return Finding("optional libraries", "ok", f"{', '.join(uses)} are installed")


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_processor,
    check_threads,
    check_set_num_threads,
    check_compiler,
    check_allocator,
    check_huge_pages,
    check_openmp,
    check_torch,
    check_ipex,
    check_zentorch,
    check_compile_cache,
    check_optional_libraries,
)


def _default_cache() -> str:
    # Imported only here: where the cache cannot be made, the import itself fails.
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return default_cache_dir()


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


def _extension(name: str, *, package: str, module: str, absent: str, remedy: str) -> Finding:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "note", absent)
    # In a process of its own: with another torch the import can end in any exception or a crash.
    tried = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
    )
    if tried.returncode == 0:
        return Finding(name, "ok", f"{version} can be imported")
    lines = tried.stderr.strip().splitlines() or [f"status {tried.returncode}"]
    return Finding(
        name, "warning", f"{version} is installed but its import fails: {lines[-1]}", remedy
    )


def _mapped(pattern: str) -> list[str]:
    """Files mapped into this process whose name matches, each once; empty if it cannot be told."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = {line.split(None, 5)[5] for line in maps.splitlines() if len(line.split(None, 5)) == 6}
    return sorted(path for path in paths if re.search(pattern, Path(path).name))


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:  # removed meanwhile
        return 0
