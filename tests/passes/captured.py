"""What the tests of the passes share: graphs as the passes see them, and a model run through them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from optcpu.backend import Backend
from optcpu.pipeline import Pipeline
from optcpu.record import Record
from passes import KEPT_WHOLE, Pass

BF16, FP32 = torch.bfloat16, torch.float32


def operators(graph: fx.Graph) -> list[str]:
    """The names of the operators a graph calls, in order: ``["aten.mm", "optcpu.linear", …]``."""
    return [
        name_of(node.target)
        for node in graph.nodes
        if node.op == "call_function" and node.target is not operator.getitem
    ]


def name_of(target: Any) -> str:
    if target is torch.ops.prims.convert_element_type.default:
        return "cast"
    name = str(target)
    return name.removesuffix(".default")


def traced(
    function: Callable[..., Any], *inputs: Tensor, dynamic: Sequence[int] = ()
) -> fx.GraphModule:
    """The graph of ``function`` as passes see it: ATen operators with fake values.

    Args:
        dynamic: which inputs have a symbolic first size.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [
        mode.from_tensor(
            tensor,
            symbolic_context=StatelessSymbolicContext(
                dynamic_sizes=[
                    DimDynamic.DYNAMIC if axis == 0 and index in dynamic else DimDynamic.STATIC
                    for axis in range(tensor.dim())
                ]
            ),
        )
        for index, tensor in enumerate(inputs)
    ]
    table = {k: v for k, v in select_decomp_table().items() if k not in KEPT_WHOLE}
    with mode:
        return make_fx(
            lambda *args: function(*args), table, tracing_mode="symbolic" if dynamic else "fake"
        )(*fakes)


def rewritten(step: Pass, module: fx.GraphModule) -> int:
    """Run a pass over a module, check that the graph is sound, and return how often it fired."""
    fired = step(module.graph)
    module.graph.lint()
    module.recompile()
    return fired


@dataclass
class Run:
    """What a model computed and what the passes did meanwhile."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    record: Record

    def fired(self, name: str) -> int:
        """How often a pass fired, over all graphs."""
        return self.record.counts()[name]

    def operators(self, kind: str) -> list[str]:
        """The operators of the last graph of a kind after its passes."""
        (*_, graph) = (g.final for g in self.record.graphs if g.kind == kind)
        assert graph is not None
        return operators(graph)


def run(
    model: nn.Module,
    *inputs: Tensor,
    passes: Sequence[Pass],
    dynamic: bool | None = None,
    fallback: bool = False,
) -> Run:
    """Forward and backward of a model through ``passes``, without code generation."""
    record = Record(keep_graphs=True)
    backend = Backend(Pipeline.of(passes), fallback=fallback, record=record, codegen=False)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    outputs, gradients = step(compiled, model, *inputs)
    return Run(outputs, gradients, record)


def step(
    call: Callable[..., Any], model: nn.Module, *inputs: Tensor
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs of ``call`` and the gradients of the model's parameters and of the inputs."""
    model.zero_grad(set_to_none=True)
    for tensor in inputs:
        tensor.grad = None
    result = call(*inputs)
    outputs = list(result) if isinstance(result, (tuple, list)) else [result]
    differentiable = [t for t in outputs if t.requires_grad]
    if differentiable:
        torch.autograd.backward(differentiable, [_gradient_of(t) for t in differentiable])
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients |= {f"input {i}": t.grad for i, t in enumerate(inputs) if t.requires_grad}
    return [t.detach() for t in outputs], gradients


def _gradient_of(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(output.numel())
    return torch.randn(output.shape, generator=generator, dtype=output.dtype)


def error(result: Tensor, reference: Tensor) -> float:
    """The L2 norm of the difference relative to that of the reference."""
    difference = (result.double() - reference.double()).norm()
    return float(difference / reference.double().norm().clamp_min(1e-30))


def assert_parity(
    model: nn.Module, *inputs: Tensor, passes: Sequence[Pass], dynamic: bool | None = None
) -> Run:
    """Run a model eagerly and through exact passes; everything must be equal within FP32 rounding."""
    outputs, gradients = step(model, model, *inputs)
    result = run(model, *inputs, passes=passes, dynamic=dynamic)
    assert len(result.outputs) == len(outputs)
    for got, expected in zip(result.outputs, outputs, strict=True):
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert error(got, expected) < 2e-6
    assert gradients.keys() == result.gradients.keys()
    scale = max((g.norm() for g in gradients.values() if g is not None), default=torch.ones(()))
    for name, expected in gradients.items():
        got = result.gradients[name]
        assert (got is None) == (expected is None), name
        if got is not None and expected is not None:
            assert got.shape == expected.shape, name
            assert got.dtype == expected.dtype, name
            floor = 1e-6 * float(scale)
            assert (got - expected).norm() <= 2e-5 * expected.norm() + floor, name
    return result


def assert_bf16_parity(
    model: nn.Module, batches: Sequence[tuple[Tensor, ...]], passes: Sequence[Pass]
) -> Run:
    """No worse than 1.5 times the error that eager BF16 autocast shows against eager FP32.

    Errors are taken over several batches, since a single one may be lucky with its ReLU masks.
    """

    def under_autocast(*inputs: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(*inputs)

    reference = [step(model, model, *batch) for batch in batches]
    autocast = [step(under_autocast, model, *batch) for batch in batches]
    record = Record(keep_graphs=True)
    backend = Backend(Pipeline.of(passes), fallback=False, record=record, codegen=False)
    compiled = torch.compile(model, backend=backend)
    ours = [step(compiled, model, *batch) for batch in batches]
    for part in (_outputs, _gradients):
        wanted = part(reference)
        for name in wanted:
            own = error(part(ours)[name], wanted[name])
            theirs = error(part(autocast)[name], wanted[name])
            assert own <= 1.5 * theirs + 2e-4, f"{name}: {own:.2e} against {theirs:.2e}"
    return Run(*ours[-1], record)


Steps = list[tuple[list[Tensor], dict[str, Tensor | None]]]


def _outputs(steps: Steps) -> dict[str, Tensor]:
    return {
        f"output {i}": torch.cat([outputs[i].double().flatten() for outputs, _ in steps])
        for i in range(len(steps[0][0]))
    }


def _gradients(steps: Steps) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, first in steps[0][1].items():
        if first is not None:
            parts = [gradients[name] for _, gradients in steps]
            found[name] = torch.cat([p.double().flatten() for p in parts if p is not None])
    return found
