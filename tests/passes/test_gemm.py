"""The choice of a kernel changes the speed of a product, never its value, and is remembered."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes import gemm


def oriented(rows: int, columns: int, dtype: torch.dtype, transposed: bool) -> torch.Tensor:
    if transposed:
        return torch.randn(columns, rows).to(dtype).t()
    return torch.randn(rows, columns).to(dtype)


@settings(max_examples=40)
@given(
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70)),
    transposed=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_kernel_computes_the_product(
    sizes: tuple[int, int, int], transposed: tuple[bool, bool], dtype: torch.dtype
) -> None:
    m, k, n = sizes
    a, b = oriented(m, k, dtype, transposed[0]), oriented(k, n, dtype, transposed[1])
    expected = a.double() @ b.double()
    tolerance = (2e-2 if dtype == torch.bfloat16 else 1e-5) * k**0.5
    for kernel in gemm.kernels(dtype).values():
        result = kernel(a, b)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=1e-2, atol=tolerance)


def test_small_products_are_not_measured(own_cache: Path) -> None:
    gemm.matmul(torch.randn(8, 8), torch.randn(8, 8))
    assert gemm._choices() == {}


def test_a_choice_is_measured_once_and_read_by_later_processes(own_cache: Path) -> None:
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    assert gemm.fastest(a, b) in gemm.kernels(torch.float32)
    stored = json.loads(gemm.cache_file().read_text())
    assert list(stored) == ["256x256x256 nn float32 2"]

    other = next(
        name for name in gemm.kernels(torch.float32) if name != stored["256x256x256 nn float32 2"]
    )
    gemm.cache_file().write_text(json.dumps({"256x256x256 nn float32 2": other}))
    gemm._choices.cache_clear()  # as a new process begins
    assert gemm.fastest(a, b) == other


@pytest.mark.parametrize(
    ("sizes", "bytes_each", "expected"),
    [
        ((128, 4608, 4608), 4, (128, 4608, 4608)),  # quick enough as it is
        ((256, 768, 50257), 4, (256, 768, 12561)),
        ((256, 768, 50257), 2, (256, 768, 25121)),
        ((50257, 256, 768), 4, (12561, 256, 768)),
        ((256, 50257, 768), 4, (256, 12561, 768)),
        ((8192, 8192, 8192), 4, (1024, 2048, 2048)),
        ((2**20, 64, 64), 4, (2**20, 64, 64)),  # half takes less work than can be told apart
    ],
)
def test_long_products_are_measured_on_a_part(
    sizes: tuple[int, int, int], bytes_each: int, expected: tuple[int, int, int]
) -> None:
    assert gemm.sample_sizes(*sizes, bytes_each) == expected


@settings(max_examples=200)
@given(st.tuples(*[st.integers(1, 2**18)] * 3), st.sampled_from([2, 4]))
def test_a_part_takes_as_much_memory_as_caches_do_and_ends_like_the_whole(
    sizes: tuple[int, int, int], bytes_each: int
) -> None:
    m, k, n = part = gemm.sample_sizes(*sizes, bytes_each)
    if part != sizes:
        assert m * k * n > 2**30
        assert all(0 < size <= whole for size, whole in zip(part, sizes, strict=True))
        assert [size % 16 for size in part] == [size % 16 for size in sizes]


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)])
def test_the_part_lies_in_memory_as_the_whole_does(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, transposed: tuple[bool, bool]
) -> None:
    seen = []

    def measure(runs: dict[str, Callable[[], torch.Tensor]], preferred: str) -> str:
        seen.extend(run() for run in runs.values())
        return preferred

    monkeypatch.setattr(gemm, "_ENOUGH_WORK", 2**21)
    monkeypatch.setattr(gemm, "_BEYOND_CACHES", 2**10)
    monkeypatch.setattr(gemm, "measure", measure)
    a, b = (
        oriented(rows, columns, torch.float32, t)
        for rows, columns, t in zip((300, 250), (250, 203), transposed, strict=True)
    )
    assert gemm.fastest(a, b) == "aten"
    m, k, n = gemm.sample_sizes(300, 250, 203, 4)
    assert m * k * n < 300 * 250 * 203
    assert len(seen) == len(gemm.kernels(torch.float32))
    for product in seen:
        torch.testing.assert_close(product, a[:m, :k] @ b[:k, :n], rtol=1e-4, atol=1e-4)
    corner = gemm._corner(a, m, k)
    assert gemm._order(corner) == gemm._order(a)
    assert corner.numel() * 4 <= corner.untyped_storage().nbytes() == m * k * 4


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"256x256x256 nn float32 2": "no such kernel"}']
)
def test_a_damaged_file_is_measured_anew(own_cache: Path, content: str) -> None:
    gemm.cache_file().parent.mkdir(parents=True)
    gemm.cache_file().write_text(content)
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    assert gemm.fastest(a, b) in gemm.kernels(torch.float32)


def test_a_cache_that_cannot_be_written_does_no_harm(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_cache / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache / "file"))
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    torch.testing.assert_close(gemm.matmul(a, b), a @ b, rtol=1e-4, atol=1e-3)


def test_a_run_that_fails_is_never_chosen() -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("could not create a primitive")

    runs = {"broken": broken, "sound": lambda: torch.zeros(1)}
    assert gemm.measure(runs, preferred="broken") == "sound"


def test_the_shortest_time_counts_and_a_tie_goes_to_the_preferred(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, calls = 0.0, {"fast": 0, "tied": 0, "slow": 0}
    # Each has a turn in which the machine was busy.
    times = {
        "fast": [0.005, 0.001, 0.001],
        "tied": [0.00104, 0.009, 0.009],
        "slow": [0.003, 0.003, 0.003],
    }

    def run(name: str) -> Callable[[], torch.Tensor]:
        def work() -> torch.Tensor:
            nonlocal now
            now += times[name][max(0, min(calls[name] - 1, 2))]  # the first call warms up
            calls[name] += 1
            return torch.zeros(1)

        return work

    monkeypatch.setattr(gemm.time, "perf_counter", lambda: now)
    runs = {name: run(name) for name in times}
    assert gemm.measure(runs, preferred="tied") == "tied"
    assert gemm.measure(runs, preferred="slow") == "fast"


def clocked(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], first: float = 1.0
) -> tuple[dict[str, Callable[[], torch.Tensor]], list[str]]:
    """Runs that take so long by a clock of their own, and the names of those that were called.

    The first of each takes ``first`` times as long: it touches new memory.
    """
    now = 0.0
    called: list[str] = []

    def run(name: str) -> Callable[[], torch.Tensor]:
        def work() -> torch.Tensor:
            nonlocal now
            now += seconds[name] * (1.0 if name in called else first)
            called.append(name)
            return torch.zeros(1)

        return work

    monkeypatch.setattr(gemm.time, "perf_counter", lambda: now)
    return {name: run(name) for name in seconds}, called


def test_long_runs_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, called = clocked(monkeypatch, {"good": 0.2, "best": 0.18, "hopeless": 0.5}, first=1.3)
    assert gemm.measure(runs, preferred="good") == "best"
    assert {name: called.count(name) for name in runs} == {"good": 3, "best": 3, "hopeless": 2}


def test_a_clear_winner_ends_the_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """But where the times themselves are asked for, they are taken until the time is over."""
    runs, called = clocked(monkeypatch, {"best": 0.0021, "beaten": 0.0031})
    assert gemm.measure(runs, preferred="beaten") == "best"
    assert called == ["best", "beaten"] * 7  # the first to warm up, then for 30 ms
    called.clear()
    assert gemm.times(runs) == pytest.approx({"best": 0.0021, "beaten": 0.0031})
    assert called == ["best", "beaten"] * 31


def by_call(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, Callable[[int], float]]
) -> dict[str, Callable[[], torch.Tensor]]:
    """Runs that take what ``seconds`` says of their first, second, ... call, by a clock of their own."""
    now = 0.0

    def run(name: str) -> Callable[[], torch.Tensor]:
        calls = itertools.count(1)

        def work() -> torch.Tensor:
            nonlocal now
            now += seconds[name](next(calls))
            return torch.zeros(1)

        return work

    monkeypatch.setattr(gemm.time, "perf_counter", lambda: now)
    return {name: run(name) for name in seconds}


def test_a_busy_moment_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program has the processor whenever the faster one runs, at first."""
    times = {"hit": lambda call: 0.004 if call <= 5 else 0.001, "spared": lambda call: 0.0015}
    assert gemm.measure(by_call(monkeypatch, times), preferred="spared") == "hit"


