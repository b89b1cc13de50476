"""``Trainer``: the training loop around the compiled graph."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from optcpu.errors import OptcpuError
from optcpu.measure.batches import Batch, Loss, default_loss
from optcpu.runtime.build import (
    check_data_settings,
    check_epochs,
    check_functions,
    check_model,
    checked_callbacks,
    compile_model,
    make_freezer,
    make_scheduler,
    threads_for,
    warn_if_it_ends_before_a_freeze,
)
from optcpu.runtime.callbacks import Callback
from optcpu.runtime.checkpoint.folder import CheckpointFolder
from optcpu.runtime.data.loaders import evaluation_batches
from optcpu.runtime.data.loading import Feed
from optcpu.runtime.data.sources import parts_of, warn_if_not_exact
from optcpu.runtime.display import Display
from optcpu.runtime.freezing.freezer import DynamicFreezer
from optcpu.runtime.loop import Loop
from optcpu.runtime.modes import modes_kept
from optcpu.runtime.monitors import check_monitors
from optcpu.runtime.objective import is_own
from optcpu.runtime.optimizers import (
    check_local_steps,
    check_optimizer,
    load_state,
    make_optimizer,
    optimizer_settings,
    own_state_dtype,
)
from optcpu.runtime.options import OptimizerOptions, ScheduleOptions, TrainerOptions
from optcpu.runtime.placement import settle
from optcpu.runtime.plan import Plan
from optcpu.runtime.reading import read_options
from optcpu.runtime.report import open_log
from optcpu.runtime.resuming import checkpoint_to_go_on_from
from optcpu.runtime.run import Run
from optcpu.runtime.schedule_free import evaluation_weights, to_training_weights
from optcpu.runtime.settings import Settings
from optcpu.runtime.signals import StopRequest
from optcpu.runtime.step import StepRunner, buffers_of, samples_in, trained_parameters
from optcpu.runtime.stopping import Stopper
from optcpu.runtime.unsaved import Unsaved
from optcpu.runtime.updates import updates_in_backward
from optcpu.runtime.validation import Metric, check_metrics, validate
from optcpu.runtime.world import World
from passes.base import Pass, Rewrite


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        steps: optimizer steps made, over all sessions of the run.
        epochs: epochs ended.
        samples: that went into those steps.
        metrics: of the last validation.
        best: the best value of ``checkpoints.best``; None if nothing is watched.
        stopped_by: a signal's name, or ``"stop()"``; None where the run came to its end.
        stop_reason: why it ended before its time, in words; None where it did not.
        seconds: spent in steps, in waiting for data, compiling, validation and checkpoints, over all
            sessions.
    """

    steps: int
    epochs: int
    samples: int
    metrics: dict[str, float]
    best: float | None
    stopped_by: str | None
    stop_reason: str | None
    seconds: dict[str, float]


