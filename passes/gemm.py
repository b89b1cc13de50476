"""Matrix products by the fastest kernel that this machine has for their shape.

PyTorch on CPU carries two GEMM libraries: MKL (``aten.mm`` in FP32) and oneDNN
(``mkldnn._linear_pointwise``, and ``aten.mm`` in BF16), and oneDNN is faster still on a weight that was
reordered into its blocked layout first. For processors that multiply BF16 in vector registers there is a
kernel of this library's own (:mod:`passes.native`). Which one wins depends on the processor, the shape,
the dtype and the number of threads; so the first product of every kind is measured and the choice
remembered, in the process and in a file that later processes read.
"""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from passes import cache, native

# What oneDNN applies to the product before it is stored: (activation, its scalars, its algorithm).
PostOp: TypeAlias = tuple[str, list[float], str]
NO_POST_OP: PostOp = ("none", [], "")

Kernel: TypeAlias = Callable[[Tensor, Tensor], Tensor]
# Ways to do the same work on two matrices, by the kernel that multiplies them.
RunsOf: TypeAlias = Callable[[Tensor, Tensor], Mapping[str, Callable[[], object]]]

# A product with fewer multiply-adds a thread takes microseconds whatever computes it. In BF16 the
# libraries differ less (both are oneDNN), so that a call of our own pays later.
_SMALL = {torch.float32: 2**21, torch.bfloat16: 2**24}
_LEAST_ROUNDS, _LEAST_ROUNDS_OF_LONG, _MOST_ROUNDS = 3, 2, 30
_HOPELESS = 2.0  # times slower than the fastest: not worth another round
_BEATEN = 1.3  # times slower than the fastest: not worth another round where only the fastest is asked for
_TIE = 1.05  # times this close to each other count as equal
_SECONDS_PER_PRODUCT = 0.25
_BUSY_SECONDS = (
    0.03  # for which another program may have the processor: longer than several short runs
)
# What a step computes goes to memory that was freed a while ago, and not to that of the run before.
_KEPT_RESULTS, _MOST_BYTES_KEPT = 4, 2**26
_VECTOR = 16  # FP32 numbers in the longest vector register
# A product is measured on a part of it that takes at least so many multiply-adds and bytes.
_ENOUGH_WORK, _BEYOND_CACHES = 2**32, 2**25


def _aten(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b)


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, *NO_POST_OP)
    return result


def _onednn_packed(a: Tensor, b: Tensor) -> Tensor:
    weight = packed_for(a, b.t())
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, weight, None, *NO_POST_OP)
    return result


def _own(a: Tensor, b: Tensor) -> Tensor:
    return native.matmul(a, b)


