"""Activations: kept whole while passes look for them, then written out for the code generator.

PyTorch normally decomposes ``gelu`` and its like while it captures the graph, which leaves ten
pointwise operators that no pass recognises. optcpu keeps the operators of
:data:`ACTIVATION_EXPANSIONS` as they are and :func:`expand_activations` writes out what no fusion took,
in the form that runs fastest on CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from passes.base import Pass
from passes.graph import aten, calls, cast, dtype, fill_value, is_rounding, value


@dataclass(frozen=True, repr=False)
class SaveOutputsInBf16(Pass):
    """Let the backward of an activation read the BF16 copy of its output that a GEMM reads anyway.

    Before::

        y = tanh(x); h = mm(bf16(y), w); ...; dx = tanh_backward(dy, y)

    After::

        y = tanh(x); y_bf16 = bf16(y); h = mm(y_bf16, w); ...; dx = tanh_backward(dy, f32(y_bf16))

    so that one tensor of half the size is kept for the backward. For tanh and sigmoid, eager autocast
    rounds there, too; the sign of a ReLU's output is not changed by rounding. Fires once for each
    backward operator that is moved.
    """

    changes_numerics: ClassVar[bool] = True

    def __call__(self, graph: fx.Graph) -> int:
        fired = 0
        for node in calls(graph, *_FROM_OUTPUT):
            output = node.args[1]
            assert isinstance(output, fx.Node)
            copies = [user for user in output.users if is_rounding(user) and user < node]
            if dtype(output) != torch.float32 or not copies:
                continue
            with graph.inserting_before(node):
                node.update_arg(1, cast(node, copies[0], torch.float32))
            fired += 1
        return fired


_FROM_OUTPUT = (
    aten.threshold_backward.default,
    aten.tanh_backward.default,
    aten.sigmoid_backward.default,
)


def _relu_backward(gradient: Tensor, output: Tensor, threshold: float) -> Tensor:
    return torch.where(output <= threshold, 0.0, gradient)


def _tanh_backward(gradient: Tensor, output: Tensor) -> Tensor:
    return gradient * (1 - output * output)


def _sigmoid_backward(gradient: Tensor, output: Tensor) -> Tensor:
    return gradient * output * (1 - output)


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return gradient * (s * (1 + x * (1 - s)))


# tanh(u) = 2 sigmoid(2u) - 1, so the tanh form of GELU is x * sigmoid(2u): the same function by one
# exponential, where a vectorised tanh costs about three times as much.
_TWO_ROOT = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return x * torch.sigmoid(_TWO_ROOT * (x + _CUBIC * x * x * x))
    return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


def _gelu_backward(gradient: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        s = torch.sigmoid(_TWO_ROOT * (x + _CUBIC * x * x * x))
        inner = _TWO_ROOT * (1 + 3 * _CUBIC * x * x)
        return gradient * (s + x * s * (1 - s) * inner)
    cumulative = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    density = torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return gradient * (cumulative + x * density)


ACTIVATION_EXPANSIONS: dict[Any, Callable[..., Tensor]] = {
    aten.threshold_backward.default: _relu_backward,
    aten.tanh_backward.default: _tanh_backward,
    aten.sigmoid_backward.default: _sigmoid_backward,
    aten.silu.default: _silu,
    aten.silu_backward.default: _silu_backward,
    aten.gelu.default: _gelu,
    aten.gelu_backward.default: _gelu_backward,
}


def expand_activations(graph: fx.Graph) -> int:
    """Write out every operator of :data:`ACTIVATION_EXPANSIONS` that is left; return how many there were.

    BF16 operands are computed in FP32 and rounded once.
    """
    fired = 0
    for node in calls(graph, *ACTIVATION_EXPANSIONS):
        formula = ACTIVATION_EXPANSIONS[node.target]
        if value(node).is_complex():
            formula = select_decomp_table()[node.target]  # ours are those of real numbers
        write_out(node, formula)
        fired += 1
    return fired


def write_out(node: fx.Node, formula: Callable[..., Tensor]) -> None:
    """Replace ``node`` by the operators of ``formula``, which takes its tensors before all else."""
    expected = value(node)
    table = select_decomp_table()
    tensors = [arg for arg in node.args if isinstance(arg, fx.Node)]
    scalars = [arg for arg in node.args if not isinstance(arg, fx.Node)]

    def in_fp32(*arguments: Tensor) -> Tensor:
        wide = [a.float() if a.dtype == torch.bfloat16 else a for a in arguments]
        return formula(*wide, *scalars, **node.kwargs).to(expected.dtype)

    with expected.fake_mode:
        body = make_fx(in_fp32, table)(*[value(t) for t in tensors]).graph
    inputs = [n for n in body.nodes if n.op == "placeholder"]
    copies: dict[fx.Node, Any] = dict(zip(inputs, tensors, strict=True))
    with node.graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op != "call_function":
                continue
            copy = node.graph.node_copy(inner, lambda n: copies[n])
            copy.meta = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")}
            fill_value(copy)
            copies[inner] = copy
    (output,) = (n for n in body.nodes if n.op == "output")
    node.replace_all_uses_with(copies[output.args[0]])
    node.graph.erase_node(node)
