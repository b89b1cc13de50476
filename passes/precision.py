"""BF16 around the operators that profit from it; everything else stays FP32.

The policy, as a table (:data:`POLICY`):

=================  ===============================================  =============================
family             operators                                        computed in BF16
=================  ===============================================  =============================
GEMM               mm, addmm                                        operands, bias, result
batched GEMM       bmm, baddbmm                                     operands, result
convolution        convolution, convolution_backward                operands, bias, results
attention          flash attention for CPU, forward and backward    q, k, v, results; masks stay
recurrent layer    mkldnn_rnn_layer, recurrent_steps, and their     input, weights, state; cells stay
                   backward
=================  ===============================================  =============================

Products are accumulated in FP32 by the hardware and rounded once. What is not in the table stays
FP32: norms, softmax and its log-sum-exp, attention masks (whose most negative number would round to
minus infinity), losses, reductions, residual sums, the optimizer, and the parameters themselves
(their BF16 copies are made inside the graph).

Before::

    y: f32 = addmm(b, x, w)

After::

    y_bf16 = addmm(bf16(b), bf16(x), bf16(w)); y: f32 = f32(y_bf16)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from passes.base import Pass
from passes.graph import aten, calls, cast, dtype, emit, value
from passes.recurrent import recurrent_steps, recurrent_steps_backward


@dataclass(frozen=True)
class Rule:
    """One line of the policy: the positions of the arguments of ``target`` that are cast to BF16."""

    family: str
    target: Any
    arguments: tuple[int, ...]


POLICY: tuple[Rule, ...] = (
    Rule("gemm", aten.mm.default, (0, 1)),
    Rule("gemm", aten.addmm.default, (0, 1, 2)),
    Rule("batched gemm", aten.bmm.default, (0, 1)),
    Rule("batched gemm", aten.baddbmm.default, (0, 1, 2)),
    Rule("convolution", aten.convolution.default, (0, 1, 2)),
    Rule("convolution", aten.convolution_backward.default, (0, 1, 2)),
    Rule("attention", aten._scaled_dot_product_flash_attention_for_cpu.default, (0, 1, 2)),
    Rule(
        "attention",
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        (0, 1, 2, 3, 4),
    ),
    Rule("recurrent layer", aten.mkldnn_rnn_layer.default, (0, 1, 2, 3, 4, 5, 6)),
    Rule(
        "recurrent layer",
        aten.mkldnn_rnn_layer_backward.default,
        (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12),
    ),
    Rule("recurrent layer", recurrent_steps, (0, 2, 4)),
    Rule("recurrent layer", recurrent_steps_backward, (0, 1, 4, 6, 7)),
)


@dataclass(frozen=True, repr=False)
class InsertCasts(Pass):
    """Compute the operators of :data:`POLICY` in BF16 where their operands are FP32.

    Fires once for each operator that is moved to BF16.
    """

    changes_numerics: ClassVar[bool] = True

    def __call__(self, graph: fx.Graph) -> int:
        rules = {rule.target: rule for rule in POLICY}
        fired = 0
        for node in calls(graph, *rules):
            if _is_fp32(node):
                _move_to_bf16(node, rules[node.target])
                fired += 1
        graph.eliminate_dead_code()
        return fired


def _is_fp32(node: fx.Node) -> bool:
    result = value(node)
    results = result if isinstance(result, (tuple, list)) else (result,)
    tensors = [r for r in results if isinstance(r, torch.Tensor)]
    return bool(tensors) and tensors[0].dtype == torch.float32 and tensors[0].device.type == "cpu"


def _move_to_bf16(node: fx.Node, rule: Rule) -> None:
    with node.graph.inserting_before(node):
        args = [
            _lower(node, argument) if position in rule.arguments else argument
            for position, argument in enumerate(node.args)
        ]
        lowered = emit(node, node.target, *args, **node.kwargs)  # type: ignore[arg-type]
    if isinstance(value(lowered), torch.Tensor):
        _replace(node, lowered)
        return
    for item in list(node.users):
        assert item.target is operator.getitem
        with node.graph.inserting_before(item):
            _replace(item, emit(item, operator.getitem, lowered, item.args[1]))
    # Attention counts as random, so that dead code elimination would let it stay.
    node.graph.erase_node(node)


def _lower(node: fx.Node, argument: Any) -> Any:
    if dtype(argument) == torch.float32:
        return cast(node, argument, torch.bfloat16)
    return argument


def _replace(node: fx.Node, lowered: fx.Node) -> None:
    """Let the users of ``node`` see ``lowered``, in the dtype that they expect."""
    expected = dtype(node)
    with node.graph.inserting_before(node):
        result = lowered if expected is None else cast(node, lowered, expected)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
