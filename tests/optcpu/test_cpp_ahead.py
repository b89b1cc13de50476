"""Kernels that the C++ compiler meets before Inductor asks for them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import cpu_vec_isa
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.cpu_vec_isa import VecISA

import optcpu
from optcpu import cpp_ahead

# The widths are in no other test, so that no kernel is in this process's cache.
WIDTH, HIDDEN = 37, 53


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Who has asked for which kernel's source, in order, with empty caches."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    requests: list[tuple[str, str]] = []
    by_whom = threading.local()
    binding, start = AsyncCompile.cpp_pybinding, cpp_ahead._start

    def noted_binding(self: AsyncCompile, argument_types: list[str], source: str) -> Any:
        requests.append((getattr(by_whom, "name", "inductor"), source))
        return binding(self, argument_types, source)

    def noted_start(definition: str) -> None:
        by_whom.name = "ahead"
        start(definition)
        del by_whom.name

    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", noted_binding)
    monkeypatch.setattr(cpp_ahead, "_start", noted_start)
    return requests


def train_and_check() -> None:
    """One step, optimized and eager: the same output and gradients."""
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.GELU())
    x = torch.randn(8, WIDTH)
    expected = model(x)
    expected.square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    optcpu.optimize(model, precision="fp32", fallback=False)
    result = model(x)
    result.square().sum().backward()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def test_each_kernel_is_started_before_inductor_asks_for_it(asked: list[tuple[str, str]]) -> None:
    train_and_check()
    wanted = [source for name, source in asked if name == "inductor"]
    assert wanted
    for source in wanted:
        assert asked.index(("ahead", source)) < asked.index(("inductor", source))


def test_what_cannot_be_started_is_left_to_inductor(
    asked: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = cpp_ahead._start
    monkeypatch.setattr(cpp_ahead, "_start", lambda definition: start(f"{definition} + 1"))
    train_and_check()
    assert {name for name, _ in asked} == {"inductor"}


def test_stock_compile_is_left_alone(asked: list[tuple[str, str]]) -> None:
    optcpu.optimize(nn.Linear(2, 2))
    model = nn.Sequential(nn.Linear(WIDTH, 3), nn.Softmax(dim=-1))
    torch.compile(model)(torch.randn(5, WIDTH))
    assert {name for name, _ in asked} == {"inductor"}


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "g++"])
def test_a_process_may_end_meanwhile(tmp_path: Path, compiler: str) -> None:
    code = (
        "from optcpu import cpp_ahead; cpp_ahead.prepare_compiler(); cpp_ahead.prepare_compiler()"
    )
    run = in_a_process(code, tmp_path, CXX=compiler)
    assert run.returncode == 0, run.stderr
    assert "Error" not in run.stderr


class Isa(VecISA):
    """An instruction set of a compiler's flags."""

    def __init__(self, flags: str) -> None:
        self._arch_flags = flags


RICHEST, RICH, POOR = "-mavx512f -mfma -mavx512vnni", "-mavx512f -mfma", "-mavx2 -mfma -mf16c"


def tried(monkeypatch: pytest.MonkeyPatch, *working: str) -> list[str]:
    """The instruction sets that are tried where programs with ``working`` ones pass."""
    attempts: list[str] = []

    def check_build(isa: VecISA, program: str) -> bool:
        attempts.append(isa.build_arch_flags())
        return isa.build_arch_flags() in working

    def found() -> list[VecISA]:
        sets = [Isa(flags) for flags in (RICHEST, RICH, POOR)]
        return [isa for isa in sets if isa.check_build("any")]

    monkeypatch.setattr(VecISA, "check_build", check_build)
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", found)
    cpp_ahead._find_instruction_sets()
    assert VecISA.check_build is check_build
    return attempts


def test_a_set_within_one_that_works_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(monkeypatch, RICHEST, RICH, POOR) == [RICHEST]


def test_a_set_within_one_that_fails_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(monkeypatch, POOR) == [RICHEST, RICH, POOR]
    assert tried(monkeypatch, RICH, POOR) == [RICHEST, RICH]


FIND = """
import sys
from torch._inductor import cpu_vec_isa
if "ahead" in sys.argv[1:]:
    from optcpu import cpp_ahead
    cpp_ahead._find_instruction_sets()
print([(str(isa), isa.build_arch_flags()) for isa in cpu_vec_isa.valid_vec_isa_list()])
"""


@pytest.mark.slow
def test_the_sets_are_those_that_inductor_finds_by_itself(tmp_path: Path) -> None:
    ahead = in_a_process(FIND, tmp_path / "ahead", "ahead")
    by_itself = in_a_process(FIND, tmp_path / "alone")
    assert ahead.stdout == by_itself.stdout != ""


FORK = """
import multiprocessing, threading
import torch
from torch import nn
import optcpu

def train():
    torch.set_num_threads(1)
    model(torch.randn(8, 41)).sum().backward()

model = optcpu.optimize(nn.Sequential(nn.Linear(41, 43), nn.Tanh()), precision="fp32")
for thread in threading.enumerate():
    if thread.name == "optcpu-prepare-compiler":
        thread.join()
child = multiprocessing.get_context("fork").Process(target=train)
child.start()
child.join(90)
print("trained" if child.exitcode == 0 else "did not train")
child.kill()
"""


@pytest.mark.slow
def test_a_child_that_is_forked_can_compile(tmp_path: Path) -> None:
    assert in_a_process(FORK, tmp_path).stdout == "trained\n"


def in_a_process(
    code: str, cache: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)} | environment
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=settings,
        capture_output=True,
        text=True,
        timeout=120,
    )


IMPORTS = """
import sys, threading

class Finders(list):
    def _note(self):
        print(threading.current_thread().name)

    def insert(self, *arguments):
        self._note()
        super().insert(*arguments)

    def remove(self, *arguments):
        self._note()
        super().remove(*arguments)

sys.meta_path = Finders(sys.meta_path)
import optcpu, torch
from optcpu import cpp_ahead

for _ in range(2):
    optcpu.optimize(torch.nn.Linear(3, 2))(torch.randn(4, 3)).sum().backward()
for thread in threading.enumerate():
    if thread.name.startswith("optcpu"):
        thread.join(60)
print("setuptools" in sys.modules)
"""


def test_no_thread_moves_the_finders_of_modules(tmp_path: Path) -> None:
    """An import in another thread would pass one over, and not find a module that is there."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *moves, imported = done.stdout.split()
    assert imported == "True"
    assert set(moves) <= {"MainThread"}
