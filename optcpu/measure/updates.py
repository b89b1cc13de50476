"""What an optimizer's update takes of time and memory: the reference MLP's 51 million parameters.

Each optimizer has a process of its own, and they take turns. One is ``python -m optcpu.measure.updates NAME
THREADS``: it answers each line that it reads, a number of updates, with a line of JSON.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optcpu.errors import WorkerError
from optcpu.measure.process import same_modules
from optcpu.measure.progress import Reporter
from optcpu.measure.resident import resident_mb
from optcpu.measure.rounds import rotated
from optcpu.memory import hand_back_freed_memory, reuse_memory
from optcpu.models import mlp
from optcpu.optim import AdamW, Lamb
from optcpu.optimize import optimize

STREAM = "in place"
_PEER = "pytorch_optimizer"
_FIRST_UPDATES = 3  # state is made in the first, and memory is fetched


def _adamw(weights: str) -> Callable[[nn.Module], Optimizer]:
    return lambda model: _stored(model, AdamW(model.parameters(), lr=1e-4), weights)


def _lamb(weights: str) -> Callable[[nn.Module], Optimizer]:
    return lambda model: _stored(model, Lamb(model.parameters(), lr=1e-4), weights)


def _stored(model: nn.Module, optimizer: Optimizer, weights: str) -> Optimizer:
    with warnings.catch_warnings():
        # Of products that BF16 would make slow, of which there are none here.
        warnings.simplefilter("ignore")
        optimize(model, optimizer, precision="bf16", weights=weights, state_dtype=torch.bfloat16)
    return optimizer


def _fused_adamw(model: nn.Module) -> Optimizer:
    reuse_memory()
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def _eager_lamb(model: nn.Module) -> Optimizer:
    optimizer: Optimizer = importlib.import_module(_PEER).Lamb(model.parameters(), lr=1e-4)
    return optimizer


@dataclass(frozen=True)
class Candidate:
    """An optimizer to measure.

    Attributes:
        make: gives it the parameters of a model.
        against: the one that its time is compared with.
        peer: whether it comes with a package that may not be there.
    """

    make: Callable[[nn.Module], Optimizer]
    against: str
    peer: bool = False


_FUSED, _EAGER_LAMB = "torch AdamW, fused", "pytorch-optimizer LAMB"
CANDIDATES = {
    _FUSED: Candidate(_fused_adamw, _FUSED),
    "AdamW, FP32 weights": Candidate(_adamw("fp32"), _FUSED),
    "AdamW, split weights": Candidate(_adamw("split"), _FUSED),
    "AdamW, BF16 weights": Candidate(_adamw("bf16"), _FUSED),
    _EAGER_LAMB: Candidate(_eager_lamb, _EAGER_LAMB, peer=True),
    "LAMB, FP32 weights": Candidate(_lamb("fp32"), _EAGER_LAMB),
    "LAMB, split weights": Candidate(_lamb("split"), _EAGER_LAMB),
    "LAMB, BF16 weights": Candidate(_lamb("bf16"), _EAGER_LAMB),
}


@dataclass(frozen=True)
class UpdateCost:
    """What the update of one optimizer takes.

    Attributes:
        name: of :data:`CANDIDATES`.
        ms: median over the rounds.
        against: the optimizer that it is compared with.
        speedup: that one's time by its own, median over the rounds; None if that was not measured.
        moved: bytes a parameter that the update has to read and write; None where nobody counts them.
        of_bandwidth: the rate of those, by what an addition in place reaches in the same rounds.
        resident: bytes a parameter that weights, gradients and state take, as the system counts memory.
    """

    name: str
    ms: float
    against: str
    speedup: float | None
    moved: float | None
    of_bandwidth: float | None
    resident: float

    def to_dict(self) -> dict[str, Any]:
        """All figures, in plain Python types."""
        return asdict(self)


def measure_updates(
    threads: int, *, rounds: int = 5, round_seconds: float = 1.0, progress: bool | None = None
) -> list[UpdateCost]:
    """Measure all of :data:`CANDIDATES` that are here, which takes a minute or two.

    Raises:
        WorkerError: a process failed.
    """
    peer = importlib.util.find_spec(_PEER) is not None
    names = [STREAM, *(n for n, one in CANDIDATES.items() if peer or not one.peer)]
    told: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack, Reporter(progress, len(names) + rounds, "optcpu bench") as reporter:
        processes = {}
        for name in names:
            reporter.phase(name)
            processes[name] = stack.enter_context(_process(name, threads))
            told[name] = _ask(name, processes[name], 1)
        for number in range(rounds):
            reporter.phase(f"round {number + 1}/{rounds}")
            for name in rotated(names, number):
                count = max(1, math.ceil(round_seconds / told[name]["seconds"]))
                seconds[name].append(_ask(name, processes[name], count)["seconds"])
    return [_cost(name, seconds, told) for name in names if name != STREAM]


def _cost(
    name: str, seconds: dict[str, list[float]], told: dict[str, dict[str, Any]]
) -> UpdateCost:
    against, moved, size = CANDIDATES[name].against, told[name]["moved"], told[name]["parameters"]
    bandwidth = [told[STREAM]["moved"] * told[STREAM]["parameters"] / s for s in seconds[STREAM]]
    return UpdateCost(
        name,
        statistics.median(seconds[name]) * 1e3,
        against,
        _ratio(seconds[against], seconds[name]) if against in seconds else None,
        moved,
        None if moved is None else _ratio([moved * size / s for s in seconds[name]], bandwidth),
        told[name]["resident"],
    )


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(above, below, strict=True))


@contextmanager
def _process(name: str, threads: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "optcpu.measure.updates", name, str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **same_modules()},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _ask(name: str, process: subprocess.Popen[str], updates: int) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(f"{updates}\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        assert process.stderr is not None
        end = process.stderr.read().strip().splitlines() or [f"exit status {process.wait()}"]
        raise WorkerError(f"measuring the update of {name} failed: {end[-1]}")
    answer: dict[str, Any] = json.loads(line)
    return answer


class Subject:
    """What one process measures.

    Args:
        name: of :data:`CANDIDATES`, or :data:`STREAM`.
        model: whose parameters are updated.

    Attributes:
        update: makes one update.
        parameters: how many numbers it updates.
        moved: bytes a parameter that it has to read and write; None where nobody counts them.
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        parameters = list(model.parameters())
        self.parameters = sum(parameter.numel() for parameter in parameters)
        self.moved: float | None
        if name == STREAM:
            reuse_memory()
            x = torch.ones(self.parameters)
            self.update: Callable[[], object] = lambda: x.add_(1.0)
            self.moved = 2.0 * x.element_size()
            return
        optimizer = CANDIDATES[name].make(model)
        for parameter in parameters:
            _give_gradient(parameter)
        self.update = optimizer.step
        for _ in range(_FIRST_UPDATES):
            self.update()
        sizes = (p.numel() * b for p in parameters if (b := _moved(optimizer, p)) is not None)
        self.moved = sum(sizes) / self.parameters or None


