"""Every setting of a training run, checked before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


# A path, in which "~" is the home folder. (An empty one would be this folder.)
def _folder(path: Path) -> Path:
    if path == Path():
        raise ValueError("the name of a folder is empty")
    if "\0" in str(path):
        raise ValueError("the name of a folder has a null byte in it")
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r} leads to nobody's home folder") from error


Folder = Annotated[Path, Field(strict=False), AfterValidator(_folder)]

_MOST_THREADS = 1024  # or processes: more end the process before anything can be told


class Options(BaseModel):
    """A group of settings. Unknown names and values out of range are refused.

    Attributes:
        shorthand: the setting that is meant where a bare value stands for the group, as in
            ``optimizer="lamb"``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    shorthand: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _read_shorthand(cls, given: Any) -> Any:
        if cls.shorthand is not None and isinstance(given, (str, Path)):
            return {cls.shorthand: given}
        return given


class EarlyStopping(Options):
    """When training ends before its time.

    Attributes:
        monitor: the metric to watch, as it is called in the results of validation.
        mode: whether less (``"min"``) or more (``"max"``) of it is better.
        min_delta: an improvement by no more than this is none.
        patience: validations without improvement after which training stops.
        check_finite: stop at once when the metric is NaN or infinite.
    """

    monitor: str = "loss"
    mode: Literal["min", "max"] = "min"
    min_delta: float = Field(0.0, ge=0, allow_inf_nan=False)
    patience: int = Field(3, ge=1)
    check_finite: bool = True


class Checkpoints(Options):
    """Where and when the state of training is written.

    Attributes:
        folder: receives one folder for each checkpoint.
        every_steps: optimizer steps between two of them; None writes at the end of each epoch, or,
            in a run counted in steps, ten times in all. One is also written when training ends, is
            interrupted or terminated.
        keep_last: how many are kept, besides the best.
        best: the metric of validation whose best checkpoint is kept; None keeps none.
        mode: whether less (``"min"``) or more (``"max"``) of it is better.
    """

    shorthand = "folder"

    folder: Folder
    every_steps: int | None = Field(None, ge=1)
    keep_last: int = Field(3, ge=1)
    best: str | None = None
    mode: Literal["min", "max"] = "min"


class LookaheadOptions(Options):
    """Lookahead around the optimizer; the names are those of :class:`optcpu.Lookahead`."""

    k: int = Field(5, ge=1)
    alpha: float = Field(0.5, ge=0, le=1)
    pullback: Literal["none", "reset", "pullback"] = "none"


class OptimizerOptions(Options):
    """An optimizer that the trainer makes, of the parameters that need a gradient by then.

    For others that a callback unfreezes it calls ``add_param_group``; or give an optimizer of your own.

    Attributes:
        name: ``"adamw"``, ``"adam"``, ``"sgd"`` (with momentum) or ``"lamb"``.
        lr: learning rate.
        weight_decay: None takes the optimizer's own default.
        betas: of the moments of Adam, AdamW and LAMB; None takes the defaults.
        momentum: of SGD.
        lookahead: put :class:`optcpu.Lookahead` around it.
    """

    shorthand = "name"

    name: Literal["adamw", "adam", "sgd", "lamb"] = "adamw"
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False)
    weight_decay: float | None = Field(None, ge=0, allow_inf_nan=False)
    betas: tuple[float, float] | None = Field(None, strict=False)
    momentum: float = Field(0.9, ge=0, lt=1)
    lookahead: LookaheadOptions | None = None

    @model_validator(mode="after")
    def _betas_are_fractions(self) -> OptimizerOptions:
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must lie in [0, 1)")
        return self

    @model_validator(mode="after")
    def _settings_are_of_this_optimizer(self) -> OptimizerOptions:
        foreign = "betas" if self.name == "sgd" else "momentum"
        if foreign in self.model_fields_set and getattr(self, foreign) is not None:
            raise ValueError(
                f"{self.name} has no {foreign}: leave it out, or take another optimizer"
            )
        return self


class ScheduleOptions(Options):
    """How the learning rate goes.

    Attributes:
        name: after the warm-up: ``"constant"``, ``"cosine"`` or ``"linear"`` (down to ``final``).
        warmup_steps: optimizer steps in which it rises linearly from zero.
        final: the last learning rate, as a fraction of the highest.
    """

    shorthand = "name"

    name: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    final: float = Field(0.0, ge=0, le=1)


