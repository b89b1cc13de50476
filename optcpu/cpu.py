"""What this processor can do, and how much of it this process may use.

Instruction sets come from PyTorch where it tells them (2.9 and later), else from the operating
system. Two environment variables make a processor pass for an older one, as they do in the
libraries that read them; with these the FP32 path can be tested on a processor with BF16:

- ``ONEDNN_MAX_CPU_ISA`` (and its old name ``DNNL_MAX_CPU_ISA``), e.g. ``AVX512_CORE``, ``AVX2``
- ``ATEN_CPU_CAPABILITY``, e.g. ``avx2``, ``default``

Sources: oneDNN's "CPU Dispatcher Control"; ATen's ``DispatchStub.cpp``; the kernel's
``cgroup-v2.rst`` (``cpu.max``) and ``cputopology.rst``.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

# Oldest first; a processor has a level when it has all of the flags (spelt as in /proc/cpuinfo).
_X86_LEVELS: dict[str, frozenset[str]] = {
    "sse4_1": frozenset({"sse4_1"}),
    "avx": frozenset({"avx"}),
    "avx2": frozenset({"avx2"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
    "avx512_vnni": frozenset({"avx512f", "avx512_vnni"}),
    "avx512_bf16": frozenset({"avx512f", "avx512_bf16"}),
    "avx512_fp16": frozenset({"avx512f", "avx512_fp16"}),
    "amx_bf16": frozenset({"amx_tile", "amx_bf16"}),
}
_ARM_LEVELS: dict[str, frozenset[str]] = {
    "neon": frozenset({"asimd"}),
    "neon_bf16": frozenset({"asimd", "bf16"}),
    "sve": frozenset({"sve"}),
    "sve_bf16": frozenset({"sve", "bf16"}),
}
_ONEDNN_CAPS = {
    "SSE41": "sse4_1",
    "AVX": "avx",
    "AVX2": "avx2",
    "AVX2_VNNI": "avx2",
    "AVX2_VNNI_2": "avx2",
    "AVX512_CORE": "avx512",
    "AVX512_CORE_VNNI": "avx512_vnni",
    "AVX512_CORE_BF16": "avx512_bf16",
    "AVX512_CORE_FP16": "avx512_fp16",
    "AVX10_1_512": "avx512_fp16",
}
_ATEN_CAPS = {"default": "sse4_1", "avx2": "avx2"}
_ARM_ATEN_CAPS = {"default": "neon"}
_ARM_VENDORS = {
    "0x41": "ARM",
    "0x46": "Fujitsu",
    "0x48": "HiSilicon",
    "0x4e": "NVIDIA",
    "0x51": "Qualcomm",
    "0x61": "Apple",
    "0xc0": "Ampere",
}


@dataclass(frozen=True)
class Capabilities:
    """What the processor offers to this process.

    Attributes:
        architecture: ``"x86_64"``, ``"aarch64"``, …
        vendor: As the processor names it, e.g. ``"AuthenticAMD"``; empty if unknown.
        model: Marketing name; empty if unknown.
        isa: Highest instruction set in use, e.g. ``"avx512_bf16"``; ``"generic"`` if unknown.
        bf16: Whether products of BF16 numbers are done in hardware (AVX512_BF16, AMX, Arm BF16).
        amx: Whether Intel's matrix unit is there for BF16.
        emulated: The environment variables (as ``NAME=value``) that made a newer processor pass
            for this one; empty if none does.
        logical_cores: Hardware threads that this process may run on.
        physical_cores: Cores that this process can keep busy: distinct cores in its affinity mask,
            no more than its cgroup's CPU quota; at least 1.
        quota: CPUs' worth of time that the cgroup grants; None without a limit.
        l1d_bytes, l2_bytes, l3_bytes: Size of one data cache of each level; None if unknown.
    """

    architecture: str
    vendor: str
    model: str
    isa: str
    bf16: bool
    amx: bool
    emulated: tuple[str, ...]
    logical_cores: int
    physical_cores: int
    quota: float | None
    l1d_bytes: int | None
    l2_bytes: int | None
    l3_bytes: int | None


def capabilities() -> Capabilities:
    """Look at the processor, this process's limits and the environment as they are now."""
    vendor, model, flags = _processor()
    architecture = _architecture()
    available, emulated = _usable_levels(architecture, flags, os.environ)
    quota = cgroup_quota()
    logical, cores = _cores()
    if quota is not None:
        cores = min(cores, max(1, int(quota)))
    l1d, l2, l3 = _caches()
    return Capabilities(
        architecture=architecture,
        vendor=vendor,
        model=model,
        isa=available[-1] if available else "generic",
        bf16=any(level.endswith("bf16") for level in available),
        amx="amx_bf16" in available,
        emulated=emulated,
        logical_cores=logical,
        physical_cores=cores,
        quota=quota,
        l1d_bytes=l1d,
        l2_bytes=l2,
        l3_bytes=l3,
    )


