"""What runs the steps of a variant: PyTorch, as the variant sets it up, or a peer of its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from optcpu.measure.accuracy import FirstStep, dropout_off
from optcpu.measure.batches import call_model, to_fp32
from optcpu.measure.payload import Payload
from optcpu.measure.variants import Variant, in_bf16, prepare


class Engine(Protocol):
    """Trains on the batches of a payload, which are told by their index."""

    def first_step(self, batch: int) -> FirstStep:
        """Output, loss and gradients of one batch, with nothing updated."""

    def step(self, batches: Sequence[int]) -> float:
        """One optimizer step on the mean of ``batches``; gives its loss."""

    def parameters(self) -> dict[str, Tensor]:
        """The parameters as they are now, by name; maybe the very tensors that are trained."""

    def forget_gradients(self) -> None:
        """Free what one step leaves to the next."""

    def dropout_off(self) -> AbstractContextManager[None]:
        """Within the block nothing is dropped."""


def make_engine(variant: Variant, payload: Payload, precision: str) -> Engine:
    """The engine of a variant."""
    if variant.name == "jax":
        # Imported here, as few have it.
        from optcpu.measure.jax.engine import JaxEngine

        return JaxEngine(payload, in_bf16(precision))
    return TorchEngine(variant, payload, precision)


class TorchEngine:
    """PyTorch; see :class:`Engine`."""

    def __init__(self, variant: Variant, payload: Payload, precision: str) -> None:
        self._batches, self._loss = payload.batches, payload.loss
        self._prepared = prepare(variant, payload.model, payload.optimizer, precision)

    def first_step(self, batch: int) -> FirstStep:
        self.forget_gradients()
        output, loss = self._forward(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return FirstStep(
            output=to_fp32(output),
            loss=loss.detach().float().reshape(()),
            gradients={
                name: parameter.grad.detach()
                for name, parameter in self._prepared.module.named_parameters()
                if parameter.grad is not None
            },
        )

    def step(self, batches: Sequence[int]) -> float:
        self.forget_gradients()
        total = torch.zeros(())
        for batch in batches:
            _, loss = self._forward(batch)
            (loss / len(batches)).backward()  # type: ignore[no-untyped-call]
            total += loss.detach().float().reshape(()) / len(batches)
        self._prepared.optimizer.step()
        return float(total)

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._prepared.module.named_parameters()}

    def forget_gradients(self) -> None:
        self._prepared.optimizer.zero_grad(set_to_none=True)

    def dropout_off(self) -> AbstractContextManager[None]:
        return dropout_off(self._prepared.module)

    def _forward(self, batch: int) -> tuple[Any, Tensor]:
        with self._prepared.autocast():
            output = call_model(self._prepared.call, self._batches[batch])
            return output, self._loss(output, self._batches[batch])
