"""One optimizer step: its micro-batches, their gradients, the update."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optcpu.errors import OptcpuError, add_note, warn
from optcpu.measure.batches import Batch, Loss, as_batch, describe_call, units_in
from optcpu.optim.lookahead import Lookahead
from optcpu.runtime.clipping import clip_factor, scaled_step, total_norm
from optcpu.runtime.objective import objective
from optcpu.runtime.updates import count_passes
from optcpu.runtime.world import World

SomeTensor = TypeVar("SomeTensor", bound=Tensor)

_TOO_FEW = "Expected more than 1 value per channel"  # so PyTorch tells of batch norm


@dataclass
class MicroBatches:
    """The micro-batches of one optimizer step, and how far they are used.

    Attributes:
        batches: as :mod:`optcpu.measure.batches` describes them.
        before: the state of data and random generators from which they were drawn.
        total: samples in all of them, over all processes that share the step; at least 1.
        done: how many of them have gone through forward and backward.
        loss: the sum of their losses, each times its share of ``total``.
        bad: why the step must not be made, in words; None while all is well.
        sizes: samples in each; 0 where it only repeats what another process has.
    """

    batches: list[Batch]
    before: dict[str, Any]
    total: int
    done: int = 0
    loss: float = 0.0
    bad: str | None = None
    sizes: list[int] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the gradient is."""
        return self.done == len(self.batches) or self.bad is not None


def collect(
    raw: list[Any],
    before: dict[str, Any],
    size_of: Callable[[Batch], int],
    sum_over_all: Callable[[float], tuple[float, ...]],
    repeated: Collection[int] = (),
) -> MicroBatches:
    """Make the batches that a loader gave those of one step.

    Args:
        raw: at least one.
        before: the state of data and generators from which they were drawn.
        size_of: counts the samples in a batch.
        sum_over_all: of a number in each of the processes that share a step.
        repeated: the places of batches that another process has, too, and that count nothing here.

    Raises:
        TypeError, ValueError: one of them is no batch.
    """
    batches, sizes = [], []
    for place, one in enumerate(raw):
        batch = as_batch(tuple(one) if isinstance(one, list) else one)
        size = size_of(batch)
        if type(size) is not int:
            size = _whole(size)
        if size < 1:
            raise ValueError(f"a micro-batch counts {size} samples; at least 1 was expected")
        batches.append(batch)
        sizes.append(0 if place in repeated else size)
    (total,) = sum_over_all(float(sum(sizes)))
    return MicroBatches(batches, before, max(int(total), 1), sizes=sizes)


def _whole(size: Any) -> int:
    """``size`` as an integer: that of Python, NumPy or a tensor with one."""
    try:
        return operator.index(size)
    except TypeError:
        raise TypeError(
            f"size_of must give the number of samples in a batch, an integer, not {size!r}"
        ) from None


