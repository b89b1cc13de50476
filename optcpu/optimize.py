"""``optimize(model)``: compile a model in place for training on a CPU, and undo it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar, overload

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.compiler import is_dynamo_compiling
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import passes as p
from optcpu import cpp_ahead
from optcpu.backend import Backend
from optcpu.checks import check_flag, check_model, checked_share
from optcpu.compiler_settings import (
    with_errors_told_once,
    with_hooks_guarded,
    with_sizes_apart,
)
from optcpu.cpu import capabilities
from optcpu.errors import OptcpuError, warn
from optcpu.hooks import hooks_of, hooks_of_all_modules, hooks_registered
from optcpu.layout import Layout, checked_layout, keep_packed
from optcpu.memory import reuse_memory
from optcpu.optim import in_backward
from optcpu.optim.in_backward import is_updated_in_backward
from optcpu.optim.storing import restore_weights
from optcpu.optim.weights import StoredWeight
from optcpu.pipeline import Pipeline, Precision, default_passes, resolve_precision
from optcpu.record import Record
from optcpu.recurrent import NOT_CAPTURED, runs_eagerly_in_part, with_recurrent_layers
from optcpu.takeover import (
    gradients_set_aside,
    meet_ddp,
    resolve_state_dtype,
    resolve_weights,
    take_over,
)
from passes.base import Rewrite

Model = TypeVar("Model", bound=nn.Module)
AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


@dataclass(frozen=True)
class Settings:
    """How a model was optimized; what :func:`optimize` compares a second call with."""

    precision: Precision
    pipeline: Pipeline
    fallback: bool
    dynamic: bool | None
    activation_memory: float = 1.0
    layout: Layout = "auto"

    def difference(self, present: Settings) -> str:
        """What differs, in words: ``"precision is 'bf16', not 'fp32'"``."""
        if self.precision != present.precision:
            return f"precision is {present.precision!r}, not {self.precision!r}"
        names = [f.name for f in fields(self) if getattr(self, f.name) != getattr(present, f.name)]
        return ", ".join(
            "other passes"
            if name == "pipeline"
            else f"{name} is {getattr(present, name)}, not {getattr(self, name)}"
            for name in names
        )


@overload
def optimize(
    model: Model,
    optimizer: None = None,
    *,
    precision: str = "auto",
    passes: Sequence[p.Pass | Rewrite] | None = None,
    fallback: bool = True,
    keep_memory: bool = True,
    dynamic: bool | None = None,
    activation_memory: float = 1.0,
    weights: str = "auto",
    state_dtype: torch.dtype | None = None,
    layout: str = "auto",
) -> Model: ...


@overload
def optimize(
    model: Model,
    optimizer: AnyOptimizer,
    *,
    precision: str = "auto",
    passes: Sequence[p.Pass | Rewrite] | None = None,
    fallback: bool = True,
    keep_memory: bool = True,
    dynamic: bool | None = None,
    activation_memory: float = 1.0,
    weights: str = "auto",
    state_dtype: torch.dtype | None = None,
    layout: str = "auto",
) -> tuple[Model, AnyOptimizer]: ...


def optimize(
    model: Model,
    optimizer: AnyOptimizer | None = None,
    *,
    precision: str = "auto",
    passes: Sequence[p.Pass | Rewrite] | None = None,
    fallback: bool = True,
    keep_memory: bool = True,
    dynamic: bool | None = None,
    activation_memory: float = 1.0,
    weights: str = "auto",
    state_dtype: torch.dtype | None = None,
    layout: str = "auto",
) -> Model | tuple[Model, AnyOptimizer]:
    """Compile ``model`` in place, so that calling it trains fast on this CPU.

    The module stays what it is: its parameters (FP32), ``state_dict()``, hooks, modes, copies and pickles
    are those of the plain model. The first call compiles, which takes seconds to a minute.

    Args:
        model: any module on the CPU with FP32 parameters. What is in a ``DistributedDataParallel`` is
            compiled; wrap after this call if an optimizer is given, so that its weights can be stored.
        optimizer: any optimizer of the model's parameters. ``Adam``, ``AdamW`` and ``SGD`` of PyTorch
            become those of :mod:`optcpu.optim`, the same object with the same options and checkpoints
            (where everything stays FP32, they use PyTorch's own fused kernel);
            those of :mod:`optcpu.optim` (``Lookahead`` around one as well) are taken as they are; others
            keep their own update, and a warning says so.
        precision: ``"bf16"`` computes matrix products, convolutions and attention in BF16,
            ``"fp32"`` everything in FP32, ``"auto"`` is BF16 where the processor has it in hardware.
        passes: the rewrites to run, in order, in place of :func:`optcpu.default_passes`: passes, or
            functions ``(graph) -> count``.
        fallback: whether a part that cannot be compiled runs eagerly, with a warning, or raises.
        keep_memory: keep freed memory in this process, and give large tensors a range of addresses of
            their own (:mod:`optcpu.memory`), which often halves the step time; holds for the whole process.
        dynamic: as in :func:`torch.compile`: None compiles a size anew once when it changes and then for
            all sizes, True for all sizes from the start, False for each size.
        activation_memory: how much of the memory that activations take between forward and backward may
            be used, from 0 to 1: 1 keeps them all, 0 keeps the inputs alone and computes the rest anew,
            at once when the backward begins, which is not where the peak is lowest (at about 0.1 it is).
            Between the two the compiler chooses what is cheapest to compute anew.
        weights: how the optimizer stores weights of two dimensions or more: ``"fp32"``; ``"split"`` is a
            BF16 half to compute with and another half that makes it the exact FP32 weight, 4 bytes in
            all; ``"bf16"`` is the BF16 half alone, rounded stochastically, 2 bytes. ``"auto"`` is
            ``"split"`` in BF16, else ``"fp32"``. However they are stored, reading a weight, and
            ``state_dict()``, gives FP32. Without an optimizer they stay FP32.
        state_dtype: of the optimizer's state, ``torch.bfloat16`` or ``torch.float32``; None is the
            former in BF16, else the latter.
        layout: how weights that the optimizer stores as BF16 are laid out for products with them:
            ``"native"`` keeps a copy in oneDNN's blocked format where that pays, which it does if a
            weight is multiplied several times between two updates; ``"ipex"`` keeps it in the format
            of Intel's extension; ``"none"`` keeps no copy. ``"auto"`` is ``"ipex"`` where the
            extension fits this PyTorch and is measured to be faster, else ``"native"``.

    Returns:
        ``model`` itself, or ``(model, optimizer)`` if an optimizer was given.

    Raises:
        TypeError: ``model`` is no module, ``optimizer`` no optimizer, an entry of ``passes`` no pass,
            ``activation_memory`` no number, or a flag none.
        ValueError: a parameter is not on the CPU, not FP32, or not finite; ``precision``, ``weights``,
            ``state_dtype`` or ``layout`` is unknown; ``activation_memory`` does not lie between 0 and 1.
        OptcpuError: the model was optimized before with other settings, or ``layout`` is ``"ipex"``
            and the extension cannot be used here.
    """
    wrapped, model = model, unwrapped(model)
    check_model(model)
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {_typename(optimizer)}")
    resolved = resolve_precision(precision)
    pipeline = Pipeline.of(default_passes(resolved) if passes is None else passes)
    storage = resolve_weights(weights, resolved)
    state_dtype = resolve_state_dtype(state_dtype, resolved)
    check_flag("fallback", fallback)
    check_flag("keep_memory", keep_memory)
    check_flag("dynamic", dynamic, or_none=True)
    share = checked_share("activation_memory", activation_memory)
    settings = Settings(resolved, pipeline, fallback, dynamic, share, checked_layout(layout))
    present = compiled_call(model)
    if present is not None and present.settings != settings:
        raise OptcpuError(
            f"this {_typename(model)} is optimized already, with other settings "
            f"({settings.difference(present.settings)}): "
            "call optcpu.restore(model) before optimizing it anew"
        )
    if present is None:
        if resolved == "bf16" and not capabilities().bf16:
            warn(
                "this processor has no BF16 arithmetic (AVX512_BF16 or AMX): BF16 is emulated and a "
                "training step will take several times longer than with precision='fp32'"
            )
        if keep_memory:
            reuse_memory()
        model._compiled_call_impl = CompiledCall(model, settings)
    changed = optimizer is not None and take_over(model, optimizer, storage, state_dtype)
    if changed and present is not None:
        present.compile_anew()
    keep_packed(model, settings.layout)
    return wrapped if optimizer is None else (wrapped, optimizer)


def restore(model: Model) -> Model:
    """Undo :func:`optimize`: ``model`` is called as it was before. Returns ``model``.

    Its weights are plain FP32 tensors again, every bit of them kept; an optimizer that was taken over
    goes on updating them. The allocator's policy stays, as it belongs to the process. A model that is
    not optimized is returned as it is.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {_typename(model)}")
    compiled = unwrapped(model)
    present = compiled_call(compiled)
    if present is not None:
        compiled._compiled_call_impl = present.replaced
        restore_weights(compiled)
    return model


def unwrapped(model: Any) -> Any:
    """What computes: ``model``, or the module in it if it is a ``DistributedDataParallel``."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def compiled_call(model: nn.Module) -> CompiledCall | None:
    """What calls of ``model`` go through if it is optimized, else None."""
    present = model._compiled_call_impl
    return present if isinstance(present, CompiledCall) else None


class CompiledCall:
    """What an optimized model is called through: compiled code, or the model itself if that fails.

    Args:
        model: the module to compile.
        settings: how.
        record: where to write down what happens; a new one by default.
        function: what to compile in place of the model's own call; it calls the model.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        record: Record | None = None,
        function: Callable[..., Any] | None = None,
    ) -> None:
        self.settings = settings
        self._model = model
        self.replaced = model._compiled_call_impl
        self.backend = Backend(
            settings.pipeline,
            fallback=settings.fallback,
            record=record,
            activation_memory=settings.activation_memory,
        )
        self._eager: Callable[..., Any] = model._call_impl if function is None else function
        self._with_loss: dict[int, CompiledCall] = {}
        self._given_up = False
        self._hooks: set[int] | None = None  # looked for with the first call
        self._looked_at = -1
        self._guards_hooks = self._told_of_hooks = False
        cpp_ahead.prepare_compiler()  # in a thread, until the first call needs it
        self.compile_anew()

    def compile_anew(self) -> None:
        """Forget what was compiled so far.

        Needed when weights are stored in another way, which Dynamo's guards in PyTorch 2.8 overlook.
        """
        self._stored: list[StoredWeight] | None = None  # looked for with the first call
        self._frames, self._breaks = _frames_tried(), _graph_breaks()
        compiled = torch.compile(
            _own_frame(self._eager), backend=self.backend, dynamic=self.settings.dynamic
        )
        self._compiled: Callable[..., Any] = with_errors_told_once(
            with_recurrent_layers(compiled, self._model, self.settings.precision)
        )
        if self._guards_hooks:
            self._compiled = with_hooks_guarded(self._compiled)
        if self.settings.dynamic:
            self._compiled = with_sizes_apart(self._compiled)
        for call in self._with_loss.values():
            call.compile_anew()

    def with_loss(
        self, model: nn.Module, loss: object, objective: Callable[[Any], Any]
    ) -> CompiledCall:
        """``objective``, which calls ``model`` and ``loss``, compiled as the model is: as one graph.

        The next time it is asked for with the same ``loss``, it is compiled already.
        """
        key = id(loss)  # which lives as long as ``objective``
        if key not in self._with_loss:
            self._with_loss[key] = CompiledCall(model, self.settings, self.record, objective)
        return self._with_loss[key]

    @property
    def record(self) -> Record:
        """What happened in the compilations so far."""
        return self.backend.record

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # In a graph that is captured from further out, with the loss say, the model is a part of it.
        if self._given_up or is_dynamo_compiling():
            return self._eager(*args, **kwargs)
        if hooks_of_all_modules():
            self._tell_of_hooks_of_all_modules()
            return self._eager(*args, **kwargs)
        if _registrations() != self._looked_at:
            self._look_for_registrations()
        run_before = self.backend.parts_run
        if self._stored is None:
            self._stored = [p for p in self._model.parameters() if isinstance(p, StoredWeight)]
        meet_ddp(self._model, self._stored)
        try:
            with gradients_set_aside(self._stored):
                result = self._compiled(*args, **kwargs)
            if self.backend.parts_run == run_before:
                self._tell_why_nothing_ran()
            return result
        except TorchDynamoException as error:
            if self.backend.parts_run != run_before:
                raise  # what has run (batch statistics, say) must not run a second time
            failure = error
        # Input that the model cannot take fails here as well, with PyTorch's own message.
        result = self._eager(*args, **kwargs)
        self.backend.fell_back("the model", failure)
        self._given_up = True
        return result

    def _look_for_registrations(self) -> None:
        """Compile anew if what is compiled does not fit the hooks, or updates in backward, of now."""
        self._looked_at = _registrations()
        if self._has_new_hooks() | self._changes_handing_over():
            self.compile_anew()

    def _has_new_hooks(self) -> bool:
        """Whether there are hooks that what is compiled may not have.

        From then on Dynamo looks for hooks with every call. That takes up to a third of the time of a
        call, which a model whose hooks stay what they are does not spend.
        """
        if self._guards_hooks:
            return False
        before, self._hooks = self._hooks, hooks_of(self._model)
        self._guards_hooks = before is not None and bool(self._hooks - before)
        return self._guards_hooks

    def _changes_handing_over(self) -> bool:
        """Whether backward graphs shall hand over gradients from now on, and did not, or the reverse."""
        parameters = list(self._model.parameters())
        wanted = any(map(is_updated_in_backward, parameters)) and not any(
            parameter._backward_hooks for parameter in parameters
        )  # hooks want the gradient before anybody has it
        # Evaluation behind the training is not worth compiling anew.
        if wanted == self.backend.hands_over or not (wanted or torch.is_grad_enabled()):
            return False
        self.backend.hands_over = wanted
        return True

    def _tell_of_hooks_of_all_modules(self) -> None:
        if not self._told_of_hooks:
            self.backend.fell_back("the model", RuntimeError("there are hooks of all modules"))
            self._told_of_hooks = True

    def _tell_why_nothing_ran(self) -> None:
        """Dynamo gives up whole functions without an error, and notes why.

        It does so once; the calls that follow, each of a millisecond perhaps, have no time for counting.
        """
        tried, self._frames = self._frames, _frames_tried()
        if self._frames == tried:
            return
        before, self._breaks = self._breaks, _graph_breaks()
        reasons = list(self._breaks - before)
        has_parameters = next(self._model.parameters(), None) is not None
        if reasons and has_parameters:
            recurrent = runs_eagerly_in_part(self._model, self.settings.precision)
            reason = NOT_CAPTURED if recurrent else reasons[0]
            self.backend.fell_back("the model", RuntimeError(reason))


def _registrations() -> int:
    """A number that grows whenever a hook, or an update in the backward pass, comes, or the latter goes."""
    return hooks_registered() + in_backward.changes()


def _frames_tried() -> int:
    """How many functions Dynamo has begun to capture in this process."""
    return int(torch._dynamo.utils.counters["frames"]["total"])


def _graph_breaks() -> Counter[str]:
    """How often Dynamo gave something up in this process, by reason."""
    return Counter(torch._dynamo.utils.counters["graph_break"])


def _own_frame(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls ``function`` from a code object of its own.

    Dynamo does not start in PyTorch's own files, where a module's call lives, and it limits how often
    one code object is compiled, so that models must not share it.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call


def _typename(thing: object) -> str:
    return type(thing).__name__
