"""From a rewritten graph to what runs: generated code of Inductor's, or one operator at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch.fx._lazy_graph_module import _LazyGraphModule

import passes
from optcpu import cpp_ahead, random_numbers
from optcpu.direct_calls import operators_called_directly
from optcpu.record import GraphRun, copy_graph

logger = logging.getLogger(__name__)


def generate(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: dict[str, Any],
    graph_run: GraphRun,
) -> Any:
    """Generate code: once for blocks that are equal, where Inductor can take that."""
    with cpp_ahead.kernels_compiled_as_written(), operators_called_directly():
        whole = copy_graph(module.graph)
        try:
            view_to_reshape(module)  # Inductor does this as well, but not to the graphs of blocks
            graph_run.blocks = passes.share_blocks(module)
            if graph_run.blocks:
                return compile_fx_inner(module, example_inputs, **options)
        except Exception as error:
            logger.debug("equal blocks are compiled each by itself: %s", error)
            graph_run.blocks = []
            module.graph = whole
        return compile_fx_inner(module, example_inputs, **options)


def boxed(module: fx.GraphModule) -> Callable[..., Any]:
    """``module`` as a function that runs its graph one operator at a time.

    A pass may have changed strides, for which generated code does not care but ``view`` does.
    """
    view_to_reshape(module)
    random_numbers.make_of_seeds(module.graph)
    module.recompile()
    _LazyGraphModule.force_recompile(module)  # what is lazy calls the module the first time
    # Not the module itself, as that runs the hooks that a user has given to all modules.
    return make_boxed_func(module.forward)  # type: ignore[no-any-return]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions but for the activations that passes want to see whole."""
    table = dict(select_decomp_table())
    for operator in passes.KEPT_WHOLE:
        table.pop(operator, None)
    return table
