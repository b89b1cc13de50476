from __future__ import annotations

import sys

import pytest
import torch

from optcpu.measure.resident import hand_back_freed_memory, peak_mb, reset_peak, resident_mb


def test_a_large_tensor_is_seen() -> None:
    before = resident_mb()
    tensor = torch.ones(64 * 2**18)  # 64 MiB
    assert resident_mb() - before > 40
    assert peak_mb() >= resident_mb() - 1
    del tensor


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux resets the peak")
def test_the_peak_can_be_forgotten() -> None:
    tensor = torch.ones(64 * 2**18)
    peak = peak_mb()
    del tensor
    hand_back_freed_memory()
    if not reset_peak():
        pytest.skip("this container does not allow it")
    assert peak - peak_mb() > 40
