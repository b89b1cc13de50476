"""Checks of PyTorch and of what can be installed beside it."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import subprocess
import sys

from optcpu.doctor.finding import Finding
from optcpu.layout import ipex, native

TESTED_TORCH = ("2.8", "2.13")
_TIMEOUT_SECONDS = 180


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
        package=ipex.PACKAGE,
        module=ipex.MODULE,
        absent="not installed; optional (archived, needs torch 2.8)",
        remedy="pip install torch==2.8.0 intel-extension-for-pytorch==2.8.0, or uninstall it",
    )


def check_layouts() -> Finding:
    """Which layouts of weights are possible here, and what do the others need?"""
    missing = native.why_impossible()
    problem = ipex.why_impossible() or _why_import_fails(ipex.MODULE)
    if missing is not None:
        return Finding("weight layouts", "note", f"possible: none; not native, nor ipex: {missing}")
    if problem is not None:
        return Finding("weight layouts", "ok", f"possible: native, none; not ipex: {problem}")
    return Finding("weight layouts", "ok", "possible: native, ipex, none")


def check_zentorch() -> Finding:
    """Does AMD's extension, where installed, fit this PyTorch?"""
    return _extension(
        "zentorch",
        package="zentorch",
        module="zentorch",
        absent="not installed; optional, only compared with",
        remedy="install the release that names your torch version, or uninstall it",
    )


def _extension(name: str, *, package: str, module: str, absent: str, remedy: str) -> Finding:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "note", absent)
    problem = _why_import_fails(module)
    if problem is None:
        return Finding(name, "ok", f"{version} can be imported")
    return Finding(name, "warning", f"{version} is installed but {problem}", remedy)


@functools.cache
def _why_import_fails(module: str) -> str | None:
    """None if it succeeds, tried in a process of its own: it can end in any exception or a crash."""
    tried = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
    )
    if tried.returncode == 0:
        return None
    lines = tried.stderr.strip().splitlines() or [f"status {tried.returncode}"]
    return f"its import fails: {lines[-1]}"


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
