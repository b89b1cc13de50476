"""How a batch is written down, how it is given to a model, and which loss belongs to it.

One batch is

- a tensor: ``model(x)``; there is no target, so a loss must be given or come with the output;
- a tuple ``(*inputs, target)``: ``model(*inputs)``, and the last element is the target;
  with exactly two elements of which the first is a dict: ``model(**first)``;
  a tuple of one element is inputs alone, without a target;
- a dict (any ``Mapping``): ``model(**batch)``; there is no target, as for a tensor.

Several batches are a **list** of those, cycled through. Inside such a list, a list is taken for a
tuple, since that is what a ``DataLoader`` yields: ``list(loader)`` is therefore several batches.
One ``next(iter(loader))`` is a list of tensors, which could be read both ways, and is refused:
write ``tuple(batch)``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Batch: TypeAlias = Any
Loss: TypeAlias = Callable[[Any, Any], Tensor]

LEFT_OUT = -100  # targets that PyTorch's cross entropy ignores by default
_BATCH_THEM = "Put samples into a Dataset or a DataLoader, which make batches of them."
_CONVENTION = (
    "A batch is a tensor, a tuple (*inputs, target), or a dict of keyword arguments; "
    "several batches are a list of those."
)


def as_batches(batch: Any) -> list[Batch]:
    """One batch or a list of batches, as a list of batches.

    Raises:
        TypeError: for anything but the forms above, and for a list of bare tensors.
        ValueError: if there is no batch, or a batch without a tensor.
    """
    if isinstance(batch, list):
        if not batch:
            raise ValueError(f"batch is an empty list: there is nothing to train on. {_CONVENTION}")
        if all(isinstance(one, Tensor) for one in batch):
            raise TypeError(
                f"batch is a list of {len(batch)} tensors, which could be one batch or "
                f"{len(batch)}. For one batch (as a DataLoader yields it) pass tuple(batch); for "
                "several batches without a target pass [(x,) for x in batch]."
            )
        batches = [as_batch(tuple(one) if isinstance(one, list) else one) for one in batch]
    else:
        batches = [as_batch(batch)]
    return batches


def as_batch(batch: Any) -> Batch:
    """One batch, in one of the forms above.

    Raises:
        TypeError: it is in none of them.
        ValueError: it has no tensor, an empty one, or one that is not on the CPU.
    """
    if not isinstance(batch, (Tensor, tuple)):
        if not isinstance(batch, Mapping):
            raise TypeError(f"a batch of type {type(batch).__name__} cannot be used. {_CONVENTION}")
        batch = dict(batch)
    tensors = tensors_in(batch)
    if not tensors:
        raise ValueError(f"a batch without any tensor cannot be trained on. {_CONVENTION}")
    for tensor in tensors:
        if not tensor.is_cpu:
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} in the batch is on {tensor.device}; "
                "optcpu trains on the CPU: move it with .cpu()."
            )
        if not tensor.numel() and tensor.dim() and tensor.shape[0] == 0:
            raise ValueError(
                f"a tensor in the batch has shape {tuple(tensor.shape)}: the batch is empty."
            )
    return batch


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        tensors: list[Tensor] = []
        for one in value:
            if isinstance(one, Tensor):
                tensors.append(one)
            else:
                tensors += tensors_in(one)
        return tensors
    if isinstance(value, Mapping):
        return tensors_in([*value.values()])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return tensors_in(fields)
    return []


def call_model(model: Callable[..., Any], batch: Batch) -> Any:
    """The model's output for one batch."""
    if isinstance(batch, dict):
        return model(**batch)
    if isinstance(batch, Tensor):
        return model(batch)
    inputs = batch[:-1] if len(batch) > 1 else batch
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        return model(**inputs[0])
    return model(*inputs)


def describe_call(batch: Batch) -> str:
    """The call that ``call_model`` makes, with the shapes and dtypes of its arguments."""
    if isinstance(batch, dict):
        return f"model(**{{{', '.join(f'{k!r}: {_describe(v)}' for k, v in batch.items())}}})"
    if isinstance(batch, Tensor):
        return f"model({_describe(batch)})"
    inputs = batch[:-1] if len(batch) > 1 else batch
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        return describe_call(dict(inputs[0]))
    return f"model({', '.join(map(_describe, inputs))})"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__


