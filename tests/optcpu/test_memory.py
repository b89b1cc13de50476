"""The allocator's policy, seen from outside: freed memory is used again without page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import resource, sys, torch
from optcpu.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    torch.zeros(8 * 2**20)  # 32 MiB: 8192 pages
# Each aligned allocation leaves a sliver at its end, which glibc keeps in a per-thread cache of seven
# a size; until that is full the slivers stand between the freed blocks and the heap's growth.
for _ in range(32):
    use()
before = faults()
for _ in range(4):
    use()
print(faults() - before)
"""


def page_faults(policy: str) -> int:
    command = [sys.executable, "-c", PROBE, policy]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt belongs to glibc")
def test_freed_memory_stays() -> None:
    assert page_faults("default") > 4 * 8000
    assert page_faults("keep") < 100


HEAP = """
import ctypes, torch
from optcpu.memory import keep_freed_memory
sbrk = ctypes.CDLL("libc.so.6").sbrk
sbrk.restype = ctypes.c_void_p
assert keep_freed_memory()
given_back = 0
for _ in range(32):  # as often, for the same reason
    block = torch.empty(3 * 2**30, dtype=torch.uint8)  # never touched: it takes no memory
    end = sbrk(0)
    del block
    given_back += end - sbrk(0)
print(given_back)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt belongs to glibc")
def test_however_much_is_freed_stays() -> None:
    """glibc's threshold is an int: the largest one is 2 GiB, less than a large model's activations."""
    done = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True)
    if "not enough memory" in done.stderr or "can't allocate" in done.stderr:
        pytest.skip("this machine does not give 3 GiB")
    assert int(done.stdout) == 0
