"""Whether a freeze pays for the compilation that it costs, in the steps that remain."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from statistics import median

from torch import nn

from optcpu.runtime.freezing.blocks import Blocks
from optcpu.runtime.freezing.effects import compile_seconds_so_far, is_compiled

_RECENT = 100


@dataclass(frozen=True)
class Payback:
    """What a freeze is expected to cost and to save.

    Attributes:
        compile_seconds: once.
        step_seconds: of a step as it is now.
        saved: fraction of the step that goes, from 0 to 1.
        steps: that remain.
    """

    compile_seconds: float
    step_seconds: float
    saved: float
    steps: int

    @property
    def seconds(self) -> float:
        """What is gained in all; negative if the compilation costs more."""
        return self.steps * self.step_seconds * self.saved - self.compile_seconds

    def __str__(self) -> str:
        return (
            f"{self.steps} steps of {1e3 * self.step_seconds:.3g} ms remain, {self.saved:.1%} of each "
            f"would be saved: {self.steps * self.step_seconds * self.saved:.3g} s, for "
            f"{self.compile_seconds:.3g} s of compiling"
        )


def share_saved(blocks: Blocks, frozen: int, count: int) -> float:
    """The fraction of a step that goes when ``count`` blocks are frozen instead of ``frozen``.

    Two thirds of the newly frozen share where the backward pass ends behind them, one third where it
    goes on, for a tied embedding say; see :meth:`Blocks.step_work`.
    """
    now = blocks.step_work(frozen)
    return 1 - blocks.step_work(count) / now if now else 0.0


class Costs:
    """What a step and a compilation take, as given or measured.

    Args:
        model: as it is called; one that is not compiled costs nothing to compile anew.
        blocks: the model's.
        step_seconds: of a step with nothing frozen; None for the median of the recent steps.
        compile_seconds: of a compilation; None for what PyTorch spent on it since the last change, or,
            if that is nothing, in this process so far.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        step_seconds: float | None,
        compile_seconds: float | None,
    ) -> None:
        self._model, self._blocks = model, blocks
        self._given_step, self._given_compile = step_seconds, compile_seconds
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.restart()

    def restart(self) -> None:
        """From now on steps take another time."""
        self._recent.clear()
        self._last = time.perf_counter()
        self._compiled_before = compile_seconds_so_far()

    def tick(self, steps: int) -> None:
        """``steps`` optimizer steps have been made since the last call."""
        now = time.perf_counter()
        self._recent.append((now - self._last) / steps)
        self._last = now

    def step_seconds(self, frozen: int) -> float:
        """Of a step as it is now, with ``frozen`` blocks frozen."""
        if self._given_step is None:
            return median(self._recent) if self._recent else 0.0
        work = self._blocks.step_work(0)
        return self._given_step * (self._blocks.step_work(frozen) / work if work else 1.0)

    def compile_seconds(self) -> float:
        """Of the compilation that a freeze causes."""
        if self._given_compile is not None:
            return self._given_compile
        if not is_compiled(self._model):
            return 0.0
        total = compile_seconds_so_far()
        since = total - self._compiled_before
        return since if since > 0 else total  # torch._dynamo.reset() begins to count anew