def default_loss(output: Any, batch: Batch) -> Tensor:
    """The loss that belongs to an output where none is given.

    The output's own ``loss`` (attribute or key) if it has one, as Hugging Face models do when they
    are given labels. Otherwise, from the batch's target: for integer targets the cross entropy of
    the output, or of its ``logits``; for float targets of the output's shape the mean squared
    error. Logits are ``(B, C)`` for targets ``(B,)``, ``(B, T, V)`` for ``(B, T)``, or
    ``(B, C, H, W)`` for ``(B, H, W)``. Computed in FP32.

    Raises:
        TypeError: if there is neither a loss in the output nor a target, or if the output is not
            one tensor.
        ValueError: if the shapes of output and target do not fit, a target is no class, or the batch is
            one sample.
    """
    if isinstance(output, Tensor):
        logits = output
    else:
        own = _entry(output, "loss")
        if isinstance(own, Tensor):
            return own
        logits = _entry(output, "logits")
    target = _target(batch)
    if _is_a_number(batch, target):
        raise ValueError(
            f"the target is one number, as of a single sample, with {describe_call(batch)}: there is no "
            f"batch dimension. {_BATCH_THEM}"
        )
    if target is None:
        raise TypeError(
            "there is no target for the default loss: the output has no .loss and the batch is not "
            "a tuple (*inputs, target). Pass loss=lambda output, batch: ..."
        )
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the default loss needs one tensor or an output with .logits or .loss, not "
            f"{type(output).__name__}. Pass loss=lambda output, batch: ..."
        )
    if target.is_floating_point():
        if logits.shape != target.shape:
            raise _misfit("mean squared error", logits, target)
        return F.mse_loss(logits.float(), target.float())
    axis = class_axis(logits, target)
    if axis is None:
        raise _misfit("cross entropy", logits, target)
    if axis == -1 and logits.dim() > 2:
        return _cross_entropy(logits.flatten(0, -2), target.flatten())
    return _cross_entropy(logits, target)


def _misfit(loss: str, output: Tensor, target: Tensor) -> ValueError:
    sample = "" if target.dim() else f" If these are single samples: {_BATCH_THEM}"
    return ValueError(
        f"{loss} does not fit output {_describe(output)} and target {_describe(target)}. Reshape them, "
        f"or pass loss=lambda output, batch: ...{sample}"
    )


def class_axis(logits: Tensor, target: Tensor) -> int | None:
    """The axis of ``logits`` that has the classes: -1 up to three dimensions, 1 where that alone fits.

    None where neither fits the shape of ``target``.
    """
    if logits.dim() != target.dim() + 1:
        return None
    if logits.dim() <= 3 and logits.shape[:-1] == target.shape:
        return -1
    return 1 if logits.shape[:1] + logits.shape[2:] == target.shape else None


def _target(batch: Batch) -> Tensor | None:
    if isinstance(batch, tuple) and len(batch) > 1 and isinstance(batch[-1], Tensor):
        return batch[-1]
    return None


def _is_a_number(batch: Batch, target: Tensor | None) -> bool:
    """Whether the target is one class; a number of floating point may be of a batch that is one thing."""
    if target is not None:
        return target.dim() == 0 and not target.is_floating_point()
    return isinstance(batch, tuple) and len(batch) > 1 and isinstance(batch[-1], (int, float))


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    try:
        if logits.dtype != torch.float32:
            logits = logits.float()
        return F.cross_entropy(logits, target if target.dtype == torch.int64 else target.long())
    except IndexError:  # only then is it worth the time to look at every target
        _check_classes(target, logits.shape[min(1, logits.dim() - 1)])
        raise


def check_targets(output: Any, batches: Sequence[Batch]) -> None:
    """Check the targets of all batches against the output for the first one.

    Does nothing where :func:`default_loss` is not a cross entropy.

    Raises:
        ValueError: a target is none of the output's classes.
    """
    has_loss = not isinstance(output, Tensor) and isinstance(_entry(output, "loss"), Tensor)
    logits = output if isinstance(output, Tensor) else _entry(output, "logits")
    first = _target(batches[0])
    if has_loss or not isinstance(logits, Tensor):
        return
    if first is None or first.is_floating_point():
        return
    classes = logits.shape[class_axis(logits, first) or 1]
    for batch in batches:
        target = _target(batch)
        if target is not None and not target.is_floating_point():
            _check_classes(target, classes)


def _check_classes(target: Tensor, classes: int) -> None:
    target = target.long()
    wrong = target[((target < 0) | (target >= classes)) & (target != LEFT_OUT)]
    if wrong.numel():
        raise ValueError(
            f"the target has class {int(wrong[0])}, but the output has {classes} classes, 0 to "
            f"{classes - 1}: number the classes from 0, give the model an output for each, or mark "
            f"what the loss shall leave out with {LEFT_OUT}."
        )


def _entry(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def signature(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """The shapes of a batch; batches of one signature need no recompilation."""
    return tuple(tuple(tensor.shape) for tensor in tensors_in(batch))


def units_in(batch: Batch) -> int:
    """Samples in a batch: the size of the first dimension of its first tensor that has one."""
    # A loop and no generator: each step asks, behind kernels that leave nothing of Python in the caches.
    for tensor in tensors_in(batch):
        if tensor.dim():
            return tensor.size(0)
    return 1


def whole_passes(steps: int, batches: Sequence[Batch], accumulation_steps: int) -> int:
    """``steps``, rounded up so that turns of any two variants see the same mix of batches.

    Nothing is rounded where all batches have the same shapes.
    """
    if len({signature(batch) for batch in batches}) == 1:
        return steps
    steps_per_pass = len(batches) // math.gcd(len(batches), accumulation_steps)
    return math.ceil(steps / steps_per_pass) * steps_per_pass


def to_fp32(value: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, detached, in FP32."""
    return [t.detach().to(torch.float32) for t in tensors_in(value) if t.is_floating_point()]
