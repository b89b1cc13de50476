"""Generated code calls our operators without the way through PyTorch's dispatcher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch._inductor import ir
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.virtualized import V
from torch._ops import OpOverload

from passes import call_sites

# Within the module that is written; it imports a package and reaches into it.
_MADE = f'__import__("{call_sites.__name__}").call_sites.CallSite("{{}}")'


@contextmanager
def operators_called_directly() -> Iterator[None]:
    """Have the code that Inductor writes meanwhile call our operators through sites of their own.

    Each place that calls one on tensors of fixed sizes has a :class:`passes.call_sites.CallSite`.
    """
    generate = PythonWrapperCodegen.generate_fallback_kernel

    def generate_with_site(wrapper: PythonWrapperCodegen, node: ir.FallbackKernel) -> None:
        operator = node.op_overload
        fits = _has_fixed_sizes(node) and not V.graph.cpp_wrapper
        if fits and isinstance(operator, OpOverload) and call_sites.takes(operator):
            site = f"call_{operator._opname}_{wrapper.next_kernel_suffix()}"
            wrapper.define_kernel(site, _MADE.format(operator._opname), gpu=False)
            node.python_kernel_name = site
        generate(wrapper, node)

    with mock.patch.object(PythonWrapperCodegen, "generate_fallback_kernel", generate_with_site):
        yield


def _has_fixed_sizes(node: ir.FallbackKernel) -> bool:
    return not any(
        getattr(number, "free_symbols", ())
        for tensor in node.inputs
        if isinstance(tensor, ir.IRNode)
        for number in (*tensor.get_size(), *tensor.get_stride())
    )