def cgroup_quota(proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The tightest CPU limit of this process's cgroup and its parents, in CPUs; None without one.

    Args:
        proc: Where the proc file system is.
        root: Where the cgroup file system (version 1 or 2) is.
    """
    limits = []
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        hierarchy = root / controllers if controllers else root
        if controllers and not hierarchy.is_dir():
            hierarchy = root / "cpu"
        folder = hierarchy / path.lstrip("/")
        # Inside a container the path may be the host's, of which only the root is visible.
        limits += [
            _quota_of(place)
            for place in (folder, *folder.parents)
            if place.is_relative_to(hierarchy)
        ]
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def _quota_of(folder: Path) -> float | None:
    version2 = _read(folder / "cpu.max").split()
    if len(version2) == 2:
        return None if version2[0] == "max" else int(version2[0]) / int(version2[1])
    quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def _usable_levels(
    architecture: str, flags: frozenset[str], environment: Mapping[str, str]
) -> tuple[list[str], tuple[str, ...]]:
    """The levels that are there and not capped, oldest first, and the caps that took some away."""
    levels = _ARM_LEVELS if architecture == "aarch64" else _X86_LEVELS
    available = [level for level, needed in levels.items() if needed <= flags]
    emulated = []
    for setting, cap in _caps(architecture, environment).items():
        names = list(levels)
        kept = [level for level in available if names.index(level) <= names.index(cap)]
        if kept != available:
            available = kept
            emulated.append(setting)
    return available, tuple(emulated)


def _caps(architecture: str, environment: Mapping[str, str]) -> dict[str, str]:
    """``NAME=value`` of each variable that caps the processor, and the highest level it allows."""
    onednn = next(
        (name for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA") if name in environment), ""
    )
    onednn_value = environment.get(onednn, "")
    aten = environment.get("ATEN_CPU_CAPABILITY", "")
    arm = architecture == "aarch64"
    caps = {
        f"{onednn}={onednn_value}": None if arm else _ONEDNN_CAPS.get(onednn_value.upper()),
        f"ATEN_CPU_CAPABILITY={aten}": (_ARM_ATEN_CAPS if arm else _ATEN_CAPS).get(aten),
    }
    return {setting: cap for setting, cap in caps.items() if cap}


def _architecture() -> str:
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


@functools.cache
def _processor() -> tuple[str, str, frozenset[str]]:
    """Vendor, model and flags as /proc/cpuinfo spells them. The processor does not change."""
    if sys.platform == "darwin":
        return _from_sysctl()
    vendor, model, flags = parse_cpuinfo(_read(Path("/proc/cpuinfo")))
    told = _torch_flags()
    return vendor, model or platform.processor(), told or flags


def parse_cpuinfo(text: str) -> tuple[str, str, frozenset[str]]:
    """Vendor, model name and flags of the first processor in the text of ``/proc/cpuinfo``."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    implementer = fields.get("CPU implementer", "")
    vendor = fields.get("vendor_id") or _ARM_VENDORS.get(implementer.lower(), implementer)
    flags = fields.get("flags") or fields.get("Features") or ""
    return vendor, fields.get("model name", ""), frozenset(flags.split())


def _torch_flags() -> frozenset[str]:
    """PyTorch's own detection, in /proc/cpuinfo's spelling; empty where it does not tell."""
    import torch

    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is None:
        return frozenset()
    spelling = {"neon": "asimd", "avx512_f": "avx512f"}
    spelling |= {f"avx512_{name}": f"avx512{name}" for name in ("bw", "dq", "vl", "cd")}
    return frozenset(
        spelling.get(name, name) for name, value in get_capabilities().items() if value is True
    )


def _from_sysctl() -> tuple[str, str, frozenset[str]]:
    # BF16 is left out on Apple's processors: its speed was never measured there, and
    # precision="auto" relies on what is said here.
    try:
        brand = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        brand = ""
    flags = {"asimd"} if _architecture() == "aarch64" else set(_torch_flags())
    vendor = "Apple" if _architecture() == "aarch64" else "GenuineIntel"
    return vendor, brand, frozenset(flags)


def _cores(root: Path = Path("/sys/devices/system/cpu")) -> tuple[int, int]:
    """(hardware threads, distinct cores) that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):
        logical = os.cpu_count() or 1
        return logical, psutil.cpu_count(logical=False) or logical
    threads = os.sched_getaffinity(0)
    cores = {_siblings(root, thread) for thread in threads}
    return len(threads), len(cores)


def _siblings(root: Path, thread: int) -> str:
    # Threads of one core list the same siblings; without a topology every thread counts as a core.
    return _read(root / f"cpu{thread}" / "topology" / "thread_siblings_list") or str(thread)


def _caches(
    root: Path = Path("/sys/devices/system/cpu/cpu0/cache"),
) -> tuple[int | None, int | None, int | None]:
    sizes: dict[str, int] = {}
    for cache in sorted(root.glob("index*")):
        kind = _read(cache / "type").strip()
        size = _read(cache / "size").strip()
        if kind in ("Data", "Unified") and size.endswith("K"):
            sizes[_read(cache / "level").strip()] = int(size[:-1]) * 1024
    return sizes.get("1"), sizes.get("2"), sizes.get("3")


def _read(path: Path) -> str:
    """The text of a file of the kernel; empty where it is missing or may not be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