class FreezingOptions(Options):
    """Stop training layers that have converged; see :class:`optcpu.DynamicFreezer` for the names.

    Attributes:
        payback: make no freeze that would not save the time of its compilation in the steps that remain.
            That depends on measured times, and so may differ between two runs, unless ``step_seconds``
            and ``compile_seconds`` are given.
    """

    window: int = Field(50, ge=1)
    percentile: float = Field(50.0, gt=0, le=100)
    patience: int = Field(2, ge=1)
    max_freezes: int | None = Field(3, ge=1)
    payback: bool = True
    step_seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    compile_seconds: float | None = Field(None, ge=0, allow_inf_nan=False)
    unfreeze_after: int | None = Field(None, ge=1)
    blocks: tuple[str, ...] | None = Field(None, strict=False)
    eval_frozen: bool = False
    observe_every: int = Field(5, ge=1)


class LogOptions(Options):
    """What is written down.

    Attributes:
        folder: receives ``metrics.csv``, ``metrics.jsonl`` and TensorBoard's files.
        every_steps: optimizer steps between two rows; the end of the run has one as well.
        tensorboard: write for TensorBoard, too; needs the ``tensorboard`` package.
    """

    shorthand = "folder"

    folder: Folder
    every_steps: int = Field(10, ge=1)
    tensorboard: bool = False


