"""The nodes by which autograd runs compiled backward graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# An output that is a view hangs on its base by nodes that PyTorch has added.
_LONGEST_CHAIN_OF_VIEWS = 3


def backward_of(outputs: Sequence[Any]) -> Any:
    """The node of autograd that runs the compiled backward on which ``outputs`` hang; None if none does."""
    nodes = [output.grad_fn for output in outputs if isinstance(output, Tensor)]
    for _ in range(_LONGEST_CHAIN_OF_VIEWS):
        for node in nodes:
            if _metadata(node) is not None:
                return node
        nodes = [before for node in nodes if node for before, _ in node.next_functions]
    return None


def _metadata(node: Any) -> Any:
    """What PyTorch has noted of a compiled graph, if ``node`` runs the backward of one."""
    metadata = getattr(getattr(node, "_forward_cls", None), "metadata", None)
    return metadata if hasattr(metadata, "bw_donated_idxs") else None


def allow_backward_again(node: Any) -> bool:
    """Let ``backward(retain_graph=True)`` run, whatever backward was run first.

    A graph compiled without donated buffers has None noted for them, and PyTorch 2.8 to 2.13 compare
    that with the empty list when a backward is to keep its graph.

    Args:
        node: runs a compiled backward; None if there is none.

    Returns:
        Whether there is one.
    """
    metadata = _metadata(node)
    if metadata is None:
        return False
    metadata.bw_donated_idxs = metadata.bw_donated_idxs or []
    return True
