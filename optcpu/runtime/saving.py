"""When the state of a run is written, and what becomes of it where the run fails."""

from __future__ import annotations

import logging
from typing import Any

from optcpu.errors import OptcpuError
from optcpu.runtime.checkpoint.folder import CheckpointFolder
from optcpu.runtime.checkpoint.format import Checkpoint
from optcpu.runtime.display import Display
from optcpu.runtime.options import TrainerOptions
from optcpu.runtime.run import Run
from optcpu.runtime.step import MicroBatches, StepRunner, not_finite, trained_parameters

logger = logging.getLogger("optcpu.trainer")


class TrainingDiverged(OptcpuError):
    """The loss or the gradient is not finite, and the run is not to go on."""


class Saver:
    """Writes the checkpoints of a run: on time, the best one, when it stops, and after an error.

    Args:
        run: what is trained.
        options: how.
        runner: makes the steps.
        folder: for checkpoints; None writes none.
        display: what the user sees.
        trainer: given to the callbacks.

    Attributes:
        changed: whether anything has, since the last checkpoint was written or loaded.
        found_better: whether the last validation was the best so far.
    """

    def __init__(
        self,
        run: Run,
        options: TrainerOptions,
        runner: StepRunner,
        folder: CheckpointFolder | None,
        display: Display,
        trainer: Any,
    ) -> None:
        self._run, self._options, self._runner = run, options, runner
        self._folder, self._display, self._trainer = folder, display, trainer
        self._saved = run.position.step  # the step of the last checkpoint, written or loaded
        self.changed = False
        self.found_better = False

    def more_has_happened(self, *, late: bool = False) -> None:
        """More has, behind a step, since a checkpoint there may have been written: an epoch has ended, say.

        Where steps may be rolled back it is written again, so that what they are rolled back to does not
        depend on whether the run has been stopped and gone on with in between.

        Args:
            late: it had been left to do by an error, and is in no checkpoint for that alone.
        """
        self.changed = True
        if late or self._options.on_nan == "rollback":
            self._saved = -1

    def save_if_due(self, *, ended: bool) -> None:
        """Write a checkpoint if it is time to, or if the run has ``ended``."""
        if self._folder is None or not self.changed:
            return
        on_time = self._is_regular() and self._run.position.step != self._saved
        if on_time or self.found_better or ended:
            self.save("on time")

    def is_time(self) -> bool:
        """Whether the interval between checkpoints is over; where processes have not met, it waits."""
        every, position = self._options.checkpoint_interval, self._run.position
        return position.epoch_ended if every is None else position.step % every == 0

    def _is_regular(self) -> bool:
        """Whether a run without interruption would write a checkpoint here."""
        is_time = self.is_time() or "checkpoint" in self._run.position.waits
        return is_time and self._runner.has_met

    def save_first(self) -> None:
        """Write a checkpoint to roll back to, where there is none yet."""
        if self._folder is not None and not self._folder.list():
            self.save("first")

    def last_regular(self) -> Checkpoint:
        """The checkpoint that a run without interruption would go back to now."""
        assert self._folder is not None
        # Where a stop has left a newer one, it is not that.
        path = self._folder.path_of(self._run.position.regular_save)
        checkpoint = self._folder.load(path if path.exists() else None)
        assert checkpoint is not None
        return checkpoint

    def save(self, why: str, *, alone: bool = False) -> None:
        """Write a checkpoint now.

        Args:
            why: ``"on time"`` and ``"first"`` are those that a run without interruption has, too.
            alone: without the other processes.

        Raises:
            TrainingDiverged: the weights are not finite.
            OptcpuError: it cannot be written.
        """
        run, position = self._run, self._run.position
        if self._folder is None:
            return
        self._display.phase("checkpoint")
        with run.clock.measure("checkpoint"):
            if not alone:
                self._runner.meet()
            self.refuse_broken_weights()
            if why in ("on time", "first") or self._is_regular():
                position.regular_save = position.step
                position.waits = [what for what in position.waits if what != "checkpoint"]
            state = run.state_dict(alone=alone)
            if run.world.first:
                keep = position.regular_save if self._options.on_nan == "rollback" else None
                path = self._folder.save(state, position.step, self.found_better, keep)
                logger.debug("checkpoint (%s): %s", why, path)
            if not alone:
                run.world.sum_numbers(0.0)  # who looks for the checkpoint from now on finds it
            self._saved, self.changed, self.found_better = position.step, False, False
            if run.world.first:
                for callback in run.callbacks:
                    callback.on_checkpoint(self._trainer, path)

    def refuse_broken_weights(self) -> None:
        """A checkpoint that cannot be trained on must not take the place of one that can.

        Raises:
            TrainingDiverged: the weights are not finite.
        """
        name = not_finite(trained_parameters(self._run.model, self._run.loss))
        if name is not None:
            unsaved = "" if self._folder is None else ", and no checkpoint of them is written"
            raise TrainingDiverged(
                f"after step {self._run.position.step} the weights of {name!r} are not finite"
                f"{unsaved}: lower the learning rate, clip with max_grad_norm, or look at the data"
            )

    def rescue(self, error: Exception, before: dict[str, Any] | None) -> None:
        """Save what is trained so far, as it was before the step that failed.

        Args:
            error: what has failed.
            before: what :meth:`Run.data_state` gave in front of a step in progress; None between steps.
        """
        run = self._run
        if self._folder is None or not run.world.first or not self.changed:
            return
        if run.world.size > 1 and (self._options.local_steps is not None or self._folder.list()):
            return  # what the others know is not here: the newest checkpoint is gone on from exactly
        if before is not None:
            self._runner.forget_gradients()
            run.buffers.put_back()
            run.pending = MicroBatches([], before, 0)  # none of them is used
        try:
            self.save("rescue", alone=True)
        except Exception as problem:  # the first error is the one to tell
            if str(problem) != str(error):  # else it is this one
                logger.warning(
                    "the state of step %s could not be saved: %s", run.position.step, problem
                )
        else:
            self._display.message(
                f"step {run.position.step} is saved; then: {type(error).__name__}"
            )
