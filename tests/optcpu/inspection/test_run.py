"""Every inspection shows everything, however often the same model was compiled before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from optcpu.inspect import inspect

TWICE = """
import torch, optcpu
from torch import nn

model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
x = torch.randn(8, 16)
trained = optcpu.optimize(nn.Sequential(*model))
trained(x).sum().backward()
for codegen in (True, False):
    inspection = optcpu.inspect(model, x, precision="fp32", codegen=codegen)
    print(len(inspection.graphs), {name: n for name, n in inspection.counts().items() if n})
"""


@pytest.mark.slow
def test_nothing_comes_from_a_cache_of_this_process_or_another(tmp_path: Path) -> None:
    told: list[str] = []
    settings = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "2",
        # These outrank every setting in the process: the caches cannot be switched off.
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
    }
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", TWICE], env=settings, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        told += run.stdout.splitlines()
    assert len(told) == 4
    assert set(told) == {told[0]}
    assert told[0].startswith("3 {")
    assert "'fuse-linear-backward': 2" in told[0]


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(y)


def test_many_inspections_of_a_broken_model_show_as_much_as_the_first() -> None:
    """They share compiled code in PyTorch 2.8, which gives up after eight times."""
    x = torch.randn(2, 4)
    sizes = [len(inspect(Broken(), x, train=False).regions) for _ in range(10)]
    assert sizes == [2] * 10
