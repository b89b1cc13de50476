"""Dependencies point one way: nothing imports what lies above it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom to the top; a module may import its own layer and those below. What is not
# listed has no place yet, and the test says so.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("passes",),
    (
        "optcpu.errors",
        "optcpu.checks",
        "optcpu.cpu",
        "optcpu.hooks",
        "optcpu.memory",
        "optcpu.memory_order",
        "optcpu.random_state",
        "optcpu.models",
    ),
    ("optcpu.factories", "optcpu.files", "optcpu.layers", "optcpu.tables", "optcpu.optim"),
    (
        "optcpu.layout",
        "optcpu.record",
        "optcpu.remedies",
        "optcpu.recurrent",
        "optcpu.update",
        "optcpu.data",
        "optcpu.cpp_ahead",
        "optcpu.cpp_batch",
        "optcpu.cpp_signals",
        "optcpu.compiler_settings",
        "optcpu.compiled_backward",
        "optcpu.composites",
        "optcpu.direct_calls",
        "optcpu.random_numbers",
    ),
    ("optcpu.code_generation", "optcpu.inductor_hooks", "optcpu.pipeline"),
    ("optcpu.backend", "optcpu.takeover"),
    ("optcpu.compiled_call",),
    ("optcpu.optimize",),
    ("optcpu.measure", "optcpu.inspection"),
    ("optcpu.compare", "optcpu.inspect", "optcpu.workloads", "optcpu.doctor", "optcpu.runtime"),
    ("optcpu.bench",),
    ("optcpu.commands",),
    ("optcpu.cli",),
    ("optcpu.__main__", "optcpu"),
)

# Only these may be needed by everyone who installs optcpu; anything else is optional and has to be
# imported where it is used, so that its absence can be told.
REQUIRED = {"torch", "numpy", "rich", "cloudpickle", "psutil", "pydantic", "safetensors"}
REQUIRED_BY_OLD_PYTHONS = {"tomli"}
# A package that needs more, and is therefore itself imported where it is used.
OPTIONAL = "optcpu.measure.jax"
REQUIRED_BY_OPTIONAL = {"jax", "optax"}

MODULES = sorted([*ROOT.glob("passes/**/*.py"), *ROOT.glob("optcpu/**/*.py")])


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, *, everywhere: bool = True) -> Iterator[str]:
    """Full names of what a file imports, or only of what importing the file imports."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else _at_import(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        lazy = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        types_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not lazy and not types_only:
            yield from _at_import(child)


def _layer(name: str) -> int:
    """Height of the layer that a module belongs to; packages are listed by their outer name."""
    candidates = [
        (len(entry), height)
        for height, layer in enumerate(LAYERS)
        for entry in layer
        if name == entry or (name.startswith(f"{entry}.") and entry != "optcpu")
    ]
    assert candidates, f"{name} is in no layer: add it to LAYERS in {Path(__file__).name}"
    return max(candidates)[1]


def _own_module(imported: str) -> str | None:
    """The module of this project that an import reaches, None for others."""
    if imported.split(".")[0] not in ("optcpu", "passes"):
        return None
    path = ROOT.joinpath(*imported.split("."))
    is_module = path.is_dir() or path.with_suffix(".py").exists()
    return imported if is_module else imported.rpartition(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_point_down(path: Path) -> None:
    height = _layer(_name(path))
    for imported in _imports(path):
        reached = _own_module(imported)
        if reached is not None:
            assert _layer(reached) <= height, f"{_name(path)} must not import {reached}"


@pytest.mark.parametrize(
    "path", [path for path in MODULES if _name(path).startswith("passes")], ids=_name
)
def test_passes_need_torch_and_the_standard_library_only(path: Path) -> None:
    allowed = {"torch", "passes", *sys.stdlib_module_names}
    assert {imported.split(".")[0] for imported in _imports(path)} <= allowed


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_optional_libraries_are_imported_where_they_are_used(path: Path) -> None:
    allowed = {"optcpu", "passes", *REQUIRED, *REQUIRED_BY_OLD_PYTHONS, *sys.stdlib_module_names}
    imports = list(_imports(path, everywhere=False))
    if _name(path).startswith(OPTIONAL):
        allowed |= REQUIRED_BY_OPTIONAL
    else:
        assert not [one for one in imports if one.startswith(OPTIONAL)]
    assert {imported.split(".")[0] for imported in imports} <= allowed


def test_required_libraries_are_the_declared_ones() -> None:
    declared = (ROOT / "pyproject.toml").read_text().partition("dependencies = [")[2]
    lines = [line for line in declared.partition("]")[0].split("\n") if ">=" in line]
    names = {line.split(">=")[0].strip(' ",'): "python_version <" in line for line in lines}
    assert {name for name, for_old in names.items() if not for_old} == REQUIRED
    assert {name for name, for_old in names.items() if for_old} == REQUIRED_BY_OLD_PYTHONS


def test_a_wrong_import_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text("def f():\n    from optcpu.optimize import optimize\n    import sklearn.svm\n")
    assert list(_imports(path)) == ["optcpu.optimize.optimize", "sklearn.svm"]
    assert list(_imports(path, everywhere=False)) == []
    assert _own_module("optcpu.optimize.optimize") == "optcpu.optimize"
    assert _layer("optcpu.optimize") > _layer("passes.graph")
