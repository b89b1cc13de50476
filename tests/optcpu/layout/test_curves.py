"""Whole runs under each layout learn as fast as without packed weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import optcpu
from optcpu.layout import ipex, native
from passes import gemm, packed
from tests.families import BY_NAME, loss_of

STEPS, ACCUMULATION = 300, 2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native.why_impossible() is not None, reason=str(native.why_impossible())),
]
needs_ipex = pytest.mark.skipif(ipex.why_impossible() is not None, reason="needs IPEX")


def curve(family: str, layout: str) -> torch.Tensor:
    torch.manual_seed(1)
    model = BY_NAME[family].build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optcpu.optimize(model, optimizer, precision="bf16", layout=layout)
    torch.manual_seed(2)
    batches = [BY_NAME[family].inputs(BY_NAME[family].batch) for _ in range(4)]
    losses = []
    for step in range(STEPS):
        for micro in range(ACCUMULATION):
            args, kwargs = batches[(step + micro) % len(batches)]
            loss = loss_of(model(*args, **kwargs))
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    standing = {kept.standing()[0] for kept in packed._KEPT.values()}
    assert (layout in standing) == (layout != "none")  # embeddings are plain
    return torch.tensor(losses)


@pytest.mark.parametrize("family", ["mlp", "gpt2-block"])
@pytest.mark.parametrize("layout", ["native", pytest.param("ipex", marks=needs_ipex)])
def test_300_steps_follow_the_curve_without(
    family: str, layout: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Nothing is too small to be packed, and it always pays, and what was compiled without that is not used.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(gemm._SMALL, torch.bfloat16, 0)
    monkeypatch.setattr(packed._Kept, "pays_from", lambda *_: 2)
    monkeypatch.setattr(packed, "_KEPT", {})
    expected, ours = curve(family, "none"), curve(family, layout)
    fallen = float(expected[:4].mean() - expected[-4:].mean())
    assert fallen > 0
    assert float((ours - expected).abs().mean()) <= 0.02 * fallen
    assert float((ours[-20:] - expected[-20:]).abs().mean()) <= 0.03 * fallen
