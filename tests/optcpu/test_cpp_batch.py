"""Kernels that are compiled together are the libraries that Inductor would have built."""

from __future__ import annotations

import functools
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.codecache import CppPythonBindingsCodeCache

from optcpu import cpp_batch
from optcpu.cpp_batch import BatchCompile, _compile_together, _Job

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are batched on Linux")

FILL = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(float* x) {{ x[0] = {value}; x[1] = helper_{value}; }}
"""
BROKEN = FILL.replace("x[0]", "y[0]")


def kernel(value: int, source: str = FILL) -> str:
    define = f"\nstatic const int helper_{value} = {value} + 1;\nextern"
    return source.format(value=value).replace("\nextern", define)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many kernels each run of the compiler got, with an empty cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found: list[int] = []

    def noted(jobs: list[_Job]) -> None:
        found.append(len(jobs))
        if len(found) == 1:
            time.sleep(1)  # so that all others wait
        _compile_together(jobs)

    monkeypatch.setattr(cpp_batch, "_compile_together", noted)
    return found


def load(sources: list[str]) -> list[Callable[[torch.Tensor], None]]:
    futures = [BatchCompile().cpp_pybinding(["float*"], source) for source in sources]
    return [future.result() for future in futures]


def test_each_gets_its_own_code(runs: list[int]) -> None:
    x = torch.zeros(2)
    for value, run in enumerate(load([kernel(value) for value in range(4)])):
        run(x)
        assert x.tolist() == [value, value + 1]
    assert sum(runs) == 4
    assert len(runs) < 4


def test_libraries_are_found_by_another_process(runs: list[int], tmp_path: Path) -> None:
    load([kernel(10), kernel(11), kernel(12)])
    CppPythonBindingsCodeCache.cache_clear()
    compiled = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.so")}
    (*_, run) = load([kernel(10), kernel(11), kernel(12)])
    x = torch.zeros(2)
    run(x)
    assert x.tolist() == [12, 13]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.so")} == compiled
    assert list(tmp_path.rglob("*.tmp")) == []


def test_who_would_wait_compiles_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    busy, may_end = threading.Event(), threading.Event()
    by_caller: list[int] = []

    def noted(jobs: list[_Job]) -> None:
        if threading.current_thread() is threading.main_thread():
            by_caller.append(len(jobs))
        else:
            busy.set()
            assert may_end.wait(60)
        _compile_together(jobs)

    monkeypatch.setattr(cpp_batch, "_compile_together", noted)
    futures = [BatchCompile().cpp_pybinding(["float*"], kernel(0))]
    assert busy.wait(60)
    futures += [BatchCompile().cpp_pybinding(["float*"], kernel(value)) for value in (1, 2)]
    cpp_batch.help_out()
    may_end.set()
    x = torch.zeros(2)
    for value, future in enumerate(futures):
        future.result()(x)
        assert x.tolist() == [value, value + 1]
    assert by_caller == [2]
    cpp_batch.help_out()  # nothing waits


def test_ctrl_c_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    job = _Job(("g++", "a.cpp", "a.so"), "a.cpp", "a.so", Future())

    def interrupted(jobs: list[_Job]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cpp_batch, "_compile_together", interrupted)
    monkeypatch.setattr(cpp_batch, "_waiting", [job])
    with pytest.raises(KeyboardInterrupt):
        cpp_batch.help_out()
    assert job.done.done()


def test_one_that_cannot_be_compiled_takes_no_other_with_it(runs: list[int]) -> None:
    futures = [
        BatchCompile().cpp_pybinding(["float*"], source)
        for source in (kernel(20), kernel(21), kernel(22, BROKEN), kernel(23))
    ]
    x = torch.zeros(2)
    for value in (0, 1, 3):
        futures[value].result()(x)
        assert x.tolist() == [20 + value, 21 + value]
    with pytest.raises(Exception, match="y"):
        futures[2].result()


def test_another_name_is_refused(tmp_path: Path) -> None:
    import importlib.util

    load([kernel(30)])
    job = job_for(tmp_path, kernel(31))
    _compile_together([job])
    renamed = Path(job.target).rename(tmp_path / "renamed.so")
    spec = importlib.util.spec_from_file_location("renamed.kernel", renamed)
    assert spec is not None
    with pytest.raises(ImportError, match=r"no kernel belongs to the name of .*renamed.so"):
        importlib.util.module_from_spec(spec)


def job_for(folder: Path, source: str) -> _Job:
    """The job that Inductor would submit for a kernel."""
    jobs: list[_Job] = []

    class Noting(BatchCompile):
        @classmethod
        def submit(cls, task: Callable[..., Any]) -> Any:
            job = _Job.of(task)
            assert job is not None
            jobs.append(job)
            return super().submit(task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        Noting().cpp_pybinding(["float*"], source).result()
    (job,) = jobs
    return _Job(job.command, job.source, job.target, Future())


def pretended(folder: Path, name: str) -> _Job:
    """A job whose compiler does nothing."""
    return _Job(("true", name, str(folder / name)), name, str(folder / name), Future())


def test_nobody_is_left_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong in the thread, and whoever gives up waiting."""

    def fails(jobs: list[_Job]) -> None:
        time.sleep(0.3)
        raise UnicodeError("a folder of bytes")

    monkeypatch.setattr(cpp_batch, "_compile_together", fails)
    first, given_up, last = (pretended(tmp_path, name) for name in ("a", "b", "c"))
    futures = [cpp_batch._submit(job) for job in (first, given_up)]
    futures[1].cancel()
    assert futures[0].result(timeout=30) is None
    assert cpp_batch._submit(last).result(timeout=30) is None


FORK = """
import os, sys
from concurrent.futures import Future
from optcpu import cpp_batch
from optcpu.cpp_batch import _Job, _submit

def job(name):
    return _Job(("sh", "-c", "sleep 2", "k.cpp", name), "k.cpp", name, Future())

parent = _submit(job("/nowhere/parent.so"))
child = os.fork()
done = _submit(job("/nowhere/child.so")) if child == 0 else parent
done.result(timeout=30)
if child == 0:
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_has_a_thread_of_its_own() -> None:
    run = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


class Builder:
    """As much of Inductor's ``CppBuilder`` as is looked at."""

    def __init__(self, command: str) -> None:
        self.command = command

    def get_command_line(self) -> str:
        return self.command

    def get_target_file_path(self) -> str:
        return "/cache/k.so"


def test_a_job_is_read_from_inductors_task() -> None:
    task = functools.partial(print, "lock", (Builder("g++ /cache/k.cpp -O3 -o /cache/k.so"),))
    job = _Job.of(task)
    assert job is not None
    assert (job.source, job.target) == ("/cache/k.cpp", "/cache/k.so")
    assert job.alike() == tuple(shlex.split("g++ -O3 -o"))


@pytest.mark.parametrize(
    "task",
    [
        print,
        functools.partial(print),
        functools.partial(print, "lock", ()),
        functools.partial(print, "lock", (Builder("g++ a.cpp"), Builder("g++ b.cpp"))),
        functools.partial(print, "lock", (Builder("g++ a.cpp b.cpp -o /cache/k.so"),)),
        functools.partial(print, "lock", (Builder("g++ k.cpp -o elsewhere.so"),)),
        functools.partial(print, "lock", (Builder("g++ 'k.cpp"),)),
    ],
)
def test_other_tasks_are_left_to_inductor(task: Callable[..., object]) -> None:
    assert _Job.of(task) is None
