"""From FX graphs to plain data that outlives them."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import _get_qualified_name
from torch.utils._dtype_abbrs import dtype_abbrs

from optcpu.inspection.model import Node, Source, Stage, Value
from optcpu.inspection.sources import source_of

_LONGEST_ARGUMENT = 120
_SUBMODULE = re.compile(r"\._modules\['([^']*)'\]")
_TENSOR = re.compile(r"\._(?:parameters|buffers)\['([^']*)'\]$")
_POSITIONAL = re.compile(r"^L\['args'\]\[(\d+)\]")
_KEYWORD = re.compile(r"^L\['kwargs'\]\['([^']*)'\]")
_ROOT = re.compile(r"^L\['([^']*)'\](?:\.__self__)?")
_PRIMAL = re.compile(r"(?:primals_(\d+)|arg(\d+)_1)")
_TANGENT = re.compile(r"tangents_(\d+)")


class GraphReader:
    """Reads the graphs of one model.

    Args:
        modules: dotted path of each module by its ``id``.
        arguments: names of the positional inputs.
    """

    def __init__(self, modules: Mapping[int, str], arguments: Sequence[str]) -> None:
        self._modules = {str(key): path for key, path in modules.items()}
        self._arguments = arguments
        # Thousands of nodes share a handful of stack traces.
        self._source: functools._lru_cache_wrapper[Source | None] = functools.lru_cache(None)(
            source_of
        )

    def stage(self, name: str, graph: fx.Graph, labels: Mapping[str, str] | None = None) -> Stage:
        """``graph`` as data.

        Args:
            name: the stage's name.
            graph: of Dynamo or of AOTAutograd.
            labels: what the inputs are in the user's model, by their names in the graph.
        """
        given = labels or {}
        return Stage(name, tuple(self._node(n, given.get(n.name, "")) for n in graph.nodes))

    def _node(self, node: fx.Node, label: str) -> Node:
        meta = node.meta
        value = meta.get("val", meta.get("example_value"))
        is_input = node.op == "placeholder"
        return Node(
            name=node.name,
            operator=_operator(node),
            arguments=_arguments(node),
            inputs=tuple(source.name for source in node.all_input_nodes),
            values=tuple(_values(value)),
            tuple_valued=isinstance(value, (tuple, list)),
            # Dynamo notes at an input where it is first used, which is not where it comes from.
            source=None if is_input else self._source(meta.get("stack_trace")),
            module="" if is_input else self._module(meta),
            label=label,
        )

    def _module(self, meta: Mapping[str, Any]) -> str:
        stack = meta.get("nn_module_stack") or meta.get("fwd_nn_module_stack")
        if not stack:
            return ""
        key = next(reversed(stack))
        known = self._modules.get(str(key).partition("@")[0])
        return _dotted(stack[key][0]) if known is None else known

    def captured_labels(self, graph: fx.Graph) -> dict[str, str]:
        """What the inputs of a graph of Dynamo's are: ``"fc1.weight"``, or an argument's name."""
        labels = {}
        for node in graph.nodes:
            guarded = node.meta.get("grapharg") if node.op == "placeholder" else None
            source = getattr(guarded, "source", None)
            if source is not None:
                # A method in torch 2.8, a property since.
                name = source.name() if callable(source.name) else source.name
                labels[node.name] = self._label(str(name))
        return labels

    def _label(self, source: str) -> str:
        tensor = _TENSOR.search(source)
        if tensor is not None:
            return ".".join([*_SUBMODULE.findall(source), tensor[1]])
        positional = _POSITIONAL.match(source)
        if positional is not None and int(positional[1]) < len(self._arguments):
            return self._arguments[int(positional[1])] + source[positional.end() :]
        keyword = _KEYWORD.match(source)
        if keyword is not None:
            return keyword[1] + source[keyword.end() :]
        return _dotted(source)


def traced_labels(graph: fx.Graph, captured: fx.Graph, labels: Mapping[str, str]) -> dict[str, str]:
    """What the inputs of a graph of AOTAutograd's are, by those of the graph it was traced from.

    Left out where the two do not correspond one to one.
    """
    originals = [node for node in captured.nodes if node.op == "placeholder"]
    found = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        tangent = _TANGENT.fullmatch(node.name)
        if tangent is not None:
            found[node.name] = f"gradient of output {int(tangent[1]) - 1}"
            continue
        position = _position(node.name)
        if position is None or position >= len(originals):
            continue
        original = originals[position]
        if _type(original) == _type(node):
            found[node.name] = labels.get(original.name, "")
    return found


def _position(name: str) -> int | None:
    """Which of the traced function's inputs a placeholder is: counted from 1 if differentiated."""
    primal = _PRIMAL.fullmatch(name)
    if primal is None:
        return None
    return int(primal[1]) - 1 if primal[1] else int(primal[2])