class Trainer:
    """Trains a model: ``Trainer(model, loader, epochs=5, accumulation_steps=8).train()``.

    The model is compiled by :func:`optcpu.optimize`, with its optimizer. A run that writes checkpoints
    and is interrupted, killed or loses power goes on from the newest one when the same program is
    started again, and ends with the same bits as one that was not.

    All modules are put into training mode when :meth:`train` begins. What shall be in evaluation mode to
    the end of it, such as the batch norm of a backbone that is frozen, is put into that by a callback's
    ``on_train_begin``: ``trainer.model.backbone.eval()``.

    Args:
        model: any module with FP32 parameters on the CPU.
        train_data: a ``DataLoader``, a dataset (which is shuffled, and cut into micro-batches of
            ``batch_size``), or any iterable of batches that can be gone through anew each epoch;
            :mod:`optcpu.measure.batches` says what a batch may be. Of several processes under torchrun
            each takes its part of a dataset; an ``IterableDataset``, a ``DataLoader`` or an iterable has
            to give each its part itself.
        loss: ``loss(output, batch)``, the mean over the batch; None takes the one that belongs to the
            output (:func:`optcpu.measure.batches.default_loss`). The parameters of one that is a module
            are trained and saved like those of the model.
        validation_data: as ``train_data``; not shuffled.
        metrics: of validation: names of :data:`optcpu.runtime.validation.BUILT_IN`, or a mapping of
            names to functions ``(output, batch) -> number`` or metrics of torchmetrics.
        optimizer: an optimizer of the model's parameters, or the settings of one
            (:class:`optcpu.runtime.options.OptimizerOptions`), or only its name. One with ``train()``
            and ``eval()`` (schedule-free) is validated in the latter, and trained in the former: so are
            the weights after :meth:`train`, and ``model.safetensors`` in checkpoints, before you call
            ``optimizer.eval()``.
        lr: learning rate, where ``optimizer`` is no object.
        scheduler: any of PyTorch's for ``optimizer``, a function that makes one from it, or the settings
            of one (:class:`optcpu.runtime.options.ScheduleOptions`), or only its name. It steps after
            each optimizer step (``ReduceLROnPlateau`` after each validation).
        freezer: makes a freezer from model and optimizer, where the option ``freezing`` does not say
            enough.
        callbacks: called at the stations of the run.
        passes: the passes of the compiler, as in :func:`optcpu.optimize`.
        state_dtype: of the optimizer, as in :func:`optcpu.optimize`.
        size_of: how many samples (or tokens) a batch counts as; by default the first dimension of its
            first tensor. The loss of each micro-batch counts by this.
        collate_fn: makes a batch of samples, where the data are a dataset; like ``batch_size``,
            ``workers`` and ``drop_last`` it is refused where they are batches already.
        **options: all fields of :class:`optcpu.runtime.options.TrainerOptions`.

    Attributes:
        model: as given.
        optimizer: what updates it.
        options: the settings, checked.

    Raises:
        ValueError: a setting is unknown, out of range, or excludes another.
        TypeError: an argument is of the wrong kind.
    """

    def __init__(
        self,
        model: nn.Module,
        train_data: Any,
        *,
        loss: Loss | None = None,
        validation_data: Any = None,
        metrics: Mapping[str, Metric] | Sequence[str] = (),
        optimizer: Optimizer | OptimizerOptions | Mapping[str, Any] | str | None = None,
        lr: float | None = None,
        scheduler: Any = None,
        freezer: Callable[[nn.Module, Optimizer], DynamicFreezer] | None = None,
        callbacks: Sequence[Callback] = (),
        passes: Sequence[Pass | Rewrite] | None = None,
        state_dtype: torch.dtype | None = None,
        size_of: Callable[[Batch], int] = samples_in,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        **options: Any,
    ) -> None:
        check_model(model)
        check_functions(loss=loss, size_of=size_of, collate_fn=collate_fn)
        if isinstance(optimizer, Optimizer) and lr is not None:
            raise ValueError("lr is for an optimizer that the trainer makes; set it in yours")
        settings = dict(options)
        if not isinstance(optimizer, Optimizer):
            settings["optimizer"] = optimizer_settings(optimizer, lr)
        if scheduler is not None and "schedule" in settings:
            raise ValueError("give either scheduler or schedule, not both of them")
        if isinstance(scheduler, (str, Mapping, ScheduleOptions)):
            settings["schedule"], scheduler = scheduler, None
        self.options = read_options(TrainerOptions, settings, "Trainer", _ARGUMENTS)
        check_epochs(train_data, self.options.epochs)
        check_data_settings(self.options, train_data, validation_data, collate_fn=collate_fn)
        self.model = model
        self._loss: Loss = default_loss if loss is None else loss
        self._metrics = check_metrics(metrics)
        check_monitors(self.options, self._metrics, validates=validation_data is not None)
        if validation_data is None and (self._metrics or self.options.validate_every):
            raise ValueError("metrics and validate_every need validation_data: give them, too")
        self._callbacks = checked_callbacks(callbacks)
        self._size_of = size_of
        self._world = World.join(compress=self.options.compress_gradients)
        sharing = settle(self._world.local_rank, self._world.local_size)
        self._threads = threads_for(self.options, sharing)
        self._feed = Feed(
            train_data,
            batch_size=self.options.batch_size,
            seed=self.options.seed,
            workers=self.options.workers,
            drop_last=self.options.drop_last,
            collate_fn=collate_fn,
            rank=self._world.rank,
            world_size=self._world.size,
        )
        if self.options.checkpoints is not None:
            warn_if_not_exact(train_data)
        self._validation: Callable[[], Iterable[Batch]] | None = None
        if validation_data is not None:
            self._validation = evaluation_batches(
                validation_data, self.options.batch_size, collate_fn, self._world.size
            )
        self.optimizer = self._make_optimizer(optimizer, state_dtype)
        compile_model(model, self.optimizer, self.options, passes, state_dtype)
        accumulation, epochs = self.options.accumulation_steps, self.options.epochs
        self._plan = Plan.of(self._feed.length, accumulation, epochs, self.options.steps)
        self._scheduler = make_scheduler(
            scheduler, self.optimizer, self.options, self._plan.total, validation_data is not None
        )
        with self._updates_in_backward():  # or it is told here that they cannot be
            self._freezer = make_freezer(
                freezer, self.model, self.optimizer, self.options, self._plan.total
            )
        validated = {f"validation.{name}": one for name, one in parts_of(validation_data).items()}
        measured = {f"metric.{name}": metric for name, metric in self._metrics.items()}
        self._unsaved = Unsaved(
            model, self._loss, optimizer=self.optimizer, **validated, **measured
        )
        self._stop = StopRequest()
        self._run: Run | None = None
        self._given: Settings | None = None
        self._begun = False

    @property
    def freezer(self) -> DynamicFreezer | None:
        """What freezes layers, and knows in ``events`` what it has done and declined; None without it."""
        return self._freezer

    @property
    def is_first_process(self) -> bool:
        """Whether this process writes files and shows progress; others are there under torchrun only."""
        return self._world.first

    def _make_optimizer(self, given: Any, state_dtype: torch.dtype | None) -> Optimizer:
        trained = trained_parameters(self.model, self._loss)
        if not isinstance(given, Optimizer):
            state_dtype = own_state_dtype(self.model, self.options, state_dtype)
            return make_optimizer(trained.values(), self.options.optimizer, state_dtype)
        saved = self.options.checkpoints is not None
        check_optimizer(given, trained.values(), saved, self.options.local_steps)
        return given

    def train(self) -> TrainingResult:
        """Train to the end, or go on from the newest checkpoint to the end.

        SIGINT (Ctrl-C), SIGTERM and :meth:`stop` end it after the micro-batch at work, with a checkpoint
        (in several processes: after the step at work, and with ``local_steps`` when all meet).
        Called again, it goes on from there, also without checkpoints.

        Raises:
            TrainingDiverged: the loss or the gradient is not finite, and ``on_nan`` is ``"stop"``.
            OptcpuError: data, checkpoints or log cannot be read or written.
        """
        self._stop = StopRequest()
        threads = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with modes_kept(self.model), self._updates_in_backward():
                self.model.train()
                to_training_weights(self.optimizer)
                if self._freezer is not None:
                    self._freezer.keep_modes()
                return self._train()
        finally:
            self._feed.end_workers()
            torch.set_num_threads(threads)

    def _updates_in_backward(self) -> contextlib.AbstractContextManager[None]:
        options = self.options
        if not options.update_in_backward:
            return contextlib.nullcontext()
        return updates_in_backward(self.optimizer, options.accumulation_steps, self._world.size)

    def _train(self) -> TrainingResult:
        options, world, folder = self.options, self._world, self._open_folder()
        saved, pending = None, None
        run, self._run = self._run, None  # kept only if all goes well
        if run is None:
            run = self._make_run()
            saved = checkpoint_to_go_on_from(folder, world, options.resume)
            if saved is None and self._begun:
                raise OptcpuError(
                    "this run has ended in an error, and there is no checkpoint to go on from: make model, "
                    "optimizer and trainer anew; checkpoints='folder' keeps what is trained"
                )
            if saved is None:
                warn_if_it_ends_before_a_freeze(options.freezing, run.plan.total)
                self._share_weights()
                self._seed()
            else:
                pending = run.load_state_dict(saved.state)
                check_local_steps(self.optimizer, options.local_steps)
        shown = options.progress if world.first else False
        with (
            contextlib.nullcontext() if folder is None or not world.first else folder.in_use(),
            open_log(options.log if world.first else None, run.position) as log,
            Display(shown, run.plan.total, run.position.step) as display,
        ):
            loop = Loop(
                run,
                options,
                self._runner(),
                validation=self._validation,
                metrics=self._metrics,
                folder=folder,
                log=log,
                display=display,
                size_of=self._size_of,
                stop=self._stop,
                trainer=self,
            )
            if saved is not None:
                display.message(f"going on from {saved.path}")
                if pending is not None and not run.resume_step(
                    pending, loop.draw(waits=True), saved.state["processes"][0]
                ):
                    display.message("its step has other micro-batches now and is begun anew")
            if options.on_nan == "rollback":
                loop.saver.save_first()
            for callback in self._callbacks:
                callback.on_train_begin(self)
            if saved is None and folder is not None:
                folder.check(run.state_dict(alone=True))
            self._begun = True
            stopped_by = loop.go()
        self._run = run
        position = run.position
        result = TrainingResult(
            steps=position.step,
            epochs=position.epoch,
            samples=position.samples,
            metrics=position.metrics,
            best=position.best,
            stopped_by=stopped_by,
            stop_reason=position.stop_reason,
            seconds=dict(run.clock.seconds),
        )
        for callback in self._callbacks:
            callback.on_train_end(self, result)
        return result

    def stop(self) -> None:
        """End :meth:`train` after the micro-batch at work, with a checkpoint to go on from.

        For callbacks and other threads. What counts as a criterion for the end of the run, and is to hold
        when the program is started again, is early stopping's matter.
        """
        self._stop.ask("stop()")

    def validate(self) -> dict[str, float]:
        """``"loss"`` and the metrics on the validation data, with the weights as they are.

        A schedule-free optimizer evaluates the weights that it means for that.

        Raises:
            OptcpuError: there are no validation data.
        """
        if self._validation is None:
            raise OptcpuError("there is nothing to validate on: give the trainer validation_data")
        with evaluation_weights(self.optimizer):
            results = validate(
                self.model, self._validation(), self._loss, self._metrics, size_of=self._size_of
            )
        assert results is not None
        return results

    def _runner(self) -> StepRunner:
        compile_loss = self.options.compile_loss
        return StepRunner(
            self.model,
            self.optimizer,
            self._loss,
            self._world,
            max_grad_norm=self.options.max_grad_norm,
            check_gradients=self.options.on_nan != "stop",  # there the next loss, or the end, tells
            local_steps=self.options.local_steps,
            compile_loss=is_own(self._loss) if compile_loss is None else compile_loss,
            updates_in_backward=self.options.update_in_backward,
        )

    def _make_run(self) -> Run:
        stopping = self.options.early_stopping
        if self._given is None:  # later, a run that ended in an error has moved some
            self._given = Settings.given(self.optimizer, self._scheduler)
        return Run(
            self.model,
            self._loss,
            self.optimizer,
            self._scheduler,
            self._feed,
            self._world,
            self._freezer,
            None if stopping is None else Stopper(stopping),
            self._callbacks,
            self._plan,
            self._unsaved,
            self._given,
            own_optimizer_states=self.options.local_steps is not None,
        )

    def _open_folder(self) -> CheckpointFolder | None:
        options = self.options.checkpoints
        return None if options is None else CheckpointFolder(options.folder, options.keep_last)

    def _seed(self) -> None:
        seed = self.options.seed
        if seed is not None:
            torch.manual_seed(seed + self._world.rank)
            random.seed(seed + self._world.rank)
            np.random.seed((seed + self._world.rank) % 2**32)

    def _share_weights(self) -> None:
        """Begin with the same weights, buffers and optimizer in all processes."""
        if self._world.size == 1:
            return
        updated = (p for group in self.optimizer.param_groups for p in group["params"])
        parameters = dict.fromkeys([*trained_parameters(self.model, self._loss).values(), *updated])
        self._world.share_from_first([*parameters, *buffers_of(self.model, self._loss).values()])
        # Lookahead's slow weights are what the weights were when it was made.
        state = self._world.from_first(self.optimizer.state_dict() if self._world.first else None)
        if not self._world.first:
            load_state(self.optimizer, state)


# What may be given besides the options.
_ARGUMENTS = [name for name in inspect.signature(Trainer).parameters if name != "options"]
