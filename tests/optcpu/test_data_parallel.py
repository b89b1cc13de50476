"""PyTorch's own DistributedDataParallel around optimized models, and within them."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import optcpu
from optcpu.compiled_call import compiled_call
from optcpu.errors import OptcpuError
from optcpu.optim.weights import StoredWeight


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """This process alone."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def without_the_warning_of_emulation() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this processor has no BF16")
        yield


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x, target = (
            torch.randn(8, 12, generator=generator),
            torch.randint(5, (8,), generator=generator),
        )
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("options", [{"precision": "fp32"}, {"precision": "bf16"}])
def test_around_an_optimized_model(process_group: None, options: dict[str, Any]) -> None:
    """One process has the bits that it has without; the gradients are FP32, though."""
    results = []
    for wrap in (False, True):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optcpu.optimize(model, optimizer, **options)
        called = DistributedDataParallel(model) if wrap else model
        results.append((train(called, optimizer), bits_of(model)))
        call = compiled_call(model)
        assert call is not None
        assert call.record.fallbacks == []
        stored = [p for p in model.parameters() if isinstance(p, StoredWeight)]
        assert len(stored) == (2 if options["precision"] == "bf16" else 0)
    assert results[1][0] == results[0][0]
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0, atol=0)


def test_a_gradient_from_before_is_added_to(process_group: None) -> None:
    gradients = []
    for wrap in (False, True):
        model = make_model()
        optcpu.optimize(model, torch.optim.SGD(model.parameters(), lr=0.1), precision="bf16")
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
        model(x).square().sum().backward()
        (DistributedDataParallel(model) if wrap else model)(x).square().sum().backward()
        gradients.append([p.grad.float() for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.01, atol=0.01)


def test_within_an_optimized_model(process_group: None) -> None:
    """What it wraps is compiled; restored, it is as before."""
    plain, inner = make_model(), make_model()
    wrapped = DistributedDataParallel(inner)
    assert optcpu.optimize(wrapped, precision="fp32") is wrapped
    assert compiled_call(inner) is not None
    assert optcpu.optimize(wrapped, precision="fp32") is wrapped, "a second time"
    x = torch.randn(8, 12)
    for model in (wrapped, plain):
        model(x).square().sum().backward()
    for one, other in zip(inner.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    call = compiled_call(inner)
    assert call is not None
    assert call.backend.parts_run == 1
    assert call.record.fallbacks == []
    assert optcpu.inspect(wrapped, x).model == "Sequential"
    assert optcpu.restore(wrapped) is wrapped
    assert compiled_call(inner) is None


def test_weights_of_a_wrapped_model_stay_plain(process_group: None) -> None:
    wrapped = DistributedDataParallel(make_model())
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    with pytest.warns(
        UserWarning, match=r"2 weights stay FP32 .* before the model is run or wrapp"
    ):
        optcpu.optimize(wrapped, optimizer, precision="bf16")
    losses = train(wrapped, optimizer, 30)
    assert sum(losses[-5:]) < sum(losses[:5])


SCRIPT = """
import sys
from contextlib import nullcontext
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
import optcpu

torch.set_num_threads(1)
distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.manual_seed(rank)  # the first one's weights count
model = nn.Sequential(nn.Linear(64, 600), nn.ReLU(), nn.Linear(600, 600), nn.GELU(), nn.Linear(600, 5))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
if sys.argv[2] != "plain":
    optcpu.optimize(model, optimizer, precision="bf16", layout=sys.argv[2], state_dtype=torch.float32)
wrapped = DistributedDataParallel(model)
generator = torch.Generator().manual_seed(1)
losses = []
for step in range(8):
    x = torch.randn(2, 32, 64, generator=generator)
    target = torch.randint(5, (2, 32), generator=generator)
    mine = slice(16 * rank, 16 * rank + 16)
    for micro, context in enumerate((wrapped.no_sync, nullcontext)):
        with context(), torch.autocast("cpu", torch.bfloat16, enabled=sys.argv[2] == "plain"):
            loss = F.cross_entropy(wrapped(x[micro, mine]), target[micro, mine]) / 2
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
torch.save((losses, model.state_dict()), f"{sys.argv[1]}-{rank}.pt")
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_as_plain_ones_do(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    runs = {}
    for layout in ("plain", "none", "native"):
        done = subprocess.run(
            [*torchrun, str(script), str(tmp_path / layout), layout],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert "not compiled" not in done.stderr
        both = [torch.load(tmp_path / f"{layout}-{rank}.pt") for rank in range(2)]
        torch.testing.assert_close(both[0][1], both[1][1], rtol=0, atol=0)
        runs[layout] = both
    for layout in ("none", "native"):
        for rank in range(2):
            assert runs[layout][rank][0] == pytest.approx(runs["plain"][rank][0], rel=0.02)


def test_updates_before_the_average_are_refused(process_group: None) -> None:
    model = make_model()
    optimizer = optcpu.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = optcpu.optimize(model, optimizer, precision="fp32")
    optimizer.update_in_backward()
    wrapped = DistributedDataParallel(model)
    with pytest.raises(OptcpuError, match=r"before DistributedDataParallel .*update_in_step"):
        train(wrapped, optimizer, steps=1)
    optimizer.update_in_step()
    train(wrapped, optimizer, steps=1)
