"""What every test shares: two threads, a fixed seed, and no compiled code from the test before."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Two processes share the cores: a thread that waits must not keep one from the other. PyTorch's threads
# read this once, when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("optcpu", deadline=None)  # machines are noisy
hypothesis.settings.load_profile("optcpu")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
