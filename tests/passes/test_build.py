"""Kernels are compiled once, and anew when anything that they are made of has changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from passes.build import load

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel that takes its answer from a header, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "answer.h").write_text("constexpr int kAnswer = 42;\n")
    kernel = tmp_path / "kernel.cpp"
    kernel.write_text('#include "answer.h"\nextern "C" int answer() { return kAnswer; }\n')
    return kernel


def answer(source: Path) -> int:
    library = load(source)
    assert library is not None
    return int(library.answer())


@needs_compiler
def test_a_kernel_is_compiled_once(source: Path, tmp_path: Path) -> None:
    assert answer(source) == 42
    (built,) = tmp_path.rglob("*.so")
    time = built.stat().st_mtime_ns
    assert answer(source) == 42
    assert [path.stat().st_mtime_ns for path in tmp_path.rglob("*.so")] == [time]


@needs_compiler
@pytest.mark.parametrize("changed", ["answer.h", "kernel.cpp"])
def test_a_changed_file_is_compiled_anew(source: Path, changed: str) -> None:
    assert answer(source) == 42
    file = source.parent / changed
    file.write_text(file.read_text().replace("42", "43").replace("kAnswer;", "kAnswer + 1;"))
    assert answer(source) == 43


@needs_compiler
def test_a_kernel_that_does_not_compile_is_none(source: Path) -> None:
    source.write_text("no C++")
    assert load(source) is None


def test_without_a_compiler_there_is_no_kernel(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert load(source) is None
