"""Generated code calls fused operators without the way through PyTorch's dispatcher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch._inductor import ir
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.virtualized import V

from passes import call_sites

# Within the module that is written; it imports a package and reaches into it.
_MADE = f'__import__("{call_sites.__name__}").call_sites.CallSite("{{}}")'


@contextmanager
def fused_operators_called_directly() -> Iterator[None]:
    """Have the code that Inductor writes meanwhile call fused operators through sites of their own.

    Each place that calls one on matrices of fixed sizes has a :class:`passes.call_sites.CallSite`.
    """
    generate = PythonWrapperCodegen.generate_fallback_kernel

    def generate_with_site(wrapper: PythonWrapperCodegen, node: ir.FallbackKernel) -> None:
        operator = _fused_operator(node)
        is_python = not V.graph.cpp_wrapper
        if is_python and operator in call_sites.DIRECT and _has_fixed_sizes(node):
            site = f"call_{operator}_{wrapper.next_kernel_suffix()}"
            wrapper.define_kernel(site, _MADE.format(operator), gpu=False)
            node.python_kernel_name = site
        generate(wrapper, node)

    with mock.patch.object(PythonWrapperCodegen, "generate_fallback_kernel", generate_with_site):
        yield


def _fused_operator(node: ir.FallbackKernel) -> str | None:
    """The name in ``torch.ops.optcpu`` of the operator that ``node`` calls; None of another one."""
    called = node.op_overload
    if not isinstance(called, torch._ops.OpOverload) or called.namespace != "optcpu":
        return None
    return str(called._opname)


def _has_fixed_sizes(node: ir.FallbackKernel) -> bool:
    return not any(
        getattr(number, "free_symbols", ())
        for tensor in node.inputs
        if isinstance(tensor, ir.IRNode)
        for number in (*tensor.get_size(), *tensor.get_stride())
    )