def packed_for(x: Tensor, weight: Tensor) -> Tensor:
    """``weight``, shape (N, K), in oneDNN's blocked layout for ``x @ weight.T``."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    return packed


@functools.cache
def onednn_available() -> bool:
    """Whether this build of PyTorch can run oneDNN's fused linear operator."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def kernels(dtype: torch.dtype) -> dict[str, Kernel]:
    """The kernels to choose from for products of ``dtype``, by name."""
    if not onednn_available():
        return {"aten": _aten}
    # Without AVX512 oneDNN has no fused linear operator in BF16.
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return {"aten": _aten}
    found: dict[str, Kernel] = {"aten": _aten, "onednn": _onednn, "onednn-packed": _onednn_packed}
    if dtype == torch.bfloat16 and native.matmul_available():
        found["own"] = _own
    return found


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` by the fastest kernel for this shape.

    Args:
        a: shape (M, K), FP32 or BF16; any strides.
        b: shape (K, N), same dtype; any strides.

    Returns:
        Shape (M, N), same dtype, row-major.
    """
    return kernels(a.dtype)[fastest(a, b)](a, b)


def fastest(a: Tensor, b: Tensor, following: str = "", runs: RunsOf | None = None) -> str:
    """The name of the fastest kernel for ``a @ b``; small products are not worth a search.

    A tie is won by the library's own kernel, whose bits do not depend on the number of threads, and where
    there is none by ``"aten"``.

    Args:
        a: shape (M, K), FP32 or BF16; any strides.
        b: shape (K, N), same dtype; any strides.
        following: names what a kernel does with the product besides; ``""`` for nothing.
        runs: gives a way to do all of it with each kernel, for smaller matrices in place of these.
    """
    available = kernels(a.dtype)
    if len(available) == 1 or is_small(a.shape[0] * b.numel(), a.dtype):
        return "aten"
    key = f"{shape_key(a, b)} {following}" if following else shape_key(a, b)
    if (known := _known(key)) in available:
        return known
    return remembered(
        key, lambda: _measured(a, b, runs or _products), lambda known: known in available
    )


def _products(a: Tensor, b: Tensor) -> dict[str, Callable[[], object]]:
    return {name: functools.partial(kernel, a, b) for name, kernel in kernels(a.dtype).items()}


def _measured(a: Tensor, b: Tensor, runs_of: RunsOf) -> str:
    """The fastest kernel, found on a part of ``a @ b`` where the whole takes long."""
    m, k, n = sample_sizes(a.shape[0], b.shape[0], b.shape[1], a.element_size())
    a, b = _corner(a, m, k), _corner(b, k, n)
    runs = runs_of(a, b)
    return measure(runs, "own" if "own" in runs else "aten")


def sample_sizes(m: int, k: int, n: int, bytes_each: int) -> tuple[int, int, int]:
    """Sizes of a product that takes less time, on which the kernels compare as on one of (m, k, n).

    The longest is halved as long as there is work enough and the matrices fit no cache.
    """
    while m * k * n > _ENOUGH_WORK:
        longest = max(m, k, n)
        half = longest // 2 // _VECTOR * _VECTOR + longest % _VECTOR  # whole vectors stay whole
        if m == longest:
            smaller = half, k, n
        elif k == longest:
            smaller = m, half, n
        else:
            smaller = m, k, half
        if _numbers(*smaller) * bytes_each < _BEYOND_CACHES <= _numbers(m, k, n) * bytes_each:
            break
        m, k, n = smaller
    return m, k, n


def _numbers(m: int, k: int, n: int) -> int:
    return m * k + k * n + m * n


def _corner(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The first numbers of ``matrix``, as dense and in the same order as it."""
    if matrix.shape == (rows, columns):
        return matrix
    part = matrix[:rows, :columns]
    return part.contiguous() if _order(matrix) == "n" else part.t().contiguous().t()


def is_small(multiply_adds: int, dtype: torch.dtype) -> bool:
    """Whether a product is done before the choice of its kernel could matter."""
    return multiply_adds < _SMALL[dtype] * torch.get_num_threads()


def shape_key(a: Tensor, b: Tensor) -> str:
    """What the time of ``a @ b`` depends on: sizes (about), orders, dtype and threads."""
    (m, k), n = a.shape, b.shape[1]
    return _key(m, k, n, _order(a) + _order(b), a.dtype, torch.get_num_threads())


def _bucket(size: int) -> int:
    """Sizes that differ by less than a quarter share what was measured for one of them.

    Otherwise text of varying length would be measured all over again at every length.
    """
    step = 1 << max(size.bit_length() - 3, 0)
    return -(-size // step) * step


def _about(size: int) -> str:
    """The bucket; sizes that fill no whole vectors have their own, as other kernels win there."""
    return f"{_bucket(size)}{'~' if size % _VECTOR else ''}"


@functools.lru_cache(maxsize=4096)  # to write it anew would cost as much as a small product
def _key(m: int, k: int, n: int, orders: str, dtype: torch.dtype, threads: int) -> str:
    return f"{_about(m)}x{_about(k)}x{_about(n)} {orders} {str(dtype)[6:]} {threads}"


def _order(matrix: Tensor) -> str:
    return "n" if matrix.stride(1) == 1 else "t"


def choose(key: str, runs: Mapping[str, Callable[[], object]], preferred: str) -> str:
    """The name of the fastest of ``runs``: remembered under ``key``, or measured and remembered.

    Args:
        key: names the work; all processes on this machine share what was found for it.
        runs: ways to do the work, by name; one that raises ``RuntimeError`` is never chosen.
        preferred: wins a tie.
    """
    return remembered(key, lambda: measure(runs, preferred), lambda known: known in runs)


def remembered(key: str, find: Callable[[], str], is_valid: Callable[[str], bool]) -> str:
    """What is remembered under ``key`` and valid, or what ``find`` finds and is remembered then."""
    known = _known(key)
    if known is not None and is_valid(known):
        return known
    found = find()
    _choices()[key] = found
    _save(_choices())
    return found


def measure(runs: Mapping[str, Callable[[], object]], preferred: str) -> str:
    """The name of the fastest of ``runs``, found by running them in turn until the others are beaten."""
    shortest = times(runs, _BEATEN)
    if shortest.get(preferred, math.inf) <= _TIE * min(shortest.values()):
        return preferred
    return min(shortest, key=lambda name: shortest[name])


def times(
    runs: Mapping[str, Callable[[], object]], hopeless: float = _HOPELESS
) -> dict[str, float]:
    """The shortest time of each of ``runs`` in seconds, but of those that cannot be done.

    One that is ``hopeless`` times slower than the fastest is left out after a few rounds, and when only the
    fastest is left its time is known well enough. Not before ``_BUSY_SECONDS`` are over, though: else short
    runs would be judged by a moment in which the machine was busy, and remembered so.

    What else the machine does meanwhile only adds time, and hits all alike when they take turns: so the
    shortest time of each counts. Long runs are few: building a kernel and touching new memory, which only
    the first one does, counts for little in them.
    """
    results: deque[object] = deque(maxlen=_KEPT_RESULTS)
    first = {name: _seconds(run, results) for name, run in runs.items()}
    shortest = {name: seconds for name, seconds in first.items() if seconds is not None}
    long = sum(shortest.values()) > _SECONDS_PER_PRODUCT
    least_rounds = _LEAST_ROUNDS_OF_LONG if long else _LEAST_ROUNDS
    rounds_for_all = 1 if long else _LEAST_ROUNDS
    started = time.perf_counter()
    passed = 0.0
    for turn in range(_MOST_ROUNDS):
        all_run = turn < rounds_for_all or passed < _BUSY_SECONDS
        for name in shortest:
            if all_run or shortest[name] <= hopeless * min(shortest.values()):
                shortest[name] = min(shortest[name], _seconds(runs[name], results) or math.inf)
        left = [name for name in shortest if shortest[name] <= hopeless * min(shortest.values())]
        passed = time.perf_counter() - started
        is_clear = len(left) == 1 and passed >= _BUSY_SECONDS
        if turn + 1 >= least_rounds and (is_clear or passed > _SECONDS_PER_PRODUCT):
            break
    return shortest


def _seconds(run: Callable[[], object], results: deque[object]) -> float | None:
    """What a run takes; None where the work cannot be done this way.

    A result that a cache could hold stays among the last ``results``, so that its memory is not used again.
    """
    begin = time.perf_counter()
    try:
        result = run()
    except RuntimeError:
        return None
    seconds = time.perf_counter() - begin
    tensors = result if isinstance(result, tuple) else (result,)
    if sum(one.nbytes for one in tensors if isinstance(one, Tensor)) <= _MOST_BYTES_KEPT:
        results.append(result)
    return seconds


def choices() -> dict[str, str]:
    """The kernels that this process computes with, by what they compute."""
    return _choices() | _adopted()


def adopt(choices: Mapping[str, str]) -> None:
    """Compute in this process with the kernels in ``choices``, as :func:`choices` gave them.

    Two kernels round differently: a run that goes on in another process has the same bits only if it
    goes on with the same kernels. They are not remembered for other runs: the machine may be another.
    """
    global _adoptions
    _adoptions += 1
    _adopted().update(choices)


_adoptions = 0


def adoptions() -> int:
    """How often :func:`adopt` has been called: in between, a choice that was made stays as it is."""
    return _adoptions


def _known(key: str) -> str | None:
    return _adopted().get(key) or _choices().get(key)


@functools.cache
def _adopted() -> dict[str, str]:
    """Chosen elsewhere; comes before what was measured here."""
    return {}


def cache_file() -> Path:
    """Where choices are remembered: one file for each machine type and version of PyTorch."""
    return cache.folder() / f"gemm6-{cache.machine()}.json"


@functools.cache
def _choices() -> dict[str, str]:
    """What is known so far; filled from the file once, then kept in step with it."""
    return _stored()


def _stored() -> dict[str, str]:
    try:
        known = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {k: v for k, v in known.items() if isinstance(k, str) and isinstance(v, str)}


def _save(choices: dict[str, str]) -> None:
    """Write atomically; where the directory cannot be written, later processes measure again."""
    target = cache_file()
    choices = _stored() | choices  # other processes write there, too
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=target.parent, suffix=".tmp", delete=False, encoding="utf-8"
        ) as file:
            json.dump(choices, file, indent=0, sort_keys=True)
        os.replace(file.name, target)
    except OSError:
        return
