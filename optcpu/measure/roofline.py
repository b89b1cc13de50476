"""What this machine can do at best: matrix products, streaming, fresh memory. The roofline's roof.

The roofline model (Williams, Waterman and Patterson 2009, doi 10.1145/1498765.1498785) bounds a program
by the processor's arithmetic and by its memory. A training step has a part for each: the matrix
products, which are bound by arithmetic, and the update of the weights, which is bound by memory.

``python -m optcpu.measure.roofline THREADS`` prints the limits as JSON, measured in that process.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from optcpu.cpu import capabilities
from optcpu.errors import WorkerError
from optcpu.measure.process import same_modules
from passes import gemm

# Rows, and width of a square weight: large enough that no overhead counts, and of both shapes in
# which libraries differ.
_GEMM_SHAPES = ((1024, 2048), (512, 4096))
_STREAMED_BYTES = 2**28  # several times the last cache
_FRESH_BYTES = 2**27
_SECONDS_EACH = 0.4
_AT_LEAST = 3
_LIMIT_S = 300


@dataclass(frozen=True)
class Limits:
    """What this machine reached at best.

    Attributes:
        threads: computed with.
        gemm: floating-point operations per second by data type (``"fp32"``, and ``"bf16"`` where the
            processor has it) and by library: ``"aten"`` is ``torch.mm``, ``"onednn"`` its linear layer
            on packed weights.
        bandwidth: bytes per second, read and written, of an update in place.
        first_touch: bytes per second of writing to memory that the system has just given, in pages of
            the usual size; None where the system has no ``madvise``.
        first_touch_huge: the same in huge pages.
    """

    threads: int
    gemm: dict[str, dict[str, float]]
    bandwidth: float
    first_touch: float | None
    first_touch_huge: float | None

    def to_dict(self) -> dict[str, Any]:
        """All figures, in plain Python types."""
        return asdict(self)

    def fastest_library(self, dtype: str) -> str:
        """That with the highest rate of matrix products of ``dtype``."""
        rates = self.gemm[dtype]
        return max(rates, key=lambda library: rates[library])

    def peak(self, dtype: str) -> float:
        """Floating-point operations per second in matrix products of ``dtype``."""
        return self.gemm[dtype][self.fastest_library(dtype)]

    def merged(self, other: Limits) -> Limits:
        """The better figure of two measurements: what disturbs can only make them worse."""
        return Limits(
            self.threads,
            {
                dtype: {
                    library: max(rate, other.gemm[dtype][library])
                    for library, rate in rates.items()
                }
                for dtype, rates in self.gemm.items()
            },
            max(self.bandwidth, other.bandwidth),
            _better(self.first_touch, other.first_touch),
            _better(self.first_touch_huge, other.first_touch_huge),
        )


def _better(one: float | None, other: float | None) -> float | None:
    return max((rate for rate in (one, other) if rate is not None), default=None)


def measure_limits(threads: int) -> Limits:
    """Measure in a process of its own, which takes a few seconds.

    Raises:
        WorkerError: that process failed.
    """
    ended = subprocess.run(
        [sys.executable, "-m", "optcpu.measure.roofline", str(threads)],
        capture_output=True,
        text=True,
        env={**os.environ, **same_modules()},
        timeout=_LIMIT_S,
    )
    if ended.returncode != 0:
        end = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
        raise WorkerError(f"measuring the limits of this machine failed: {end}")
    return Limits(**json.loads(ended.stdout))


def limits_here(threads: int) -> Limits:
    """Measure in this process, with ``threads`` threads from now on."""
    torch.set_num_threads(threads)
    dtypes = {"fp32": torch.float32}
    if capabilities().bf16:
        dtypes["bf16"] = torch.bfloat16
    return Limits(
        threads,
        {name: dict(_gemm_rates(dtype)) for name, dtype in dtypes.items()},
        _bandwidth(),
        _first_touch("MADV_NOHUGEPAGE"),
        _first_touch("MADV_HUGEPAGE"),
    )


def _gemm_rates(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    libraries = {"aten": _aten, "onednn": _onednn}
    if "onednn-packed" not in gemm.kernels(dtype):
        del libraries["onednn"]
    if "own" in gemm.kernels(dtype):
        libraries["optcpu"] = _own
    for library, product in libraries.items():
        rates = []
        for rows, width in _GEMM_SHAPES:
            x, weight = torch.randn(rows, width).to(dtype), torch.randn(width, width).to(dtype)
            rates.append(2 * rows * width * width / _seconds(product(x, weight)))
        yield library, max(rates)


def _aten(x: Tensor, weight: Tensor) -> Callable[[], object]:
    result = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    return lambda: torch.mm(x, weight.t(), out=result)


def _onednn(x: Tensor, weight: Tensor) -> Callable[[], object]:
    packed = gemm.packed_for(x, weight)
    linear = torch.ops.mkldnn._linear_pointwise
    return lambda: linear(x, packed, None, *gemm.NO_POST_OP)


def _own(x: Tensor, weight: Tensor) -> Callable[[], object]:
    return lambda: gemm.kernels(x.dtype)["own"](x, weight.t())


def _bandwidth() -> float:
    x = torch.ones(_STREAMED_BYTES // 4)
    return 2 * _STREAMED_BYTES / _seconds(lambda: x.mul_(1.0))


def _first_touch(advice: str) -> float | None:
    """Of fresh pages of the kind that ``advice``, a name in :mod:`mmap`, asks for."""
    if not hasattr(mmap, advice):
        return None
    best = 0.0
    for _ in range(_AT_LEAST):
        with mmap.mmap(-1, _FRESH_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
            try:
                pages.madvise(getattr(mmap, advice))
            except OSError:  # a kernel without huge pages
                return None
            x = torch.frombuffer(pages, dtype=torch.float32)
            start = time.perf_counter()
            x.fill_(1.0)
            best = max(best, _FRESH_BYTES / (time.perf_counter() - start))
            del x  # or the pages could not be given back
    return best


def _seconds(run: Callable[[], object]) -> float:
    """The shortest of several calls."""
    run()
    times: list[float] = []
    end = time.perf_counter() + _SECONDS_EACH
    while len(times) < _AT_LEAST or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    with torch.no_grad():
        print(json.dumps(limits_here(int(sys.argv[1])).to_dict()))