def _give_gradient(parameter: Tensor) -> None:
    gradient = torch.full(parameter.shape, 1e-2)
    stored = getattr(parameter, "high", None)
    if stored is not None:  # whose gradients come in BF16
        with suppress(RuntimeError):  # of PyTorch 2.8, which takes them from its own graphs alone
            parameter.grad = gradient.bfloat16()
            return
    parameter.grad = gradient


def _moved(optimizer: Optimizer, parameter: Tensor) -> int | None:
    """Bytes that an update moves for each number of ``parameter``: what it reads, and what it writes."""
    if isinstance(optimizer, torch.optim.AdamW):
        state = 2 * 4 if not isinstance(optimizer, AdamW) else 2 * optimizer.state_dtype.itemsize
    elif isinstance(optimizer, Lamb):
        state = 2 * optimizer.state_dtype.itemsize
    else:
        return None
    assert parameter.grad is not None
    weight = _bytes_of(parameter)
    once = 2 * weight + parameter.grad.element_size() + 2 * state
    # Its norms take a pass of their own, over all but the gradient.
    return once + weight + state if isinstance(optimizer, Lamb) else once


def _bytes_of(weight: Tensor) -> int:
    high, low = getattr(weight, "high", weight), getattr(weight, "low", None)
    return int(high.element_size() + (0 if low is None else low.element_size()))


def _serve(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    hand_back_freed_memory()
    before = resident_mb()
    subject = Subject(name, mlp())
    hand_back_freed_memory()
    resident = (resident_mb() - before) * 2**20 / subject.parameters
    told = {"parameters": subject.parameters, "moved": subject.moved, "resident": resident}
    for line in sys.stdin:
        count = int(line)
        subject.update()  # behind the other processes
        started = time.perf_counter()
        for _ in range(count):
            subject.update()
        seconds = (time.perf_counter() - started) / count
        print(json.dumps({**told, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
