"""What every test shares: two threads, a fixed seed, and no compiled code from the test before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Two processes share the cores: a thread that waits must not keep one from the other. PyTorch's threads
# read this once, when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

from passes import gemm

hypothesis.settings.register_profile("optcpu", deadline=None)  # machines are noisy
hypothesis.settings.load_profile("optcpu")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty memory of choices of kernels, in the process and on disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for memory in (gemm._choices, gemm._adopted):
        memory.cache_clear()
    yield tmp_path
    for memory in (gemm._choices, gemm._adopted):
        memory.cache_clear()
