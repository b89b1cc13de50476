"""Intel's extension is imported only where it fits and is asked for; its products are right."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import optcpu
from optcpu.errors import OptcpuError
from optcpu.layout import ipex, native
from passes import ops

needs_ipex = pytest.mark.skipif(ipex.why_impossible() is not None, reason="needs IPEX")
DTYPES = [torch.float32] + ([torch.bfloat16] if native.why_impossible() is None else [])


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Pretend that an extension for this PyTorch is installed; its module is looked for in a folder."""
    monkeypatch.setattr(importlib.metadata, "version", lambda _: torch.__version__)
    monkeypatch.syspath_prepend(tmp_path)
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name == ipex.MODULE}
    ipex.load.cache_clear()
    yield tmp_path
    sys.modules.pop(ipex.MODULE, None)
    sys.modules.update(hidden)
    ipex.load.cache_clear()


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("raise SystemExit(127)", "SystemExit: 127"),
        ("raise AttributeError('no _C')", "AttributeError: no _C"),
        ("import no_such_thing", "ModuleNotFoundError"),
    ],
)
def test_an_import_that_fails_is_told_with_the_remedy(
    installed: Path, source: str, told: str
) -> None:
    (installed / f"{ipex.MODULE}.py").write_text(source)
    with pytest.raises(OptcpuError, match=rf"layout='ipex' is not possible here.*{told}.*\[ipex\]"):
        optcpu.optimize(nn.Linear(3, 4), layout="ipex")


def test_one_for_another_pytorch_is_not_even_tried(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (installed / f"{ipex.MODULE}.py").write_text("import os; os.abort()")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.13.100")
    with pytest.raises(OptcpuError, match=r"1\.13\.100 is for torch 1\.13, and this is torch 2"):
        optcpu.optimize(nn.Linear(3, 4), layout="ipex")


@pytest.mark.slow
def test_nobody_imports_it_unasked() -> None:
    program = (
        "import sys, torch, optcpu; model = torch.nn.Linear(3, 4); "
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1); "
        "optcpu.optimize(model, optimizer, precision='fp32'); "
        f"print({ipex.MODULE!r} in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]


@needs_ipex
@settings(max_examples=20)
@given(
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70)),
    side=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_packing_keeps_every_bit_and_multiplies_right(
    sizes: tuple[int, int, int], side: bool, dtype: torch.dtype
) -> None:
    rows, outputs, inputs = sizes
    packing, packed = ipex.IpexPacking(), None
    for _ in range(2):  # the second time in the memory of the first
        weight = torch.randn(inputs, outputs).t() if side else torch.randn(outputs, inputs)
        weight = weight.to(dtype)
        packed = packing.pack(weight, rows, packed)
        assert torch.equal(packing.unpack(packed), weight)
        x = torch.randn(rows, inputs).to(dtype)
        result = packing.linear(x, packed, None, "none", None)
        tolerance = (3e-2 if dtype == torch.bfloat16 else 1e-5) * inputs**0.5
        torch.testing.assert_close(
            result.double(), x.double() @ weight.double().t(), rtol=1e-2, atol=tolerance
        )


@needs_ipex
def test_packing_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    ipex.IpexPacking().pack(torch.zeros(33, 21), 9, None)
    assert torch.equal(torch.get_rng_state(), before)


@needs_ipex
@pytest.mark.parametrize("activation", ["none", *ops.ACTIVATIONS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_activation_and_residual_follow(activation: str, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(9, 21).to(dtype), torch.randn(37, 21).to(dtype), torch.randn(37)
    residual = torch.randn(9, 37).to(dtype) if activation == "none" else None
    packing = ipex.IpexPacking()
    result = packing.linear(x, packing.pack(weight, 9, None), bias, activation, residual)
    expected = x.float() @ weight.float().t() + bias
    if residual is not None:
        expected = expected + residual
    assert result.dtype == dtype
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(
        result.float(), ops.activate(expected, activation), rtol=tolerance, atol=tolerance
    )