class StepRunner:
    """Runs micro-batches and updates.

    The gradient of a step is that of the mean loss over all its samples: each micro-batch counts by
    its size, so that an incomplete one at the end of an epoch does not count for more than it holds.

    Args:
        model: in training mode.
        optimizer: of its parameters.
        loss: of an output and its batch: the mean over the batch. One that is a module is trained, too.
        world: the processes that train together.
        max_grad_norm: clip the gradient to this norm; None leaves it.
        check_gradients: look whether the gradient is finite, also where no norm is needed.
        local_steps: steps that each process makes by itself before all average their weights; None adds
            up the gradients of all processes in each step.
        compile_loss: whether the loss may be compiled with the model.
        updates_in_backward: whether the optimizer updates before the gradient is complete.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Loss,
        world: World,
        *,
        max_grad_norm: float | None,
        check_gradients: bool,
        local_steps: int | None = None,
        compile_loss: bool = False,
        updates_in_backward: bool = False,
    ) -> None:
        self._optimizer, self._world = optimizer, world
        self._objective = objective(model, loss, compile_loss=compile_loss)
        self._max_grad_norm, self._check_gradients = max_grad_norm, check_gradients
        self._updates_in_backward = updates_in_backward
        self._trained = trained_parameters(model, loss)
        # An optimizer may have parameters that these have not, and the other way round.
        updated = (p for group in optimizer.param_groups for p in group["params"])
        self._parameters = list(dict.fromkeys([*self._trained.values(), *updated]))
        self._frozen = {name: p for name, p in self._trained.items() if not p.requires_grad}
        self._local_steps = local_steps if world.size > 1 else None
        self._steps_alone = 0
        if self._local_steps is not None and isinstance(optimizer, Lookahead):
            optimizer.average = world.average

    def begin(self, step: MicroBatches) -> None:
        """Expect the micro-batches of ``step`` that are not done."""
        if self._updates_in_backward:
            count_passes(self._optimizer, step.done)

    def run_micro_batch(self, step: MicroBatches) -> None:
        """Forward and backward of the next micro-batch of ``step``; its gradient is added."""
        batch = step.batches[step.done]
        try:
            loss = self._objective(batch)
        except Exception as error:
            if _TOO_FEW not in str(error):
                if not isinstance(error, OptcpuError):  # which says what to do
                    add_note(error, f"the model or its loss failed: {describe_call(batch)}")
                raise
            raise OptcpuError(
                f"batch norm needs two samples or more, and {describe_call(batch)} has too few: leave an "
                "incomplete last batch out with drop_last=True, or choose another batch_size"
            ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
            what: object = type(loss).__name__
            if isinstance(loss, Tensor):
                what = loss.dtype if loss.is_complex() else tuple(loss.shape)
            raise TypeError(
                f"the loss must be a tensor with one real number, the mean over the batch, not {what}"
            )
        if not loss.requires_grad:
            raise TypeError(
                "the loss depends on no parameter that is trained: compute it from the model's output "
                "without detach(), item() or torch.no_grad()"
            )
        value = loss.item()
        if not math.isfinite(value):
            step.bad = f"the loss of {describe_call(batch)} is {value}"
            step.loss = value
            return
        share = step.sizes[step.done] / step.total
        (loss if share == 1 else loss * share).backward()  # type: ignore[no-untyped-call]
        step.loss += value * share
        step.done += 1

    def gradient_norm(self, step: MicroBatches) -> float | None:
        """Make the gradient that of all processes; its norm where it is needed.

        A gradient that is not finite makes ``step`` bad.
        """
        self._agree_on_failure(step)
        if step.bad is not None:
            return None
        if self._local_steps is None:
            self._world.sum_gradients(self._parameters)
        if self._max_grad_norm is None and not self._check_gradients:
            return None
        norm = self._checked_norm(step)
        if self._local_steps is not None:  # each has a gradient of its own
            self._agree_on_failure(step)
        return norm

    def _checked_norm(self, step: MicroBatches) -> float | None:
        if self._updates_in_backward:  # the gradients are gone, and show in what they have done
            name = not_finite(self._trained)
            step.bad = None if name is None else f"the weights of {name!r} are not finite"
            return None
        norm = total_norm(self._gradients())
        if not math.isfinite(norm):
            step.bad = f"the norm of the gradient is {norm}"
        return norm

    def update(self, norm: float | None) -> None:
        """Clip, update, and forget the gradient."""
        limit, factor = self._max_grad_norm, 1.0
        if limit is not None and norm is not None:
            factor = clip_factor(limit, norm, self._gradients())
        if self._frozen:
            self._look_at_unfrozen()
        if factor < 1:
            scaled_step(self._optimizer, self._gradients(), factor)
        else:
            self._optimizer.step()
        self.forget_gradients()
        self._steps_alone += 1
        if isinstance(self._optimizer, Lookahead):
            if self._optimizer.steps % self._optimizer.k == 0:  # it has averaged the weights
                self._steps_alone = 0
        elif self._steps_alone == self._local_steps:
            self.meet()

    def _look_at_unfrozen(self) -> None:
        """Warn of parameters that a callback has unfrozen, and the optimizer does not have."""
        unfrozen = [name for name, p in self._frozen.items() if p.grad is not None]
        if not unfrozen:
            return
        updated = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        left = [name for name in unfrozen if id(self._frozen.pop(name)) not in updated]
        if left:
            warn(
                f"{len(left)} parameters have been unfrozen that the optimizer does not have ({left[0]!r} "
                "is the first): they stay as they are. Remedy: trainer.optimizer.add_param_group, or give "
                "the trainer an optimizer that has all parameters"
            )

    @property
    def has_met(self) -> bool:
        """Whether all processes have the same weights."""
        return self._local_steps is None or self._steps_alone == 0

    def meet(self) -> None:
        """Average the weights of all processes, if each has made steps by itself since the last time."""
        if self.has_met:
            return
        self._world.average(self._parameters)
        self._steps_alone = 0

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def forget_gradients(self) -> None:
        """Free all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def _agree_on_failure(self, step: MicroBatches) -> None:
        (failed,) = self._world.sum_numbers(float(step.bad is not None))
        if failed and step.bad is None:
            step.bad = "another process met a loss or a gradient that is not finite"


def trained_parameters(model: nn.Module, loss: Loss) -> dict[str, nn.Parameter]:
    """The parameters of the model by name, and those that a loss has besides, as ``loss.weight``."""
    parameters = dict(model.named_parameters())
    if not isinstance(loss, nn.Module):
        return parameters
    known = set(map(id, parameters.values()))
    others = {name: p for name, p in loss.named_parameters() if id(p) not in known}
    return parameters | _of_loss(others, parameters)


def buffers_of(model: nn.Module, loss: Loss) -> dict[str, Tensor]:
    """The buffers of the model by name, and those of a loss that is a module, as ``loss.weight``."""
    buffers = dict(model.named_buffers())
    if not isinstance(loss, nn.Module):
        return buffers
    return buffers | _of_loss(dict(loss.named_buffers()), buffers)


def _of_loss(
    tensors: dict[str, SomeTensor], models: dict[str, SomeTensor]
) -> dict[str, SomeTensor]:
    """Names for tensors of a loss: ``loss.weight``, or ``loss..weight`` where the model has the former.

    No module's name is empty, so that no model has the latter.
    """
    return {
        f"loss..{name}" if f"loss.{name}" in models else f"loss.{name}": tensor
        for name, tensor in tensors.items()
    }


def not_finite(parameters: Mapping[str, nn.Parameter]) -> str | None:
    """The name of the first parameter with a weight that is not finite; None if all are."""
    for name, parameter in parameters.items():
        if not torch.isfinite(parameter.detach()).all():
            return name
    return None


def gradients_by_name(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients that are there, by the names of their parameters."""
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


def restore_gradients(parameters: Mapping[str, nn.Parameter], gradients: dict[str, Tensor]) -> None:
    """Put back what :func:`gradients_by_name` gave."""
    for name, gradient in gradients.items():
        if name not in parameters:
            raise OptcpuError(f"the checkpoint has a gradient for {name!r}, which the model lacks")
        parameters[name].grad = gradient.clone()


def samples_in(batch: Batch) -> int:
    """The size of a batch where the user does not say otherwise."""
    return units_in(batch)
