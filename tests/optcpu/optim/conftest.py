"""Both ways to compute an update, and small models to make one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optcpu.optim import native


@pytest.fixture(params=["kernel", "python"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every update by the C++ kernel, then by its counterpart in PyTorch."""
    if request.param == "python":
        monkeypatch.setattr(native, "library_or_none", lambda: None)
    elif native.library_or_none() is None:
        pytest.skip("the kernel cannot be built here")
    return str(request.param)


SHAPES = [(3000,), (70, 33), (5,), (1,), (4, 3, 3, 3), (2, 0), ()]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    """Parameters of all kinds of shapes, one of them channels-last."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    tensors.append(
        torch.randn(8, 6, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    )
    return [nn.Parameter(tensor) for tensor in tensors]


def twins(seed: int = 0) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The same parameters twice."""
    ours = parameters(seed)
    return ours, [nn.Parameter(p.detach().clone()) for p in ours]


def give_gradients(*lists: list[nn.Parameter], seed: int) -> None:
    """The same random gradients for the parameters of each list."""
    generator = torch.Generator().manual_seed(seed)
    for same in zip(*lists, strict=True):
        gradient = torch.randn(same[0].shape, generator=generator)
        for parameter in same:
            parameter.grad = torch.empty_like(parameter).copy_(gradient)


def assert_equal(
    ours: list[nn.Parameter], theirs: list[nn.Parameter], *, tolerance: float = 2e-6
) -> None:
    """Equal within ``tolerance`` of one and of the largest number of each tensor."""
    for one, other in zip(ours, theirs, strict=True):
        largest = float(other.detach().abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(
            one.detach(), other.detach(), rtol=0, atol=tolerance * (largest + 1)
        )
