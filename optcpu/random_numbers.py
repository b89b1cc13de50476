"""Random numbers in graphs, which must be the same ones wherever a graph has them again.

Inductor draws a seed in the forward pass and makes random numbers of it, in generated code. Where the
backward pass computes a part of the forward pass anew, it makes them of the same seed. Two things are
missing: its operators draw other numbers where no code is generated, and the partitioner, asked to save
memory, has the seed itself drawn anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import inductor_prims
from torch.utils.checkpoint import CheckpointPolicy


def keep_random_numbers(graph: fx.Graph) -> None:
    """Have the partitioner save random numbers, or what follows from them, such as a mask."""
    for node in graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags or node.target in _BY_SEED:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def are_made_of_seeds(graph: fx.Graph) -> bool:
    """Whether a graph has random numbers that it makes of seeds."""
    return any(node.target in _BY_SEED for node in graph.nodes)


def make_of_seeds(graph: fx.Graph) -> None:
    """Let the operators of a graph that runs as it is make the same numbers of the same seed.

    They are others than those of generated code.
    """
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _BY_SEED.get(node.target, node.target)


def _random(size: Sequence[int], seed: Tensor, mode: str, **_: Any) -> Tensor:
    numbers: Tensor = getattr(torch, mode)(size, generator=_generator(seed), dtype=torch.float32)
    return numbers


def _random_integers(low: int, high: int, size: Sequence[int], seed: Tensor) -> Tensor:
    return torch.randint(low, high, size, generator=_generator(seed))


def _generator(seed: Tensor) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))


_BY_SEED: dict[Any, Any] = {
    inductor_prims.random: _random,
    inductor_prims.randint: _random_integers,
}
