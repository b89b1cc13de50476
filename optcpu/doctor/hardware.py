"""Checks of the processor, its threads and its memory."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

from optcpu.cpu import capabilities
from optcpu.doctor.finding import Finding


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
    return Finding(
        "allocator",
        "ok",
        "glibc, which optimize() tells to keep freed memory; large tensors get a range of their own",
    )


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


def _mapped(pattern: str) -> list[str]:
    """Files mapped into this process whose name matches, each once; empty if it cannot be told."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = {line.split(None, 5)[5] for line in maps.splitlines() if len(line.split(None, 5)) == 6}
    return sorted(path for path in paths if re.search(pattern, Path(path).name))
