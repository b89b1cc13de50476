"""A PyTorch model and its loss, exported as a graph, as a function of JAX arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from optcpu.errors import OptcpuError
from optcpu.measure.batches import Batch, Loss, call_model, tensors_in
from optcpu.measure.jax.operators import RULES, Array, Policy, batch_norm

Arrays = dict[str, Array]


class _WithLoss(nn.Module):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        output = call_model(self.model, batch)
        return self.loss(output, batch), [t for t in tensors_in(output) if t.is_floating_point()]


class Program:
    """Loss and outputs for batches of the shapes of one.

    Args:
        model: in training mode.
        loss: of an output and its batch.
        batch: an example.
        dtype: of products, as JAX names it.

    Raises:
        OptcpuError: the model cannot be exported, or has an operator without a counterpart.
    """

    def __init__(self, model: nn.Module, loss: Loss, batch: Batch, dtype: Any) -> None:
        try:
            exported = torch.export.export(_WithLoss(model, loss), (batch,))
        except Exception as error:
            raise OptcpuError(
                f"the jax variant needs a model that torch.export takes: {type(error).__name__}: {error}"
            ) from error
        self._graph = exported.graph_module
        self._names: list[str | None] = []  # of parameters and buffers; None for what the batch has
        self._constants: Arrays = {}
        names = _first_names(model)
        for spec in exported.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                self._names.append(None)
                continue
            assert spec.target is not None
            name = spec.target.removeprefix("model.")
            if spec.kind is InputKind.CONSTANT_TENSOR:
                self._constants[name] = to_jax(exported.constants[spec.target])
            self._names.append(names.get(name, name))
        self._policy = Policy(dtype)
        self._check()

    def _check(self) -> None:
        targets = {node.target for node in self._graph.graph.nodes if node.op == "call_function"}
        unknown = sorted(str(target) for target in targets - RULES.keys() - _IN_PLACE)
        if unknown:
            raise OptcpuError(
                f"the jax variant has no {', '.join(unknown)}: it knows the operators of the suite's models"
            )

    def __call__(self, state: Mapping[str, Array], inputs: list[Array]) -> tuple[Array, Any]:
        """The loss; and the outputs with the buffers that have changed.

        Args:
            state: parameters and buffers by name.
            inputs: the tensors of a batch, in order.
        """
        given = iter(inputs)
        known = {**self._constants, **state}
        arguments = [next(given) if name is None else known[name] for name in self._names]
        run = _Run(self._graph, self._policy, self._names)
        loss, *outputs = run.run(*arguments)
        return loss.astype(jnp.float32), (outputs, run.changed)


_IN_PLACE = {torch.ops.aten.add_.Tensor, torch.ops.aten.batch_norm.default}


class _Run(fx.Interpreter):
    """Runs the graph once, on JAX's arrays."""

    def __init__(self, graph: fx.GraphModule, policy: Policy, names: list[str | None]) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self._policy = policy
        placeholders = graph.graph.find_nodes(op="placeholder")
        self._names = dict(zip(placeholders, names, strict=True))
        self.changed: Arrays = {}

    def run_node(self, node: fx.Node) -> Any:
        if node.op != "call_function":
            return super().run_node(node)
        arguments, options = self.fetch_args_kwargs_from_env(node)
        if node.target is torch.ops.aten.add_.Tensor:
            result = arguments[0] + arguments[1]
            self._change(node.args[0], result)
            return result
        if node.target is torch.ops.aten.batch_norm.default:
            x, weight, bias, mean, variance, training, momentum, eps, _ = arguments
            if not training:
                raise OptcpuError("the jax variant has no batch norm in evaluation mode")
            result, mean, variance = batch_norm(x, weight, bias, mean, variance, momentum, eps)
            if mean is not None:
                self._change(node.args[3], mean)
                self._change(node.args[4], variance)
            return result
        return RULES[node.target](self._policy, *arguments, **options)

    def _change(self, place: Any, value: Array) -> None:
        name = self._names.get(place)
        if name is None:
            raise OptcpuError("the jax variant writes in place to buffers alone")
        self.changed[name] = self.env[place] = value


def _first_names(model: nn.Module) -> dict[str, str]:
    """The name of each parameter and buffer, also of those that have several, as ``named_parameters``."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def to_jax(tensor: Tensor) -> Array:
    """A copy as JAX's array; integers have 32 bits there."""
    return jnp.array(tensor.detach().numpy())


def to_torch(array: Array) -> Tensor:
    """A copy as PyTorch's tensor, FP32 where it is BF16."""
    dtype = array.dtype if array.dtype != jnp.bfloat16 else jnp.float32
    return torch.from_numpy(np.array(array.astype(dtype)))
