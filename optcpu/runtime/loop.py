"""The loop of a run: steps, validations, checkpoints, until there is a reason to end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from optcpu.compiled_call import compiled_call
from optcpu.errors import OptcpuError, warn
from optcpu.measure.batches import Batch, signature
from optcpu.runtime.checkpoint.folder import CheckpointFolder
from optcpu.runtime.clock import seconds_compiling
from optcpu.runtime.data.loading import Interrupted
from optcpu.runtime.display import Display
from optcpu.runtime.events import tell, tell_the_rest
from optcpu.runtime.finish import Finisher, step_scheduler
from optcpu.runtime.metrics_log import MetricsLog
from optcpu.runtime.monitors import check_results
from optcpu.runtime.options import TrainerOptions
from optcpu.runtime.report import Reporter
from optcpu.runtime.run import Run
from optcpu.runtime.saving import Saver, TrainingDiverged
from optcpu.runtime.schedule_free import evaluation_weights
from optcpu.runtime.signals import StopRequest
from optcpu.runtime.step import (
    MicroBatches,
    StepRunner,
    buffers_of,
    collect,
)
from optcpu.runtime.stopping import is_better
from optcpu.runtime.validation import Metric, validate

_MANY_SHAPES = 4
# After so many steps it is known what one takes; where it waits for data for more than this share of that,
# more processes load them.
_TIMED_STEPS, _LONG_WAIT = 20, 0.05
# Until processes that make steps by themselves meet out of turn to stop; torchrun kills them after 30.
_PATIENCE_S = 15.0
_MOST_DATA_STOPS = 3  # until processes that make steps by themselves have met, and can stop


class _DataStopped(OptcpuError):
    """No data came, since the processes that load them have been told to stop."""


class Loop:
    """Runs a :class:`Run` to its end, or until it is told to stop.

    Each pass looks at the position alone and does the next thing that is due there, so that a run that
    goes on from a checkpoint does what it would have done without the interruption.

    Args:
        run: what is trained.
        options: how.
        runner: makes the steps.
        validation: batches, drawn anew each time; None validates nothing.
        metrics: of validation, besides the loss.
        folder: for checkpoints; None writes none.
        log: for metrics; None writes none.
        display: what the user sees.
        size_of: counts the samples in a batch.
        stop: whether someone wants the run to stop.
        trainer: given to the callbacks.
    """

    def __init__(
        self,
        run: Run,
        options: TrainerOptions,
        runner: StepRunner,
        *,
        validation: Callable[[], Iterable[Batch]] | None,
        metrics: Mapping[str, Metric],
        folder: CheckpointFolder | None,
        log: MetricsLog | None,
        display: Display,
        size_of: Callable[[Batch], int],
        stop: StopRequest,
        trainer: Any,
    ) -> None:
        self._run, self._options, self._runner = run, options, runner
        self._validation, self._metrics = validation, metrics
        self._log, self._display = log, display
        self._size_of, self._trainer = size_of, trainer
        self._stop = stop
        self._before: dict[str, Any] | None = None  # of the step in progress
        self._updating = False
        self.saver = Saver(run, options, runner, folder, display, trainer)
        self._data_stops = 0
        self._has_drawn = False
        self._timed_steps = 0
        self._shapes: set[tuple[tuple[int, ...], ...]] = set()  # of what was compiled
        self._regions = 0  # of the model's code that were compiled, as far as is known
        self._has_compiled()
        reporter = Reporter(
            run, options, display, log, validates=validation is not None, trainer=trainer
        )
        self._finisher = Finisher(run, reporter)

    def go(self) -> str | None:
        """Run to the end.

        Returns:
            What stopped it, as :class:`StopRequest` names it; None where it came to its end.
        """
        with self._stop.listening():
            try:
                return self._go()
            except Exception as error:
                if not self._updating:
                    self.saver.rescue(error, self._before)
                raise

    def _go(self) -> str | None:
        self._finish_last_step()
        while True:
            self._note_what_waits()
            if self._validation_is_due():
                self.validate()
            self.saver.save_if_due(ended=self._ended())
            if self._ended() and not self._validation_is_due():  # else that was interrupted
                self._runner.meet()
                self.saver.refuse_broken_weights()
                self._finisher.end()
                return None
            if self._stops():
                self.saver.save("stopped")
                return self._stop.by or "another process"
            self._go_on()

    def _go_on(self) -> None:
        """Make the next step, or end the epoch; nothing if the data stop since the run is to."""
        started = time.perf_counter()
        try:
            step = self._run.pending or self.draw()
        except _DataStopped:
            return
        waited = time.perf_counter() - started
        # The first in a process start what loads the data.
        self._run.clock.add("data", waited, is_typical=self._has_drawn and step is not None)
        self._has_drawn = True
        if step is None:
            self._end_epoch()
        else:
            self._make(step)

    def _finish_last_step(self) -> None:
        """Do what an error has left to do about the step that a run goes on behind."""
        if self._run.position.untold is not None:
            self.saver.more_has_happened(late=True)  # also where one of them fails again
            tell_the_rest(self._run, self._trainer)
        if self._run.position.unfinished is not None:
            rate = float(self._run.optimizer.param_groups[0]["lr"])
            told = self._run.position.unfinished["told"]
            told.setdefault("lr", rate)  # older checkpoints lack it
            self._finisher.follow(late=True)
            self.saver.more_has_happened(late=True)
        self._finisher.tell()

    def draw(self, *, waits: bool = False) -> MicroBatches | None:
        """The micro-batches of the next step; None at the end of an epoch.

        Args:
            waits: for all of them, also where the run is to stop.

        Raises:
            OptcpuError: the data failed.
            _DataStopped: they did because the run is to stop, and are where they were before.
        """
        run = self._run
        self._before = before = run.data_state()
        run.buffers.keep()
        raw: list[Any] = []
        stopped = False
        try:
            count = self._options.accumulation_steps
            raw = run.feed.take(
                count, before["feed"], lambda: not waits and self._stops_before_a_step()
            )
        except Interrupted:
            stopped = True
        except OptcpuError:
            # A signal to the whole group ends the processes that load the data, too.
            if not self._stop.comes_soon() or self._data_stops == _MOST_DATA_STOPS:
                raise
            stopped = True
        ready, anyone_stopped = run.world.sum_numbers(float(bool(raw)), float(stopped))
        if anyone_stopped:
            self._data_stops += 1
            run.put_back(before)
            raise _DataStopped("the run is to stop, and its data have")
        if ready < run.world.size:  # where one has no data left, the epoch is over for all
            self._before = None
            return None
        alone = self._options.local_steps is not None
        sum_over_all = _itself if alone else run.world.sum_numbers
        return collect(raw, before, self._size_of, sum_over_all, run.feed.repeated)

    def _stops_alone(self) -> bool:
        """Whether the run is to stop, and no other process has to know before this one does."""
        return self._stop.by is not None and self._run.world.size == 1

    def _stops_before_a_step(self) -> bool:
        """Whether the run is to stop, and no process needs a step for that."""
        return self._stop.by is not None and self._runner.has_met

    def _make(self, step: MicroBatches) -> None:
        run, position = self._run, self._run.position
        run.pending = step
        started = time.perf_counter()
        self._runner.begin(step)
        while not step.complete:
            if self._stops_alone():
                return  # the gradient so far goes into the checkpoint
            is_last = step.done + 1 == len(step.batches)
            self._updating = self._options.update_in_backward and is_last
            self._runner.run_micro_batch(step)
        norm = self._runner.gradient_norm(step)
        run.pending = None
        self._updating = step.bad is None
        if step.bad is None:
            self._runner.update(norm)
            position.bad_steps = 0
        else:
            self._leave_out(step)
        position.step += 1
        alone = self._options.local_steps is not None
        samples = int(run.world.sum_numbers(sum(step.sizes))[0]) if alone else step.total
        position.samples += samples
        position.epoch_ended = False
        self._finisher.begin(self._mean_loss(step), norm, samples, made=step.bad is None)
        self._before, self._updating, self.saver.changed = None, False, True
        self._finisher.follow()
        phase = "compile" if self._has_compiled() else "step"
        if phase == "compile" and not self._options.dynamic:
            self._note_shapes(step)
        try:
            self._finisher.tell()
        finally:
            run.clock.add(phase, time.perf_counter() - started)
        if phase == "step":
            self._timed_steps += 1
            if self._timed_steps == _TIMED_STEPS:
                self._shorten_the_wait()

    def _shorten_the_wait(self) -> None:
        """Let more processes load the data, where these hold up training."""
        clock = self._run.clock
        step, data = clock.typical("step") or 0.0, clock.typical("data") or 0.0
        if data > _LONG_WAIT * step:
            self._run.feed.add_workers(step / self._options.accumulation_steps)

    def _note_shapes(self, step: MicroBatches) -> None:
        """Warn once where batches come in so many shapes that compiling each does not pay."""
        before = len(self._shapes)
        self._shapes.update(signature(batch) for batch in step.batches)
        if before < _MANY_SHAPES <= len(self._shapes):
            warn(
                f"the training batches had {len(self._shapes)} different shapes so far, each compiled by "
                f"itself; behind {torch._dynamo.config.recompile_limit} versions PyTorch runs further ones "
                "eagerly. Remedy: dynamic=True, or batches of few shapes (pad them, drop_last=True)"
            )

    def _mean_loss(self, step: MicroBatches) -> float:
        world = self._run.world
        (loss,) = world.sum_numbers(step.loss)
        return loss if self._options.local_steps is None else loss / world.size

    def _leave_out(self, step: MicroBatches) -> None:
        """Do what ``on_nan`` says about a step whose loss or gradient is not finite."""
        run, options, position = self._run, self._options, self._run.position
        self._runner.forget_gradients()
        run.buffers.put_back()
        where = f"in step {position.step + 1}, {step.bad}"
        position.bad_steps += 1
        if options.on_nan == "stop" or position.bad_steps > options.max_bad_steps:
            often = f", the last of {position.bad_steps} bad steps in a row"
            often = often if position.bad_steps > 1 else ""
            raise TrainingDiverged(
                f"training has diverged: {where}{often}. Lower the learning rate, clip with "
                "max_grad_norm, or look at the data; on_nan='skip' or 'rollback' goes on"
            )
        if options.on_nan == "skip":
            self._display.message(f"{where}: the step is skipped")
            return
        checkpoint = self.saver.last_regular()
        if not run.has_groups_of(checkpoint.state):
            raise TrainingDiverged(
                f"training has diverged: {where}, and the weights of step {checkpoint.step} cannot be put "
                "back, since the optimizer had other groups of parameters there: add groups in "
                "on_train_begin, or take on_nan='skip'"
            )
        rates = [group["lr"] for group in run.optimizer.param_groups]
        run.load_weights(checkpoint.state)
        for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # which goes on with the data
        self._display.message(f"{where}: back to the weights of step {checkpoint.step}")

    def _end_epoch(self) -> None:
        run = self._run
        if run.position.epoch_ended:
            raise OptcpuError("the training data are empty: give at least one batch")
        run.position.epoch += 1
        run.position.epoch_ended = True
        self.saver.more_has_happened()
        run.feed.next_epoch()
        tell(run, self._trainer, "on_epoch_end")

    def _finished(self) -> bool:
        options, position = self._options, self._run.position
        if options.steps is not None:
            return position.step >= options.steps
        return position.epoch >= (options.epochs or 0)

    def _ended(self) -> bool:
        return self._finished() or self._run.position.stop_reason is not None

    def _stops(self) -> bool:
        """Whether the run stops here: it is wanted to, and all processes have met, or will not in time."""
        if self._run.world.size == 1:
            return self._stops_alone()
        wanted, is_late = self._run.world.sum_numbers(
            float(self._stop.by is not None), float(self._stop.seconds > _PATIENCE_S)
        )
        if not wanted or self._runner.has_met:
            return wanted > 0
        if is_late:
            self._display.message(
                f"step {self._run.position.step}: the processes meet out of turn, since the run is to stop "
                "at once; where it goes on it will not have the bits of one that was not stopped"
            )
        return is_late > 0

    def _note_what_waits(self) -> None:
        """Note what is due where processes have not met, who do not send their weights for its sake."""
        if self._runner.has_met:
            return
        waits = self._run.position.waits
        due = {"validation": self._is_time_to_validate(), "checkpoint": self.saver.is_time()}
        waits += [what for what, is_due in due.items() if is_due and what not in waits]

    def _is_time_to_validate(self) -> bool:
        every, position = self._options.validate_every, self._run.position
        return position.epoch_ended if every is None else position.step % every == 0

    def _validation_is_due(self) -> bool:
        position = self._run.position
        if self._validation is None or position.step == 0 or position.validated == position.step:
            return False
        is_time = self._is_time_to_validate() or "validation" in position.waits
        return (is_time and self._runner.has_met) or self._finished()

    def validate(self) -> dict[str, float] | None:
        """Validate now, and let early stopping and schedule know; None if interrupted.

        If something fails up to where the results are noted, the validation is made again from its start.
        """
        run, position = self._run, self._run.position
        self._display.phase("validation")
        self._runner.meet()
        run.world.share_from_first(buffers_of(run.model, run.loss).values())
        generators = run.unsaved.generators()
        run.buffers.keep()
        counts = False
        try:
            results = self._evaluate()
            if results is None:
                return None
            check_results(self._options, results)
            if self._log is not None:
                self._log.add("validation", position.step, position.epoch, results)
            if isinstance(run.scheduler, ReduceLROnPlateau):
                step_scheduler(run, results["loss"])
            counts = True
        finally:
            if not counts:
                run.buffers.put_back()
                run.unsaved.set_generators(generators)
        position.validated, position.metrics = position.step, dict(results)
        position.waits = [what for what in position.waits if what != "validation"]
        self.saver.more_has_happened()
        if run.stopper is not None:
            position.stop_reason = run.stopper.reason_to_stop(results)
        self._note_best(results)
        tell(run, self._trainer, "on_validation_end", results)
        return results

    def _evaluate(self) -> dict[str, float] | None:
        """Loss and metrics on the validation data; None if interrupted."""
        run = self._run
        assert self._validation is not None
        started, compiled = time.perf_counter(), seconds_compiling()
        with evaluation_weights(run.optimizer):
            results = validate(
                run.model,
                self._validation(),
                run.loss,
                self._metrics,
                size_of=self._size_of,
                interrupted=lambda: self._stop.by is not None and run.world.size == 1,
            )
        if results is None:
            return None
        # Random numbers and data of their own may differ: what follows from the results must not.
        results = cast(dict[str, float], run.world.gather(results)[0])
        compiled = seconds_compiling() - compiled
        self._has_compiled()  # or the next step would count as one that has
        if compiled > 0:  # the model, or what a metric compiles by itself
            run.clock.add("compile", compiled)
        run.clock.add("validation", time.perf_counter() - started - compiled)
        told = "  ".join(f"{name} {value:.4g}" for name, value in results.items())
        self._display.message(f"step {run.position.step}: validation {told}")
        return results

    def _note_best(self, results: dict[str, float]) -> None:
        options, position = self._options.checkpoints, self._run.position
        if options is None or options.best is None:
            return
        watched = f"{options.mode} {options.best}"
        if position.best_of != watched:
            position.best, position.best_of = None, watched
        if is_better(results[options.best], position.best, options.mode):
            position.best = results[options.best]
            position.improved += 1
            self.saver.found_better = True

    def _has_compiled(self) -> bool:
        """Whether anything was compiled since this was asked before."""
        call = compiled_call(self._run.model)
        regions = 0 if call is None else call.record.regions
        before, self._regions = self._regions, regions
        return regions != before


def _itself(number: float) -> tuple[float, ...]:
    return (number,)
