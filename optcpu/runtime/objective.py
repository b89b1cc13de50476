"""The loss of a batch: the model and the loss behind it, compiled as one where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from optcpu.compiled_call import compiled_call
from optcpu.measure.batches import Batch, Loss, call_model
from optcpu.recurrent import runs_eagerly_in_part

Objective: TypeAlias = Callable[[Batch], Tensor]


def objective(model: nn.Module, loss: Loss, *, compile_loss: bool) -> Objective:
    """A function of a batch that gives its loss.

    Compiled as one graph with the model, the loss leaves nothing of the output in memory that it does not
    need, and its operators join those of the model. That is done where the model is compiled as a whole,
    by :func:`optcpu.optimize`, and has no recurrent layer at which its graph would break.

    Args:
        model: compiled or not.
        loss: of an output and its batch.
        compile_loss: whether ``loss`` may be compiled.
    """

    def eager_loss(batch: Batch) -> Tensor:
        return loss(call_model(model, batch), batch)

    present = compiled_call(model)
    if present is None or not compile_loss:
        return eager_loss
    if runs_eagerly_in_part(model, present.settings.precision):
        return eager_loss
    compiled = present.with_loss(model, loss, eager_loss)

    def compiled_loss(batch: Batch) -> Tensor:
        try:
            result: Tensor = compiled(batch)
        except IndexError:
            eager_loss(batch)  # tells of a wrong target what was expected
            raise
        return result

    return compiled_loss


def is_own(loss: Loss) -> bool:
    """Whether ``loss`` is one of optcpu's, which all can be compiled, and in FP32 stay as they are."""
    return (getattr(loss, "__module__", None) or "").partition(".")[0] == "optcpu"
