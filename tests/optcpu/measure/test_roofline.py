"""What the machine can do at best is measured, and the better of two figures counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from optcpu.cpu import capabilities
from optcpu.errors import WorkerError
from optcpu.measure import roofline
from optcpu.measure.roofline import Limits, limits_here, measure_limits

LIMITS = Limits(2, {"fp32": {"aten": 200e9, "onednn": 480e9}}, 30e9, 2e9, None)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_GEMM_SHAPES", ((64, 128),))
    monkeypatch.setattr(roofline, "_SECONDS_EACH", 0.0)
    monkeypatch.setattr(roofline, "_STREAMED_BYTES", 2**20)
    monkeypatch.setattr(roofline, "_FRESH_BYTES", 2**20)


@pytest.mark.usefixtures("brief")
def test_every_limit_is_measured() -> None:
    limits = limits_here(threads=1)
    assert limits.threads == torch.get_num_threads() == 1
    assert set(limits.gemm) == ({"fp32", "bf16"} if capabilities().bf16 else {"fp32"})
    assert all(rate > 1e6 for rates in limits.gemm.values() for rate in rates.values())
    assert limits.bandwidth > 1e6
    if limits.first_touch is not None:
        assert limits.first_touch > 1e6


@pytest.mark.usefixtures("brief")
def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline.gemm, "kernels", lambda dtype: {"aten": torch.mm})
    assert set(limits_here(threads=1).gemm["fp32"]) == {"aten"}


@pytest.mark.usefixtures("brief")
@pytest.mark.skipif(
    "own" not in roofline.gemm.kernels(torch.bfloat16), reason="needs AVX512_BF16 and a compiler"
)
def test_the_kernel_of_optcpu_is_measured_too() -> None:
    x, weight = torch.randn(8, 32).bfloat16(), torch.randn(32, 32).bfloat16()
    torch.testing.assert_close(roofline._own(x, weight)(), x @ weight.t())
    assert "optcpu" in dict(roofline._gemm_rates(torch.bfloat16))


def test_both_libraries_compute_the_same_product() -> None:
    if "onednn-packed" not in roofline.gemm.kernels(torch.float32):
        pytest.skip("this build of PyTorch has no oneDNN")
    x, weight = torch.randn(8, 32), torch.randn(32, 32)
    for make in (roofline._aten, roofline._onednn):
        torch.testing.assert_close(make(x, weight)(), x @ weight.t())


def test_the_fastest_library_counts() -> None:
    assert LIMITS.fastest_library("fp32") == "onednn"
    assert LIMITS.peak("fp32") == 480e9


def test_the_better_figures_of_two_measurements() -> None:
    other = Limits(2, {"fp32": {"aten": 210e9, "onednn": 300e9}}, 20e9, 3e9, None)
    better = Limits(2, {"fp32": {"aten": 210e9, "onednn": 480e9}}, 30e9, 3e9, None)
    assert LIMITS.merged(other) == other.merged(LIMITS) == better
    without = dataclasses.replace(LIMITS, first_touch=None)
    assert without.merged(LIMITS).first_touch == 2e9


@pytest.mark.slow
def test_in_a_process_of_its_own() -> None:
    before = torch.get_num_threads()
    limits = measure_limits(threads=1)
    assert limits.threads == 1
    assert torch.get_num_threads() == before
    assert limits.peak("fp32") > 1e9


def test_a_failure_is_told() -> None:
    with pytest.raises(
        WorkerError, match=r"measuring the limits of this machine failed: .*positive"
    ):
        measure_limits(threads=0)
