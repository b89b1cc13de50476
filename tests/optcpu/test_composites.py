"""Kernels that an extension registers for composite operators cost no gradients."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import optcpu
from optcpu import composites
from optcpu.compiled_call import compiled_call
from optcpu.layout import ipex


def with_group_norm() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.GroupNorm(3, 12), nn.Linear(12, 4))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    torch.manual_seed(1)
    model(torch.randn(5, 8)).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture
def group_norm_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As Intel's extension does it; a graph of before, from a cache, would not show it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def kernel(
        x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, _cudnn: bool
    ) -> Tensor:
        samples, channels, *sizes = x.shape
        elements = torch.Size(sizes).numel()
        return torch.native_group_norm(x, weight, bias, samples, channels, elements, groups, eps)[0]

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("group_norm", kernel, "CPU")
        yield
    operator = torch.ops.aten.group_norm.default
    operator.py_kernels.clear()
    operator._dispatch_cache.clear()


def test_pytorch_itself_replaces_nothing() -> None:
    if ipex.MODULE in sys.modules:
        pytest.skip("another test has imported Intel's extension, which does")
    assert composites._replaced() == []


@pytest.mark.usefixtures("group_norm_replaced")
def test_what_is_replaced_is_found() -> None:
    assert torch.ops.aten.group_norm.default in composites._replaced()


@pytest.mark.parametrize("codegen", [pytest.param(True, marks=pytest.mark.slow), False])
def test_no_gradient_is_lost(codegen: bool, request: pytest.FixtureRequest) -> None:
    expected = gradients(with_group_norm())
    request.getfixturevalue("group_norm_replaced")
    model = optcpu.optimize(with_group_norm(), precision="fp32", fallback=False)
    call = compiled_call(model)
    assert call is not None
    call.backend.codegen = codegen
    ours = gradients(model)
    assert None not in ours.values()
    torch.testing.assert_close(ours, expected)
