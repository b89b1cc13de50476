"""What comes after the update of a step: the scheduler, the freezer, and the news of it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from optcpu.errors import OptcpuError
from optcpu.runtime.freezing.freezer import DynamicFreezer
from optcpu.runtime.report import Reporter
from optcpu.runtime.run import Run
from optcpu.runtime.schedule import Schedule
from optcpu.runtime.step import buffers_of


class Finisher:
    """Finishes steps whose weights are updated.

    What is left to do about the last one stands in ``run.position.unfinished``, and thus in a checkpoint:
    where something of it fails, a run that goes on does that, and what comes after it, once.

    Args:
        run: what is trained.
        reporter: tells of steps.
    """

    def __init__(self, run: Run, reporter: Reporter) -> None:
        self._run, self._reporter = run, reporter

    def begin(self, loss: float, norm: float | None, samples: int, *, made: bool) -> None:
        """Note that a step is to be finished; the arguments are as in :meth:`Reporter.step`."""
        run = self._run
        left = [] if isinstance(run.scheduler, ReduceLROnPlateau) else ["scheduler"]
        left += ["freezer"] if run.freezer is not None and made else []
        rate = float(run.optimizer.param_groups[0]["lr"])  # before the scheduler changes it
        told = {"loss": loss, "lr": rate, "norm": norm, "samples": samples, "made": made}
        run.position.unfinished = {"left": left, "told": told}

    def follow(self, *, late: bool = False) -> None:
        """Let scheduler and freezer follow the last step, as far as they have not.

        Args:
            late: whether that step was made before this run went on from a checkpoint.

        Raises:
            OptcpuError: one of them failed, with its error as the cause; it is as it was before.
        """
        run = self._run
        unfinished = run.position.unfinished
        while unfinished is not None and unfinished["left"]:
            if unfinished["left"][0] == "scheduler":
                if late or not unfinished["told"]["made"]:
                    with _no_warnings():
                        step_scheduler(run)
                else:
                    step_scheduler(run)
            elif run.freezer is not None:
                self._freeze(run.freezer)
            unfinished["left"].pop(0)

    def tell(self) -> None:
        """Tell of the last step, if that was not done, and write what the log still lacks."""
        position = self._run.position
        unfinished, position.unfinished = position.unfinished, None
        if unfinished is not None:
            self._reporter.step(**unfinished["told"])
        self._reporter.log_what_is_due()

    def end(self) -> None:
        """Tell of the end of the run."""
        self._reporter.end()

    def _freeze(self, freezer: DynamicFreezer) -> None:
        run, events = self._run, len(freezer.events)
        before = freezer.state_dict() if freezer.decides else None
        try:
            freezer.step()
        except Exception as error:
            if before is not None:
                freezer.load_state_dict(before)
            raise _failure(run, "freezer", error) from error
        for event in freezer.events[events:]:
            self._reporter.frozen(event)
        if len(freezer.events) > events:  # all go on with the statistics that are saved
            run.world.share_from_first(buffers_of(run.model, run.loss).values())


def step_scheduler(run: Run, *arguments: Any) -> None:
    """A step of the run's scheduler.

    Args:
        run: after an optimizer step.
        arguments: of the scheduler's step.

    Raises:
        OptcpuError: it failed, with its error as the cause. Scheduler and settings of the optimizer are
            what they were before.
    """
    if isinstance(run.scheduler, Schedule):  # ours, in which nothing fails
        run.scheduler.step()
        return
    groups = run.optimizer.param_groups
    state, settings = run.scheduler.state_dict(), [_settings_in(group) for group in groups]
    try:
        run.scheduler.step(*arguments)
    except Exception as error:
        run.scheduler.load_state_dict(state)
        for group, before in zip(groups, settings, strict=True):
            group.update(before)
        raise _failure(run, "scheduler", error) from error


def _settings_in(group: dict[str, Any]) -> dict[str, Any]:
    """Learning rate and all else but the parameters, which a tensor may hold in place."""
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in group.items()
        if name != "params"
    }


def _failure(run: Run, part: str, error: Exception) -> OptcpuError:
    return OptcpuError(
        f"the {part} failed after step {run.position.step}: {type(error).__name__}: {error}. Remedy: mend "
        f"it and train again; with checkpoints, the run goes on with what the {part} has to do there"
    )


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """PyTorch would warn of a scheduler that comes before the optimizer, which made no step then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