def _type(node: fx.Node) -> list[str]:
    return [str(v) for v in _values(node.meta.get("val", node.meta.get("example_value")))]


def _dotted(source: str) -> str:
    """``L['self']._modules['h']._modules['0'].fc`` as ``h.0.fc``."""
    path = _SUBMODULE.sub(r".\1", source)
    root = _ROOT.match(path)
    if root is None:
        return path
    return path[root.end() :].lstrip(".") or root[1]


def _operator(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "output":
        return "return"
    if node.op == "get_attr":
        return "attribute"
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    if node.op == "call_module":
        return str(node.target)
    return operator_name(node.target)


def operator_name(target: Any) -> str:
    """``"aten.mm"``, ``"aten.sum.dim_IntList"``, ``"getitem"``, ``"torch.nn.functional.relu"``."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    if isinstance(target, torch._ops.OperatorBase):
        return str(target.name()) if callable(target.name) else str(target)
    name = str(_get_qualified_name(target))
    if name == "_operator.getitem":
        return "getitem"
    return name.replace("_operator.", "operator.", 1).replace("torch._C._nn.", "torch.nn.", 1)


def _arguments(node: fx.Node) -> str:
    if node.op == "placeholder":
        return ""
    if node.op == "get_attr":
        return str(node.target)
    positional = node.args[0] if node.op == "output" else node.args
    listed = positional if isinstance(positional, (tuple, list)) else (positional,)
    texts = [_argument(value) for value in listed]
    return ", ".join(texts + [f"{name}={_argument(v)}" for name, v in node.kwargs.items()])


def _argument(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_argument, value))
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_argument(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({_argument(value.start)}, {_argument(value.stop)}, {_argument(value.step)})"
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, str):
        return _shortened(repr(value))
    if callable(value) and not isinstance(value, (torch.Tensor, torch.nn.Module)):
        return _shortened(getattr(value, "__name__", str(value)))
    return _shortened(str(value))


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_ARGUMENT else line[: _LONGEST_ARGUMENT - 1] + "…"


def _values(value: Any) -> list[Value]:
    if isinstance(value, torch.Tensor):
        shape = tuple(s if isinstance(s, int) else str(s) for s in value.shape)
        return [Value(dtype_name(value.dtype), shape, str(value.device))]
    if isinstance(value, (tuple, list)):
        return [inner for entry in value for inner in _values(entry)]
    for kind, types in _NUMBERS:
        if isinstance(value, types):
            return [Value(kind, number=str(value))]
    return []


# bool is an int in Python, so it comes first.
_NUMBERS: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("bool", (bool, torch.SymBool)),
    ("int", (int, torch.SymInt)),
    ("float", (float, torch.SymFloat)),
)


def dtype_name(dtype: torch.dtype) -> str:
    """``"bf16"``, ``"f32"``, ``"i64"``; PyTorch's own name where there is no shorter one."""
    return dtype_abbrs.get(dtype, str(dtype).removeprefix("torch."))
