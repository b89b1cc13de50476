"""Generated code calls fused operators through sites, where sizes are fixed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import optcpu
from optcpu.compiled_call import compiled_call
from passes.call_sites import CallSite


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators of the sites that are called."""
    names: list[str] = []
    call = CallSite.__call__

    def noting(site: CallSite, *arguments: Any) -> Any:
        names.append(site._operator._opname)
        return call(site, *arguments)

    monkeypatch.setattr(CallSite, "__call__", noting)
    return names


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))


@pytest.mark.parametrize("dynamic", [False, True])
def test_sites_are_called_where_sizes_are_fixed(called: list[str], dynamic: bool) -> None:
    model = _model()
    eager = copy.deepcopy(model)
    optcpu.optimize(model, precision="fp32", fallback=False, dynamic=dynamic)
    x = torch.randn(192, 256)
    for _ in range(2):
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
    expected = eager(x)
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-3)
    present = compiled_call(model)
    assert present is not None
    assert not present.record.fallbacks
    assert bool(called) != dynamic
    assert dynamic or {"linear", "mm"} <= set(called)


def test_blocks_that_share_their_code_share_their_sites(called: list[str]) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 2, 512, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    eager = copy.deepcopy(model)
    optcpu.optimize(model, precision="fp32", fallback=False)
    x = torch.randn(4, 64, 128)
    output = model(x)
    output.square().mean().backward()
    expected = eager(x)
    expected.square().mean().backward()
    assert called
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)