def test_a_long_first_run_is_not_held_against_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"built": lambda call: 0.22 if call == 1 else 0.02, "steady": lambda call: 0.09}
    assert gemm.measure(by_call(monkeypatch, times), preferred="steady") == "built"


def test_a_result_is_not_written_where_the_one_before_lies() -> None:
    """That would still be in a cache, which in training it is not."""
    addresses: dict[str, list[int]] = {"one": [], "other": []}

    def run(name: str) -> torch.Tensor:
        result = torch.ones(2**18)
        addresses[name].append(result.data_ptr())
        return result

    gemm.times({name: functools.partial(run, name) for name in addresses}, hopeless=math.inf)
    in_turn = [address for pair in zip(*addresses.values(), strict=True) for address in pair]
    assert all(len(set(in_turn[i : i + 5])) == 5 for i in range(len(in_turn) - 4))


def test_sizes_that_are_close_share_a_measurement() -> None:
    keys = [gemm.shape_key(torch.empty(m, 64), torch.empty(64, 4608)) for m in (900, 1000, 1030)]
    assert len(set(keys)) == 2  # 1024 is a step
    aligned = [gemm.shape_key(torch.empty(8, 64), torch.empty(64, n)) for n in (45, 46, 48)]
    assert aligned[0] == aligned[1] != aligned[2]
    assert gemm._bucket(1) == 1
    assert all(size <= gemm._bucket(size) <= 1.25 * size for size in range(1, 5000))


def test_processes_add_to_each_others_choices(own_cache: Path) -> None:
    gemm._save({"mine": "aten"})
    gemm._save({"theirs": "onednn"})
    assert json.loads(gemm.cache_file().read_text()) == {"mine": "aten", "theirs": "onednn"}


def test_choices_of_another_process_come_first_and_stay_in_this_one(own_cache: Path) -> None:
    one, two = {"one": lambda: torch.ones(1)}, {"two": lambda: torch.ones(1)}
    assert gemm.choose("work", one, "one") == "one"
    gemm.adopt({"work": "two", "other work": "one", "strange": "unheard of"})
    assert gemm.choose("work", one | two, "one") == "two"
    assert gemm.choose("other work", one | two, "two") == "one"
    assert gemm.choose("strange", two, "two") == "two", "a kernel that is not here is no choice"
    assert gemm.choices()["work"] == "two"
    assert json.loads(gemm.cache_file().read_text()) == {"work": "one", "strange": "two"}
