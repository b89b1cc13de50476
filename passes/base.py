"""What a pass is: a named, counted rewrite of one FX graph with a cache key of its own.

A pass runs at one of two stages. ``"joint"`` passes see forward and backward as one graph (inference
graphs too), before the partitioner decides what is saved for the backward. ``"split"`` passes see
each partitioned graph by itself: the forward, the backward, or the only graph of an inference call.

Every pass returns how many times it fired. Its cache key covers its code, the file that defines it
and its parameters, so that a changed pass can never be served a graph compiled by an older one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import fx
from torch.fx.subgraph_rewriter import replace_pattern_with_filters

from passes.fingerprint import fingerprint
from passes.graph import fill_value, inherit_origin

Stage = Literal["joint", "split"]
Rewrite = Callable[[fx.Graph], int]


class Pass(ABC):
    """A rewrite of an FX graph of ATen operators, in place.

    Subclasses are frozen dataclasses: their fields are their parameters and part of the cache key.
    """

    stage: ClassVar[Stage] = "joint"
    changes_numerics: ClassVar[bool] = False
    # Whether it may return a gradient as BF16 that was FP32.
    narrows_outputs: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The pass's name as it stands in reports: the class name in kebab case."""
        kebab = "".join(f"-{c.lower()}" if c.isupper() else c for c in type(self).__name__)
        return kebab.lstrip("-")

    @abstractmethod
    def __call__(self, graph: fx.Graph) -> int:
        """Rewrite ``graph`` in place and return how many places were rewritten.

        Every node carries ``meta["val"]``, a fake tensor with its shape, dtype and strides; new nodes
        must carry it as well (:func:`passes.graph.emit` sees to that). Shapes may be symbolic.
        """

    def cache_key(self) -> str:
        """A hash that changes whenever the pass's code or one of its parameters does."""
        return _digest(fingerprint(self))

    def __repr__(self) -> str:
        if not dataclasses.is_dataclass(self):
            return f"{type(self).__name__}()"
        fields = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"{type(self).__name__}({fields})"


@dataclasses.dataclass(frozen=True, repr=False)
class FunctionPass(Pass):
    """A plain function ``(graph) -> count`` as a pass.

    Args:
        function: the rewrite; its name is the pass's name.
        stage: where it runs; overrides the class attribute for this instance.
    """

    function: Rewrite
    stage: Stage = "joint"  # type: ignore[misc]

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__).replace("_", "-")

    def __call__(self, graph: fx.Graph) -> int:
        return self.function(graph)

    def __repr__(self) -> str:
        return f"FunctionPass({self.name})"


@dataclasses.dataclass(frozen=True, repr=False)
class PatternPass(Pass):
    """Replace every occurrence of one small graph by another.

    ``pattern`` and ``replacement`` are plain functions of the same tensors, written with the ATen
    operators that the captured graph holds (``torch.ops.aten.relu.default`` and so on).

    Args:
        pattern: what to look for. Constants in it must match exactly.
        replacement: what to put there; same parameters in the same order.
        check: called with the matched nodes by parameter name; only where it returns true is the match
            replaced. None replaces every match.
        stage: where the pass runs.
    """

    pattern: Callable[..., Any]
    replacement: Callable[..., Any]
    check: Callable[[dict[str, Any]], bool] | None = None
    stage: Stage = "joint"  # type: ignore[misc]

    @property
    def name(self) -> str:
        return self.replacement.__name__.replace("_", "-")

    def __call__(self, graph: fx.Graph) -> int:
        module = graph.owning_module
        if module is None:
            raise ValueError("the graph to rewrite belongs to no GraphModule")
        replaced = replace_pattern_with_filters(
            module, self.pattern, self.replacement, match_filters=[self._accepts]
        )
        for match in replaced:
            for node in match.replacements:
                fill_value(node)
                inherit_origin(node, match.nodes_map[match.anchor])
        return len(replaced)

    def _accepts(self, match: Any, _original: fx.Graph, pattern_graph: fx.Graph) -> bool:
        if self.check is None:
            return True
        inputs = [node for node in pattern_graph.nodes if node.op == "placeholder"]
        return self.check({str(node.target): match.nodes_map[node] for node in inputs})

    def __repr__(self) -> str:
        return f"PatternPass({self.pattern.__name__} -> {self.replacement.__name__})"


def as_pass(rewrite: Pass | Rewrite) -> Pass:
    """Return a pass for ``rewrite``: itself, or a plain function ``(graph) -> count`` wrapped.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(rewrite, Pass):
        return rewrite
    if callable(rewrite) and not isinstance(rewrite, type):
        return FunctionPass(rewrite)
    raise TypeError(
        f"a pass is an instance of passes.Pass or a function (graph) -> count, not {rewrite!r}"
    )


def cache_key(passes: Sequence[Pass]) -> str:
    """The key of an ordered list of passes, of the operators they rewrite to, and of torch's version."""
    return _digest(
        torch.__version__,
        _package_source(),
        *[f"{p.name} {p.stage} {p.cache_key()}" for p in passes],
    )


@functools.cache
def _package_source() -> str:
    """The source of this package: what passes share (operators, graph tools) decides as well."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return "\0".join(file.read_text(encoding="utf-8") for file in files)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


__all__ = [
    "FunctionPass",
    "Pass",
    "PatternPass",
    "Rewrite",
    "Stage",
    "as_pass",
    "cache_key",
]
