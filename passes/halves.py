"""Weights that are stored in two halves: BF16 products read the upper half as it is.

An FP32 number can be kept as a BF16 number, rounded to nearest, and the int16 difference of the bits.
Reading both gives the FP32 number; the BF16 half alone is what a cast to BF16 would give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from passes.base import Pass
from passes.graph import aten, calls, cast, convert, dtype, emit, is_cast
from passes.operators import define


def _join(high: Tensor, low: Tensor) -> Tensor:
    bits = (high.view(torch.int16).int() << 16) + low.int()
    return bits.view(torch.float32)


join = define(
    "join(Tensor high, Tensor low) -> Tensor",
    _join,
    lambda high, low: torch.empty_like(high, dtype=torch.float32),
)


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The FP32 numbers of which ``high`` (BF16) and ``low`` (int16) are the halves."""
    result: Tensor = join(high, low)
    return result


@dataclass(frozen=True, repr=False)
class ReadUpperHalves(Pass):
    """Compute in BF16 from the upper half of a split weight, without putting it together.

    Before::

        w = optcpu.join(high, low); y = mm(x, permute(bf16(w), [1, 0])); n = norm(w)

    After::

        y = mm(x, permute(high, [1, 0])); n = norm(view(i32(view(high, i16)) << 16 + i32(low), f32))

    What wants the whole number has it put together by generated code. Fires once for each cast that
    is gone.
    """

    def __call__(self, graph: fx.Graph) -> int:
        fired = 0
        for node in calls(graph, join):
            high = node.args[0]
            assert isinstance(high, fx.Node)
            for user in list(node.users):
                if is_cast(user) and dtype(user) == torch.bfloat16:
                    user.replace_all_uses_with(high)
                    graph.erase_node(user)
                    fired += 1
            if node.users:
                _write_out(node)
            graph.erase_node(node)
        return fired


def _write_out(node: fx.Node) -> None:
    high, low = node.args
    with node.graph.inserting_before(node):
        upper = emit(node, aten.view.dtype, high, torch.int16)
        upper = emit(node, convert, upper, torch.int32)
        upper = emit(node, aten.bitwise_left_shift.Tensor_Scalar, upper, 16)
        bits = emit(node, aten.add.Tensor, upper, emit(node, convert, low, torch.int32))
        node.replace_all_uses_with(emit(node, aten.view.dtype, bits, torch.float32))


@dataclass(frozen=True, repr=False)
class GradientsInBf16(Pass):
    """Give weights that are stored as BF16 a BF16 gradient: 2 bytes a parameter to write, keep and read.

    Before::

        g: bf16 = mm(d, x); return [..., f32(g), add(f32(h), e)]

    After::

        g: bf16 = mm(d, x); return [..., g, bf16(add(f32(h), e))]

    Autograd takes it as it is where the weight allows gradients of any dtype, and casts it otherwise.
    PyTorch 2.8 does not tell which gradient is whose, and has FP32 gradients alone: there nothing
    fires. Fires once a gradient.
    """

    changes_numerics: ClassVar[bool] = True
    narrows_outputs: ClassVar[bool] = True

    def __call__(self, graph: fx.Graph) -> int:
        output = graph.output_node()
        descriptions = output.meta.get("desc")
        if descriptions is None:
            return 0
        stored = _stored_as_bf16(graph)
        results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
        whose = [getattr(description, "grad_of", None) for description in descriptions]
        fired = 0
        for place, weight in enumerate(whose):
            if weight in stored and dtype(results[place]) == torch.float32:
                with graph.inserting_before(output):
                    results[place] = cast(results[place], results[place], torch.bfloat16)
                fired += 1
        if fired:
            output.args = (tuple(results),)
        return fired


def _stored_as_bf16(graph: fx.Graph) -> set[Any]:
    """What describes the weights of which the graph takes a BF16 part in place of the whole."""
    parts = (
        node.meta.get("desc")
        for node in graph.find_nodes(op="placeholder")
        if dtype(node) == torch.bfloat16
    )
    return {part.base for part in parts if hasattr(part, "base")}
