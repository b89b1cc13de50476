"""What Inductor calls while it compiles a graph, each with its part of the cache key."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from optcpu import random_numbers

_RAN = "optcpu_joint_passes_ran"


class JointPasses(CustomGraphPass):  # type: ignore[misc]
    """Runs the joint passes, once.

    Args:
        run: runs them over a graph module.
        key: stands for them in the cache keys; None keeps the graph out of the caches.
    """

    def __init__(self, run: Callable[[fx.GraphModule], None], key: str | None) -> None:
        self._run = run
        self._key = key

    def __call__(self, graph: fx.Graph) -> None:
        module = graph.owning_module
        assert module is not None
        if module.meta.setdefault(_RAN, False):
            return  # PyTorch 2.8 calls the hook twice
        module.meta[_RAN] = True
        self._run(module)

    def uuid(self) -> str | None:
        return self._key


class CacheKey(CustomGraphPass):  # type: ignore[misc]
    """Does nothing but bring a key into that of AOTAutograd's cache.

    PyTorch 2.8 leaves the passes on the joint graph out of it.
    """

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, graph: fx.Graph) -> None:
        """Leave the graph as it is."""

    def uuid(self) -> str | None:
        return self._key


class HandOver(CacheKey):
    """Lets backward graphs hand gradients over, behind all passes of Inductor's.

    Those do not know that a weight changes when its gradient is handed over, and would have it read later.

    Args:
        key: as for :class:`JointPasses`.
        hand_over: rewrites a backward graph.
        subject: tells what ``hand_over`` depends on besides the graph.
    """

    def __init__(
        self, key: str | None, hand_over: Callable[[fx.Graph], None], subject: Callable[[], str]
    ) -> None:
        super().__init__(key)
        self._hand_over = hand_over
        self._subject = subject

    def __call__(self, graph: fx.Graph) -> None:
        self._hand_over(graph)

    def uuid(self) -> str | None:
        return None if self._key is None else f"{self._key} {self._subject()}"


class KeepRandomNumbers(CacheKey):
    """Keeps random numbers from being drawn anew in the backward pass; the partitioner runs after this."""

    def __call__(self, graph: fx.Graph) -> None:
        random_numbers.keep_random_numbers(graph)
