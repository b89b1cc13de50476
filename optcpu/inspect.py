"""``inspect(model, *inputs)``: see what optcpu does to a model."""

from __future__ import annotations

import inspect as signatures
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

import passes as p
from optcpu.checks import check_model
from optcpu.compiled_call import Settings, compiled_call
from optcpu.inspection.build import modules_of, regions_of
from optcpu.inspection.result import Inspection
from optcpu.inspection.run import Observation, observe
from optcpu.layout import layouts
from optcpu.optimize import unwrapped
from optcpu.pipeline import Pipeline, default_passes, resolve_precision
from optcpu.record import Fallback
from passes.base import Rewrite

__all__ = ["Inspection", "inspect"]


def inspect(
    model: nn.Module,
    *inputs: Any,
    precision: str = "auto",
    passes: Sequence[p.Pass | Rewrite] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    train: bool | None = None,
    codegen: bool = False,
    **kwargs: Any,
) -> Inspection:
    """Run a copy of ``model`` once through the pipeline of :func:`optcpu.optimize` and tell what happened.

    The model itself, its gradients, buffers and modes, the inputs and the random generators stay as they
    are. If gradients are on, the backward is run as well.

    Args:
        model: any module on the CPU with FP32 parameters, optimized or not.
        *inputs: what it is called with.
        precision: as in :func:`optcpu.optimize`; ``"auto"`` is that of an optimized model.
        passes: the rewrites to run. Default: those of the optimized model, else
            :func:`optcpu.default_passes`.
        loss: from the model's output to a scalar. Default: the sum over the means of all floating-point
            outputs, since the graphs do not depend on it.
        train: ``True`` inspects in training mode with gradients, ``False`` in evaluation mode without.
            Default: the mode the model is in, and gradients as the caller has them.
        codegen: generate code, too, and keep it (:meth:`Inspection.output_code`); needs a C++ compiler.
        **kwargs: keyword inputs of the model.

    Returns:
        Every stage of every graph, and what each pass did; ``print`` shows the summary, ``.save(path)``
        writes a web page.

    Raises:
        TypeError: ``model`` is no module, ``loss`` cannot be called, or the model takes no such inputs.
        ValueError: a parameter, buffer or input is not on the CPU, the model does not run on the inputs,
            or ``precision`` is unknown.
    """
    model = unwrapped(model)
    check_model(model)
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function of the model's output, not {_typename(loss)}")
    names = _argument_names(model, inputs, kwargs)
    _check_devices(model, inputs, kwargs)
    settings = _settings(model, precision, passes)
    observation = observe(model, inputs, kwargs, settings, loss=loss, train=train, codegen=codegen)
    return _inspection(model, observation, settings, names)


def _settings(
    model: nn.Module, precision: str, chosen: Sequence[p.Pass | Rewrite] | None
) -> Settings:
    """Those of the optimized model, but for what is asked for here."""
    present = compiled_call(model)
    resolved = resolve_precision(precision)
    if present is not None and precision == "auto":
        if chosen is None:
            return present.settings
        resolved = present.settings.precision
    pipeline = Pipeline.of(default_passes(resolved) if chosen is None else chosen)
    if present is None:
        return Settings(resolved, pipeline, fallback=True, dynamic=None)
    return replace(present.settings, precision=resolved, pipeline=pipeline, fallback=True)


def _inspection(
    model: nn.Module, observation: Observation, settings: Settings, names: Sequence[str]
) -> Inspection:
    regions = regions_of(observation.record, observation.model, names)
    notes = list(observation.notes)
    if not regions:
        notes.append("Nothing was captured: the model runs eagerly.")
    written_out = sum(graph.written_out for graph in observation.record.graphs)
    if written_out:
        notes.append(
            f"{written_out} of the fused operators are small, or no library fuses them: behind the final "
            "graphs they are written out in parts, since a call would cost more than it gains."
        )
    blocks = [
        f"{blocks.count} of {blocks.size} operators ({graph.kind})"
        for graph in observation.record.graphs
        for blocks in graph.blocks
    ]
    if blocks:
        notes.append(f"Code is generated once for blocks that are equal: {', '.join(blocks)}.")
    return Inspection(
        model=_typename(model),
        modules=modules_of(observation.model, regions),
        precision=settings.precision,
        passes=tuple(step.name for step in settings.pipeline.passes),
        training=observation.model.training,
        torch_version=torch.__version__,
        regions=regions,
        breaks=observation.breaks,
        fallbacks=tuple(observation.record.fallbacks),
        earlier_fallbacks=_earlier_fallbacks(model),
        notes=tuple(notes),
        layouts=tuple(layouts(model)),
    )


def _earlier_fallbacks(model: nn.Module) -> tuple[Fallback, ...]:
    present = compiled_call(model)
    return () if present is None else tuple(present.record.fallbacks)


def _argument_names(model: nn.Module, inputs: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
    """What the model calls its positional inputs.

    Raises:
        TypeError: the model cannot be called with as many, or with such keywords.
    """
    signature = signatures.signature(model.forward)
    try:
        signature.bind(*inputs, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{_typename(model)} is called as forward{signature}: {error}; "
            "give inspect(model, ...) the inputs of one call"
        ) from None
    return list(_positional_names(signature, len(inputs)))


def _positional_names(signature: signatures.Signature, count: int) -> Iterator[str]:
    parameters = list(signature.parameters.values())
    for index in range(count):
        parameter = parameters[min(index, len(parameters) - 1)]
        starred = parameter.kind is parameter.VAR_POSITIONAL
        yield f"{parameter.name}[{index}]" if starred else parameter.name


def _check_devices(model: nn.Module, inputs: Sequence[Any], kwargs: dict[str, Any]) -> None:
    for name, buffer in model.named_buffers():
        if buffer.device.type != "cpu":
            raise ValueError(
                f"buffer {name!r} is on {buffer.device}; optcpu trains on the CPU: "
                "call model.cpu() first"
            )
    for path, value in tree_flatten_with_path((list(inputs), kwargs))[0]:
        if isinstance(value, Tensor) and value.device.type != "cpu":
            where = "".join(map(str, path[1:]))
            raise ValueError(
                f"input {where} is on {value.device}; optcpu runs on the CPU: give it value.cpu()"
            )


def _typename(thing: object) -> str:
    return type(thing).__name__