class TrainerOptions(Options):
    """Settings of :class:`optcpu.Trainer`, which takes them as keyword arguments.

    Attributes:
        epochs: passes over the training data. Either this or ``steps`` is given.
        steps: optimizer steps.
        batch_size: samples in a micro-batch, where the training data are a dataset.
        accumulation_steps: micro-batches in one optimizer step, whose data are in memory together. The
            last step of an epoch has fewer where they do not divide it.
        optimizer: makes the optimizer, where none is given as an object.
        schedule: of the learning rate, where no scheduler is given as an object.
        max_grad_norm: clip the gradient to this norm; None leaves it.
        precision: ``"auto"``, ``"bf16"`` or ``"fp32"``, as in :func:`optcpu.optimize`.
        weights: how weights are stored, as in :func:`optcpu.optimize`.
        layout: how stored weights are laid out for products, as in :func:`optcpu.optimize`.
        compile: whether the model is compiled; without it, it runs eagerly.
        compile_loss: whether the loss is compiled with the model, as one graph; None does so with optcpu's
            own, such as the default one, and leaves yours as it is.
        dynamic: compile one graph for all shapes rather than one for each.
        activation_memory: how much of the activations' memory may be used, as in :func:`optcpu.optimize`.
        update_in_backward: update each parameter as soon as its gradient is complete.
        on_nan: when the loss or the gradient is not finite: ``"stop"`` with an error, ``"skip"`` the
            step, or ``"rollback"`` to the last checkpoint and go on with the data that come next.
        max_bad_steps: skipped or rolled-back steps in a row after which training stops all the same.
        validate_every: optimizer steps between validations; None validates after each epoch.
        early_stopping: end before the time.
        freezing: stop training layers that have converged; None freezes none.
        checkpoints: write the state of training.
        resume: ``"auto"`` goes on from the newest checkpoint in the folder, if there is one;
            ``"never"`` refuses a folder that has one; ``"must"`` refuses one that has none.
        log: write metrics to files.
        seed: of shuffling, and of the global random generators at the start; None leaves the latter.
        threads: to compute with; ``"auto"`` takes the physical cores that this process may use.
        workers: processes that load data, where the training data are a dataset; ``"auto"`` measures how
            many help, and takes more where the first steps turn out to wait. No batch depends on it.
        drop_last: leave out an incomplete last micro-batch.
        compress_gradients: send gradients to other processes as BF16, half the bytes.
        local_steps: optimizer steps that each process makes by itself before all average their weights
            (local SGD); None adds up the gradients in each step. With Lookahead, this is its ``k``, and
            the averaged weights move the slow ones. Validations and checkpoints that are due in between
            wait until then.
        progress: show progress on stderr; None shows a bar on a terminal and a line now and then
            elsewhere.
    """

    epochs: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    batch_size: int = Field(32, ge=1)
    accumulation_steps: int = Field(1, ge=1)
    optimizer: OptimizerOptions = OptimizerOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    max_grad_norm: float | None = Field(None, gt=0, allow_inf_nan=False)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    weights: Literal["auto", "fp32", "split", "bf16"] = "auto"
    layout: Literal["auto", "native", "ipex", "none"] = "auto"
    compile: bool = True
    compile_loss: bool | None = None
    dynamic: bool = False
    activation_memory: float = Field(1.0, ge=0, le=1)
    update_in_backward: bool = False
    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    max_bad_steps: int = Field(10, ge=1)
    validate_every: int | None = Field(None, ge=1)
    early_stopping: EarlyStopping | None = None
    freezing: FreezingOptions | None = None
    checkpoints: Checkpoints | None = None
    resume: Literal["auto", "never", "must"] = "auto"
    log: LogOptions | None = None
    seed: int | None = Field(0, ge=0, lt=2**63)
    threads: int | Literal["auto"] = Field("auto")
    workers: int | Literal["auto"] = Field("auto")
    drop_last: bool = False
    compress_gradients: bool = False
    local_steps: int | None = Field(None, ge=1)
    progress: bool | None = None

    @property
    def checkpoint_interval(self) -> int | None:
        """Optimizer steps between checkpoints; None for the ends of epochs."""
        if self.checkpoints is not None and self.checkpoints.every_steps is not None:
            return self.checkpoints.every_steps
        return None if self.steps is None else max(1, self.steps // 10)

    @model_validator(mode="after")
    def _settings_agree(self) -> TrainerOptions:
        if (self.epochs is None) == (self.steps is None):
            but = "; there is neither" if self.epochs is None else ", not both of them"
            raise ValueError(f"give either epochs or steps{but}")
        for name, least in (("threads", 1), ("workers", 0)):
            value = getattr(self, name)
            if isinstance(value, int) and value < least:
                raise ValueError(f"{name} must be at least {least}, or 'auto'")
            if isinstance(value, int) and value > _MOST_THREADS:
                raise ValueError(f"{name} must be at most {_MOST_THREADS}, or 'auto'")
        if self.activation_memory < 1 and not self.compile:
            raise ValueError(
                "activation_memory needs compile: an eager model keeps what it keeps; wrap its blocks in "
                "torch.utils.checkpoint, or compile it"
            )
        if self.compile_loss and not self.compile:
            raise ValueError("compile_loss needs compile: the loss is compiled with the model")
        ignored = {"precision": ("auto", "fp32"), "layout": ("auto", "none"), "dynamic": (False,)}
        for name, eager in ignored.items():
            if not self.compile and getattr(self, name) not in eager:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs compile: an eager model runs as it is; leave "
                    f"{name} out, or compile it"
                )
        if self.update_in_backward and self.max_grad_norm is not None:
            raise ValueError(
                "update_in_backward and max_grad_norm exclude each other: the norm of the whole "
                "gradient is known only when backward has ended; leave one of them out"
            )
        if self.update_in_backward and self.on_nan == "skip":
            raise ValueError(
                "update_in_backward and on_nan='skip' exclude each other: the weights have been "
                "updated when a gradient turns out bad; take on_nan='rollback'"
            )
        lookahead = self.optimizer.lookahead
        if self.local_steps is not None and lookahead and lookahead.k != self.local_steps:
            raise ValueError(
                f"local_steps is {self.local_steps}, and lookahead.k is {lookahead.k}: processes "
                "average their weights when the slow ones move; give both the same number"
            )
        if self.local_steps is not None and self.freezing is not None:
            raise ValueError(
                "local_steps and freezing exclude each other: processes that see other gradients would "
                "freeze other layers"
            )
        if self.freezing is not None and self.update_in_backward:
            raise ValueError(
                "freezing and update_in_backward exclude each other: no gradient is left to look at"
            )
        if self.on_nan == "rollback" and self.checkpoints is None:
            raise ValueError("on_nan='rollback' needs checkpoints to roll back to")
        if self.resume == "must" and self.checkpoints is None:
            raise ValueError("resume='must' needs checkpoints to resume from")
        return self
