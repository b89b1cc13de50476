"""Run a copy of a model once through the pipeline, and keep what was seen."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect as signatures
import logging
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch.utils._pytree import tree_map

from optcpu.backend import Backend
from optcpu.compiled_call import Settings, own_frame
from optcpu.errors import FallbackWarning
from optcpu.inspection.breaks import BreakLog
from optcpu.inspection.model import GraphBreak
from optcpu.random_state import random_state_kept
from optcpu.record import Fallback, Record
from optcpu.recurrent import needs_autocast, with_recurrent_layers
from optcpu.remedies import remedy_for

_CAN_ISOLATE = "isolate_recompiles" in signatures.signature(torch.compile).parameters
_NO_LIMIT = 2**31 - 1
_SHAPE_ERRORS = "torch._subclasses.fake_tensor"

Loss = Callable[[Any], Tensor]


@dataclass
class Observation:
    """What was seen in one forward and backward pass.

    Attributes:
        model: the module that was run.
        record: the graphs and the passes over them.
        breaks: where capture stopped.
        notes: what a reader must know, in sentences.
    """

    model: nn.Module
    record: Record
    breaks: tuple[GraphBreak, ...] = ()
    notes: list[str] = field(default_factory=list)


def observe(
    model: nn.Module,
    inputs: Sequence[Any],
    keywords: Mapping[str, Any],
    settings: Settings,
    *,
    loss: Loss | None,
    train: bool | None,
    codegen: bool,
) -> Observation:
    """Run a copy of ``model`` forward and, where gradients are possible, backward.

    Neither the model, nor the inputs, nor any random generator is changed.

    Raises:
        ValueError: the model cannot take the inputs, or ``loss`` does not give one number.
    """
    with random_state_kept(), contextlib.ExitStack() as stack:
        twin, notes = _twin_of(model, stack)
        if train is not None:
            twin.train(train)
        observation = Observation(twin, Record(keep_graphs=True), notes=notes)
        with _gradients(train):
            _run(observation, _Call(twin, inputs, keywords), settings, loss, codegen)
    return observation


@dataclass(frozen=True)
class _Call:
    """One call of a model, that can be made again with the same inputs."""

    model: nn.Module
    inputs: Sequence[Any]
    keywords: Mapping[str, Any]

    def __call__(self, function: Callable[..., Any]) -> Any:
        inputs, keywords = tree_map(_spare, (tuple(self.inputs), dict(self.keywords)))
        return function(*inputs, **keywords)


def _run(
    observation: Observation, call: _Call, settings: Settings, loss: Loss | None, codegen: bool
) -> None:
    backend = Backend(
        settings.pipeline,
        fallback=True,
        record=observation.record,
        activation_memory=settings.activation_memory,
        codegen=codegen,
    )
    frame = own_frame(call.model._call_impl)
    # Dynamo remembers by file, line and name which sizes have varied between calls.
    frame.__code__ = frame.__code__.replace(co_name=f"inspect_{secrets.token_hex(8)}")
    compiled: Callable[..., Any] = torch.compile(
        frame, backend=backend, dynamic=settings.dynamic, **_isolated()
    )
    compiled = with_recurrent_layers(compiled, call.model, settings.precision)
    if needs_autocast(call.model, settings.precision):
        observation.notes.append(
            "The model has recurrent layers that are not captured: all that is not in a "
            "graph runs under BF16 autocast."
        )
    log = BreakLog()
    with log.listening(), _hushed(_SHAPE_ERRORS), _as_if_first(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        output = _forward(observation, call, compiled)
        _backward(observation, output, loss)
    observation.breaks = log.breaks()


@contextlib.contextmanager
def _hushed(name: str) -> Iterator[None]:
    """Keep a logger silent: what it has to say is raised as well, and told from there."""
    logger = logging.getLogger(name)
    logger.addFilter(_nothing)
    try:
        yield
    finally:
        logger.removeFilter(_nothing)


def _nothing(_record: logging.LogRecord) -> bool:
    return False


def _forward(observation: Observation, call: _Call, compiled: Callable[..., Any]) -> Any:
    try:
        return call(compiled)
    except Exception as error:
        failure = error
    try:
        output = call(call.model._call_impl)
    except Exception as error:
        raise ValueError(
            f"{type(call.model).__name__} does not run on these inputs "
            f"({_described(call)}): {type(error).__name__}: {_first_line(error)}"
        ) from error
    _failed(observation, "the forward pass", failure)
    return output


def _backward(observation: Observation, output: Any, loss: Loss | None) -> None:
    if not torch.is_grad_enabled():
        observation.notes.append("Gradients are off: only the forward was compiled, for inference.")
        return
    total = sum_of_means(output) if loss is None else _checked(loss(output))
    if total is None or not total.requires_grad:
        observation.notes.append("No output needs a gradient: there is no backward to show.")
        return
    try:
        total.backward()
    except Exception as error:
        _failed(observation, "the backward pass", error)


def _failed(observation: Observation, part: str, error: Exception) -> None:
    reason = f"{type(error).__name__}: {_first_line(error)}"
    observation.record.fallbacks.append(Fallback(part, reason, remedy_for(error)))


def _checked(total: Any) -> Tensor:
    if not isinstance(total, Tensor) or total.numel() != 1:
        what = f"shape {list(total.shape)}" if isinstance(total, Tensor) else type(total).__name__
        raise ValueError(f"loss(output) must be a tensor with one number, not {what}")
    return total


def sum_of_means(output: Any) -> Tensor | None:
    """The sum over the means of all floating-point tensors in ``output``; None if it has none."""
    means = [t.mean() for t in _tensors_in(output) if t.is_floating_point() and t.requires_grad]
    return torch.stack([mean.float() for mean in means]).sum() if means else None


def _tensors_in(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors_in(value)
    elif isinstance(output, (list, tuple, set)):
        for value in output:
            yield from _tensors_in(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for entry in dataclasses.fields(output):
            yield from _tensors_in(getattr(output, entry.name))


def _spare(value: Any) -> Any:
    """A copy of an input, so that neither its values nor its gradient change."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    try:
        return copy.deepcopy(value)
    except Exception:  # whatever cannot be copied is passed on as it is
        return value


