from __future__ import annotations

import mmap
import sys

import pytest

from optcpu.measure.resident import peak_mb, reset_peak, resident_mb

SIZE = 64 * 2**20


def used_memory() -> mmap.mmap:
    """64 MiB that were written to, straight from the system: allocators may have some to reuse."""
    memory = mmap.mmap(-1, SIZE)
    memory.write(b"1" * SIZE)
    return memory


def test_what_is_used_is_seen() -> None:
    before = resident_mb()
    with used_memory():
        assert resident_mb() - before > 40
        assert peak_mb() >= resident_mb() - 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux resets the peak")
def test_the_peak_can_be_forgotten() -> None:
    with used_memory():
        peak = peak_mb()
    if not reset_peak():
        pytest.skip("this container does not allow it")
    assert peak - peak_mb() > 40
