"""Where what was built and found out for this machine is kept from one process to the next."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch


def folder() -> Path:
    """The user's cache directory for this project; it need not exist, or be writable."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(Path.home(), ".cache")
    return Path(home) / "optcpu"


def machine() -> str:
    """A name, fit for files, for this machine type, version of PyTorch and limit set to oneDNN."""
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    name = f"{torch.backends.cpu.get_cpu_capability()}-{_processor()}-{torch.__version__}-{isa}"
    return "".join(c if c.isalnum() or c in ".+-" else "_" for c in name)


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    wanted = ("vendor_id", "cpu family", "model", "stepping", "CPU part")
    found = {
        line.split(":")[0].strip(): line.split(":")[1].strip() for line in lines if ":" in line
    }
    return "-".join(found[name] for name in wanted if name in found)
