"""Training a PyTorch model with JAX: ``jax.jit`` around the whole step, ``optax`` for the update."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
from torch import Tensor
from torch.optim import Optimizer

from optcpu.errors import OptcpuError
from optcpu.measure.accuracy import FirstStep
from optcpu.measure.batches import signature, tensors_in
from optcpu.measure.jax.program import Arrays, Program, to_jax, to_torch
from optcpu.measure.payload import Payload


class JaxEngine:
    """A model, its optimizer and its batches in JAX; see :class:`optcpu.measure.engine.Engine`.

    Args:
        payload: what is trained.
        bf16: whether products are computed in BF16.

    Raises:
        OptcpuError: something of it has no counterpart in JAX.
    """

    def __init__(self, payload: Payload, bf16: bool) -> None:
        model, batches = payload.model, payload.batches
        dtype = jnp.bfloat16 if bf16 else jnp.float32
        self._shapes = [signature(batch) for batch in batches]
        self._inputs = [[to_jax(tensor) for tensor in tensors_in(batch)] for batch in batches]
        self._programs: dict[Any, Program] = {}
        for shapes, batch in zip(self._shapes, batches, strict=True):
            if shapes not in self._programs:
                self._programs[shapes] = Program(model, payload.loss, batch, dtype)
        self._compiled: dict[Any, Any] = {}

        parameters = dict(model.named_parameters())
        self._names = list(parameters)
        self._optimizer = as_optax(payload.optimizer(list(parameters.values())))
        self._weights: Arrays = {n: to_jax(p) for n, p in parameters.items() if p.requires_grad}
        others = {**parameters, **dict(model.named_buffers())}
        self._others = {n: to_jax(t) for n, t in others.items() if n not in self._weights}
        self._state = self._optimizer.init(self._weights)
        self._update = jax.jit(self._updated, donate_argnums=(0, 1))
        self._add = jax.jit(lambda x, y: jax.tree.map(jnp.add, x, y), donate_argnums=0)
        for parameter in parameters.values():
            parameter.data = parameter.data.new_empty(0)  # no second copy in its memory

    def first_step(self, batch: int) -> FirstStep:
        """Output, loss and gradients, with nothing updated."""
        gradient_of = jax.jit(self._gradient_of(self._shapes[batch]))
        (loss, (outputs, _)), gradients = gradient_of(
            self._weights, self._others, self._inputs[batch]
        )
        return FirstStep(
            output=[to_torch(output).float() for output in outputs],
            loss=to_torch(loss),
            gradients={name: to_torch(gradient) for name, gradient in gradients.items()},
        )

    def step(self, batches: Sequence[int]) -> float:
        """One optimizer step; gives the mean loss."""
        if len(batches) == 1:
            step = self._compile(batches[0], self._whole_step, donate=(0, 1, 2))
            self._weights, self._state, self._others, loss = step(
                self._weights, self._state, self._others, self._inputs[batches[0]]
            )
            return float(loss)
        total, gradients = 0.0, None
        for batch in batches:
            gradient_of = self._compile(batch, self._gradient_of)
            (loss, (_, changed)), own = gradient_of(
                self._weights, self._others, self._inputs[batch]
            )
            self._others = self._others | changed
            gradients = own if gradients is None else self._add(gradients, own)
            total += float(loss) / len(batches)
        self._weights, self._state = self._update(
            self._weights, self._state, gradients, 1 / len(batches)
        )
        jax.block_until_ready(self._weights)
        return total

    def parameters(self) -> dict[str, Tensor]:
        """Copies of the parameters, by name."""
        values = self._others | self._weights
        return {name: to_torch(values[name]) for name in self._names}

    def forget_gradients(self) -> None:
        """Nothing: none outlives its step."""

    def dropout_off(self) -> AbstractContextManager[None]:
        """Nothing: models that drop anything are refused."""
        return nullcontext()

    def _compile(self, batch: int, make: Any, donate: tuple[int, ...] = ()) -> Any:
        shapes = self._shapes[batch]
        if (make, shapes) not in self._compiled:
            self._compiled[make, shapes] = jax.jit(make(shapes), donate_argnums=donate)
        return self._compiled[make, shapes]

    def _gradient_of(self, shapes: Any) -> Any:
        """Of weights, all other tensors and inputs: loss, outputs, changed buffers; and gradients."""
        program = self._programs[shapes]

        def loss(weights: Arrays, others: Arrays, inputs: Any) -> Any:
            return program({**others, **weights}, inputs)

        return jax.value_and_grad(loss, has_aux=True)

    def _whole_step(self, shapes: Any) -> Any:
        gradient_of = self._gradient_of(shapes)

        def step(weights: Arrays, state: Any, others: Arrays, inputs: Any) -> Any:
            (loss, (_, changed)), gradients = gradient_of(weights, others, inputs)
            return *self._updated(weights, state, gradients, 1), others | changed, loss

        return step

    def _updated(self, weights: Arrays, state: Any, gradients: Arrays, share: float) -> Any:
        gradients = jax.tree.map(lambda gradient: gradient * share, gradients)
        changes, state = self._optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, changes), state


def as_optax(optimizer: Optimizer) -> Any:
    """The same optimizer in optax.

    Raises:
        OptcpuError: it is not AdamW, Adam or SGD with one group of parameters and the usual options.
    """
    group = optimizer.param_groups[0]
    usual = len(optimizer.param_groups) == 1 and not group.get("maximize")
    if type(optimizer) in (torch.optim.AdamW, torch.optim.Adam) and not group["amsgrad"] and usual:
        adam = optax.scale_by_adam(*group["betas"], eps=group["eps"])
        decay = optax.add_decayed_weights(group["weight_decay"])
        decoupled = type(optimizer) is torch.optim.AdamW
        parts = (adam, decay) if decoupled else (decay, adam)
        return optax.chain(*parts, optax.scale_by_learning_rate(float(group["lr"])))
    if type(optimizer) is torch.optim.SGD and group["dampening"] == 0 and usual:
        momentum = optax.trace(group["momentum"], nesterov=group["nesterov"])
        return optax.chain(
            optax.add_decayed_weights(group["weight_decay"]),
            momentum if group["momentum"] else optax.identity(),
            optax.scale_by_learning_rate(float(group["lr"])),
        )
    raise OptcpuError(
        f"the jax variant has no counterpart for {type(optimizer).__name__} with these options: it knows "
        "AdamW, Adam and SGD with one group of parameters"
    )