def _twin_of(model: nn.Module, stack: contextlib.ExitStack) -> tuple[nn.Module, list[str]]:
    try:
        with torch.inference_mode(False):
            twin = copy.deepcopy(model)
    except Exception as error:  # a model may hold anything: locks, open files, graphs
        stack.enter_context(_restored(model))
        return model, [
            f"The model cannot be copied ({_first_line(error)}), so it ran itself; its buffers, "
            "gradients and modes were put back."
        ]
    twin.zero_grad(set_to_none=True)
    return twin, []


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put back afterwards what a training step changes in a model beside its parameters."""
    gradients = [(p, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer.copy_(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _gradients(train: bool | None) -> Iterator[None]:
    """Gradients on or off as asked for; None leaves them as the caller has them."""
    if train is None:
        yield
        return
    with torch.inference_mode(False), torch.set_grad_enabled(train):
        yield


def _isolated() -> dict[str, Any]:
    """Keep what is compiled here out of what Dynamo counts for the user's models, where it can.

    Without (torch 2.8), code between graph breaks is compiled into the same cache as that of other
    models of the class, and comes nearer to the recompilation limit.
    """
    return {"isolate_recompiles": True} if _CAN_ISOLATE else {}


def _as_if_first() -> contextlib.AbstractContextManager[None]:
    """Let earlier inspections not use up the recompilation limit of this one (torch 2.8).

    Behind that limit Dynamo leaves code alone, and there would be nothing to show.
    """
    if _CAN_ISOLATE:
        return contextlib.nullcontext()
    return dynamo_config.patch(  # type: ignore[no-any-return]
        recompile_limit=_NO_LIMIT, accumulated_recompile_limit=_NO_LIMIT
    )


def _described(call: _Call) -> str:
    described = [_brief(value) for value in call.inputs]
    return ", ".join([*described, *(f"{k}={_brief(v)}" for k, v in call.keywords.items())])


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "inner_exception", None) or error
    return next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
