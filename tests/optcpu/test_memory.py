"""What is freed is used again: without page faults, and in hardly more memory than is in use."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optcpu.memory import hand_back_freed_memory, serve_large_tensors

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="mallopt belongs to glibc, huge pages to Linux"
)

POLICIES = """
import resource, sys, torch
from optcpu.memory import keep_freed_memory, serve_large_tensors
if "keep" in sys.argv:
    assert keep_freed_memory()
if "serve" in sys.argv:
    assert serve_large_tensors()
def usage():
    return resource.getrusage(resource.RUSAGE_SELF)
"""

PROBE = (
    POLICIES
    + """
def use():
    torch.zeros(8 * 2**20)  # 32 MiB: 8192 pages
# Each aligned allocation leaves a sliver at its end, which glibc keeps in a per-thread cache of seven
# a size; until that is full the slivers stand between the freed blocks and the heap's growth.
for _ in range(32):
    use()
before = usage().ru_minflt
for _ in range(4):
    use()
print(usage().ru_minflt - before)
"""
)


def printed(script: str, *policies: str, environment: Mapping[str, str] | None = None) -> int:
    command = [sys.executable, "-c", script, *policies]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **(environment or {})},
    )
    if "not enough memory" in done.stderr or "can't allocate" in done.stderr:
        pytest.skip("this machine does not give enough memory")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
def test_freed_memory_stays() -> None:
    assert printed(PROBE) > 4 * 8000
    assert printed(PROBE, "keep") < 100
    assert printed(PROBE, "serve") < 100


HEAP = (
    POLICIES
    + """
import ctypes
sbrk = ctypes.CDLL("libc.so.6").sbrk
sbrk.restype = ctypes.c_void_p
given_back = 0
for _ in range(32):  # as often, for the same reason
    block = torch.empty(3 * 2**30, dtype=torch.uint8)  # never touched: it takes no memory
    end = sbrk(0)
    del block
    given_back += end - sbrk(0)
print(given_back)
"""
)


def test_however_much_is_freed_stays() -> None:
    """glibc's threshold is an int: the largest one is 2 GiB, less than a large model's activations."""
    assert printed(HEAP, "keep") == 0


STEPS = (
    POLICIES
    + """
kept = []
def fill(mib):
    kept.append(torch.zeros(2))  # what a program keeps of each step, between the large tensors
    return torch.ones(mib * 2**18)
def step():
    activations = [fill(mib) for mib in (40, 10, 30, 20)]
    gradients = []
    while activations:
        gradients.append(fill(15))
        activations.pop()
step()
before = usage().ru_maxrss
for _ in range(20):
    step()
print((usage().ru_maxrss - before) // 1024)
"""
)


def test_steps_that_repeat_need_no_more_memory_than_the_first() -> None:
    assert printed(STEPS, "keep", "serve") <= 15  # of 145 MiB in use


FREED = (
    POLICIES
    + """
from optcpu.measure.resident import resident_mb
from optcpu.memory import hand_back_freed_memory
kept, freed = [], []
for _ in range(32):
    kept.append(torch.ones(2**18))
    freed.append(torch.ones(2**20))
full = resident_mb()
del freed[1:]  # pieces of 4 MiB, with others in between
hand_back_freed_memory()
assert all(bool((tensor == 1).all()) for tensor in kept + freed)
print(int(full - resident_mb()))
"""
)


@pytest.mark.slow
def test_freed_memory_can_be_handed_back() -> None:
    assert printed(FREED, "serve") > 100
    assert printed(FREED, "keep") > 100
    assert printed(FREED, "keep", "serve") > 100


@pytest.mark.slow
def test_without_a_compiler_the_heap_serves_all() -> None:
    script = "from optcpu.memory import *; reuse_memory(); print(int(serve_large_tensors()))"
    nowhere = {"CXX": "/nonexistent/compiler"}
    assert printed(script, environment=nowhere) == 0
    assert printed(script) == 1


FORKED = (
    POLICIES
    + """
import os
torch.set_num_threads(1)  # a pool of threads does not survive a fork
mine = torch.ones(2**19)
child = os.fork()
if child == 0:
    others = torch.zeros(2**19)
    mine += 1
    os._exit(int(mine.sum() + others.sum() != 2 * 2**19))
theirs = torch.full((2**19,), 3.0)
_, status = os.waitpid(child, 0)
assert float(mine.sum() + theirs.sum()) == 4 * 2**19
print(status)
"""
)


def test_a_forked_process_has_memory_of_its_own() -> None:
    assert printed(FORKED, "keep", "serve") == 0


def touched(size: int, mark: int) -> torch.Tensor:
    return torch.full((size,), mark % 251, dtype=torch.uint8)


SIZES = st.one_of(st.integers(0, 5), st.integers(2**20 - 3, 2**20 + 3), st.integers(2**20, 2**23))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(SIZES, st.integers(0, 3)), max_size=25))
def test_tensors_never_overlap(steps: list[tuple[int, int]]) -> None:
    """Each keeps what was written to it while others come and go, and begins at a line of the caches."""
    assert serve_large_tensors()
    held: dict[int, torch.Tensor] = {}
    for mark, (size, frees) in enumerate(steps):
        held[mark] = touched(size, mark)
        assert held[mark].data_ptr() % 64 == 0
        for old in list(held)[: 2 * frees : 2]:
            del held[old]
        if mark % 3 == 2:
            hand_back_freed_memory()
        for other, tensor in held.items():
            assert bool((tensor == other % 251).all())


def test_threads_share_the_range() -> None:
    assert serve_large_tensors()
    wrong: list[torch.Tensor] = []

    def work(seed: int) -> None:
        sizes = torch.randint(2**20, 2**22, (200,), generator=torch.Generator().manual_seed(seed))
        held: list[torch.Tensor] = []
        for size in sizes.tolist():
            held = [*held[-3:], touched(size, seed)]
            wrong.extend(tensor for tensor in held if not bool((tensor == seed).all()))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_storage_grows_out_of_the_heap_and_back() -> None:
    """A tensor that was made before, or small, goes on with the memory it is given next."""
    assert serve_large_tensors()
    tensor = torch.arange(16)
    for size in (2**18, 16, 2**20):
        tensor.untyped_storage().resize_(8 * size)
        tensor = tensor.as_strided((size,), (1,))
        assert torch.equal(tensor[:16], torch.arange(16))


def test_what_no_memory_can_hold_is_the_usual_error() -> None:
    assert serve_large_tensors()
    with pytest.raises(RuntimeError, match=r"can't allocate memory|not enough memory"):
        torch.empty(2**50)
