"""What an optimized model is called through, and how it was optimized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.compiler import is_dynamo_compiling

from optcpu import cpp_ahead
from optcpu.backend import Backend
from optcpu.compiler_settings import (
    with_errors_told_once,
    with_hooks_guarded,
    with_sizes_apart,
)
from optcpu.hooks import hooks_of, hooks_of_all_modules, hooks_registered
from optcpu.layout import Layout
from optcpu.optim import in_backward
from optcpu.optim.accumulation import add_by_kernel
from optcpu.optim.in_backward import is_updated_in_backward
from optcpu.optim.weights import StoredWeight
from optcpu.pipeline import Pipeline, Precision
from optcpu.record import Record
from optcpu.recurrent import NOT_CAPTURED, runs_eagerly_in_part, with_recurrent_layers
from optcpu.takeover import gradients_set_aside, meet_ddp


@dataclass(frozen=True)
class Settings:
    """How a model was optimized; what :func:`optcpu.optimize` compares a second call with."""

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
            own_frame(self._eager), backend=self.backend, dynamic=self.settings.dynamic
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
            with gradients_set_aside(self._stored) as aside:
                result = self._compiled(*args, **kwargs)
            if torch.is_grad_enabled():
                for weight, _ in aside:
                    add_by_kernel(weight)
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


def own_frame(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls ``function`` from a code object of its own.

    Dynamo does not start in PyTorch's own files, where a module's call lives, and it limits how often
    one code object is compiled, so that models must not share it.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call
