"""Descriptions of code: equal for what does the same, different for what does not, in any process."""

from __future__ import annotations

import functools
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from passes import Canonicalize, FunctionPass
from passes.fingerprint import fingerprint


def typed_in(source: str, name: str = "f", **names: Any) -> Any:
    """``name`` after running ``source``, as in a notebook: there is no file to read."""
    namespace: dict[str, Any] = {"__name__": "__main__", **names}
    exec(source, namespace)
    return namespace[name]


CHANGES = {
    "body": ("def f(graph): return 1", "def f(graph): return 2"),
    "operator": ("def f(graph): return graph + 1", "def f(graph): return graph - 1"),
    "attribute": ("def f(graph): return graph.a", "def f(graph): return graph.b"),
    "default": ("def f(graph, n=1): return n", "def f(graph, n=2): return n"),
    "keyword default": ("def f(graph, *, n=1): return n", "def f(graph, *, n=2): return n"),
    "inner function": (
        "def f(graph): return (lambda: 1)()",
        "def f(graph): return (lambda: 2)()",
    ),
    "global value": ("n = 1\ndef f(graph): return n", "n = 2\ndef f(graph): return n"),
    "helper": (
        "def g(): return 1\ndef f(graph): return g()",
        "def g(): return 2\ndef f(graph): return g()",
    ),
    "helper of a helper": (
        "def h(): return 1\ndef g(): return h()\ndef f(graph): return g()",
        "def h(): return 2\ndef g(): return h()\ndef f(graph): return g()",
    ),
    "closure": (
        "def outer(n):\n  def f(graph): return n\n  return f\nf = outer(1)",
        "def outer(n):\n  def f(graph): return n\n  return f\nf = outer(2)",
    ),
    "closure over a function": (
        "def outer(g):\n  def f(graph): return g()\n  return f\nf = outer(lambda: 1)",
        "def outer(g):\n  def f(graph): return g()\n  return f\nf = outer(lambda: 2)",
    ),
    "operator of PyTorch": (
        "import torch\nt = torch.ops.aten.relu.default\ndef f(graph): return t",
        "import torch\nt = torch.ops.aten.tanh.default\ndef f(graph): return t",
    ),
    "dtype": (
        "import torch\nt = torch.float16\ndef f(graph): return t",
        "import torch\nt = torch.bfloat16\ndef f(graph): return t",
    ),
    "method": (
        "class f:\n  def __call__(self, graph): return 1",
        "class f:\n  def __call__(self, graph): return 2",
    ),
    "property": (
        "class f:\n  @property\n  def a(self): return 1",
        "class f:\n  @property\n  def a(self): return 2",
    ),
    "static method": (
        "class f:\n  @staticmethod\n  def a(): return 1",
        "class f:\n  @staticmethod\n  def a(): return 2",
    ),
    "class attribute": ("class f:\n  n = 1", "class f:\n  n = 2"),
    "base class": (
        "class g:\n  def a(self): return 1\nclass f(g): pass",
        "class g:\n  def a(self): return 2\nclass f(g): pass",
    ),
    "attribute of an instance": (
        "class F:\n  def __init__(self, n): self.n = n\nf = F(1)",
        "class F:\n  def __init__(self, n): self.n = n\nf = F(2)",
    ),
    "bound method": (
        "class F:\n  def __init__(self, n): self.n = n\n  def a(self): return 1\nf = F(1).a",
        "class F:\n  def __init__(self, n): self.n = n\n  def a(self): return 1\nf = F(2).a",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_changes_it(change: str) -> None:
    before, after = CHANGES[change]
    assert fingerprint(typed_in(before)) == fingerprint(typed_in(before))
    assert fingerprint(typed_in(before)) != fingerprint(typed_in(after))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 1.0),
        (1, True),
        ("1", 1),
        ((1, 2), [1, 2]),
        ({1: 2}, {2: 1}),
        ({1}, {2}),
        (torch.float32, torch.float64),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])),
        (torch.relu, torch.tanh),
        (torch.ops.aten.relu.default, torch.ops.aten.relu_.default),
        (functools.partial(max, 1), functools.partial(max, 2)),
        (Canonicalize(), FunctionPass(len)),
    ],
)
def test_different_values_differ(a: object, b: object) -> None:
    assert fingerprint(a) != fingerprint(b)


@dataclass(frozen=True)
class Parameters:
    sizes: tuple[int, ...]
    choose: Callable[[int], bool] | None = None


def test_fields_of_a_dataclass_decide() -> None:
    assert fingerprint(Parameters((1, 2))) == fingerprint(Parameters((1, 2)))
    assert fingerprint(Parameters((1, 2))) != fingerprint(Parameters((2, 1)))
    assert fingerprint(Parameters((1,), lambda n: n > 1)) != fingerprint(
        Parameters((1,), lambda n: n > 2)
    )


def test_things_that_refer_to_themselves_end() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert fingerprint(loop)
    assert fingerprint(typed_in("def f(n): return f(n - 1)"))


def test_what_cannot_be_described_is_never_equal() -> None:
    assert fingerprint(object()) != fingerprint(object())
    first, second = iter([1]), iter([2])
    assert fingerprint(first) != fingerprint(second)


def in_new_process(source: str, folder: Path, seed: int) -> str:
    code = f"{source}\nfrom passes.fingerprint import fingerprint\nprint(fingerprint(f))"
    script = folder / "pass_of_a_user.py"
    script.write_text(code)
    run = subprocess.run(
        [sys.executable, str(script)],
        env={"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout


SOURCE = """
import dataclasses, functools, torch
NAMES = {"relu", "tanh", "gelu", "silu"}
def helper(node, wanted=frozenset({"a", "b", "c"})):
    return node in {"x", "y", "z"} or node in NAMES
def outer(choose):
    def f(graph):
        return sum(1 for node in graph.nodes if choose(node) and helper(node))
    return f
f = outer(lambda node: node.target is torch.ops.aten.relu.default)
"""


@pytest.mark.slow
def test_the_same_in_a_new_process(tmp_path: Path) -> None:
    first, again = (in_new_process(SOURCE, tmp_path, seed) for seed in (1, 2))
    assert first == again
    assert in_new_process(SOURCE.replace('"x"', '"w"'), tmp_path, 1) != first


def test_a_setting_that_is_read_from_a_module() -> None:
    settings = types.ModuleType("settings")
    settings.FACTOR = 1  # type: ignore[attr-defined]
    settings.OTHER = 1  # type: ignore[attr-defined]
    names = {"settings": settings}
    exec("def reads(graph):\n    return settings.FACTOR", names)
    before = fingerprint(names["reads"])
    settings.OTHER = 2  # type: ignore[attr-defined]
    assert fingerprint(names["reads"]) == before
    settings.FACTOR = 2  # type: ignore[attr-defined]
    assert fingerprint(names["reads"]) != before
