"""Compilers that a signal to the whole process group does not reach."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch._inductor import cpp_builder, cpu_vec_isa

from optcpu.cpp_signals import shield_compilers

LEADS = [sys.executable, "-c", "import os; assert os.getpid() == os.getsid(0)"]


def test_what_inductor_starts_leads_a_session_of_its_own() -> None:
    shield_compilers()
    for module in (cpp_builder, cpu_vec_isa):
        started = module.subprocess  # type: ignore[attr-defined]
        started.check_call(LEADS)
        started.check_output(LEADS)
        started.run(LEADS, check=True)
        with pytest.raises(started.CalledProcessError):
            started.run(LEADS, check=True, start_new_session=False)
        assert started.PIPE == subprocess.PIPE


SCRIPT = """
import sys
import torch
from torch import nn
import optcpu

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(39, 71), nn.LayerNorm(71), nn.GELU(), nn.Linear(71, 3))
data = torch.utils.data.TensorDataset(torch.randn(64, 39), torch.arange(64) % 3)
trainer = optcpu.Trainer(model, data, epochs=2, lr=0.1, checkpoints=sys.argv[1], progress=False)
result = trainer.train()
numbers = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
print(result.stopped_by, result.steps, numbers.tobytes().hex())
"""


@pytest.mark.slow
def test_ctrl_c_while_the_compiler_runs_changes_no_bit(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def start(name: str) -> subprocess.Popen[str]:
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / name / "inductor")}
        return subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / name / "checkpoints")],
            env={**os.environ, **caches},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # as a shell gives a process group to a command
        )

    def end(process: subprocess.Popen[str]) -> list[str]:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        return printed.split()

    whole = end(start("whole"))
    process = start("stopped")
    while process.poll() is None and not _compiles_a_kernel(process.pid):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    by, steps, _ = end(process)
    assert (by, int(steps) < 4) == ("SIGINT", True)
    assert end(start("stopped")) == whole


def _compiles_a_kernel(process: int) -> bool:
    """Whether a compiler is at work for it, the one of an update kernel left aside."""
    for child in psutil.Process(process).children(recursive=True):
        try:
            if child.name() == "cc1plus" and any("inductor" in word for word in child.cmdline()):
                return True
        except psutil.Error:
            continue
    return False


FORKS = """
import os, sys, threading, time
from optcpu.cpp_signals import compilers

seconds = time.monotonic() + 8
forked = []

def forks():  # as loading processes are, by another thread
    while time.monotonic() < seconds:
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        forked.append(pid)
        time.sleep(0.001)
        if len(forked) > 200:
            break

thread = threading.Thread(target=forks)
thread.start()
longest = 0.0
while thread.is_alive():
    begin = time.monotonic()
    compilers.run([sys.executable, "-S", "-c", "print(1)"], capture_output=True, check=True, timeout=20)
    longest = max(longest, time.monotonic() - begin)
for pid in forked:
    os.kill(pid, 9)
assert longest < 15, longest
print("nobody waited")
"""


def test_no_forked_process_keeps_a_compiler_from_ending() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS], capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "nobody waited\n", done.stderr
