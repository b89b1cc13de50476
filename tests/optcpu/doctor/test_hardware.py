from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from optcpu import cpu
from optcpu.doctor import hardware


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> cpu.Capabilities:
    """Four cores with BF16; tests change what they need with ``_pretend``."""
    return cpu.Capabilities(
        architecture="x86_64",
        vendor="AuthenticAMD",
        model="EPYC",
        isa="avx512_bf16",
        bf16=True,
        amx=False,
        emulated=(),
        logical_cores=4,
        physical_cores=4,
        quota=None,
        l1d_bytes=None,
        l2_bytes=None,
        l3_bytes=None,
    )


def _pretend(monkeypatch: pytest.MonkeyPatch, machine: cpu.Capabilities, **changes: object) -> None:
    monkeypatch.setattr(hardware, "capabilities", lambda: replace(machine, **changes))


class TestProcessor:
    def test_bf16(self, monkeypatch: pytest.MonkeyPatch, machine: cpu.Capabilities) -> None:
        _pretend(monkeypatch, machine)
        assert hardware.check_processor().status == "ok"
        _pretend(monkeypatch, machine, isa="amx_bf16", amx=True)
        assert "AMX" in hardware.check_processor().detail

    def test_none(self, monkeypatch: pytest.MonkeyPatch, machine: cpu.Capabilities) -> None:
        _pretend(monkeypatch, machine, isa="avx2", bf16=False)
        finding = hardware.check_processor()
        assert finding.status == "warning"
        assert "trains in FP32" in finding.detail
        assert "AVX512_BF16" in finding.remedy

    def test_emulated(self, monkeypatch: pytest.MonkeyPatch, machine: cpu.Capabilities) -> None:
        setting = "ONEDNN_MAX_CPU_ISA=AVX2"
        _pretend(monkeypatch, machine, isa="avx2", bf16=False, emulated=(setting,))
        finding = hardware.check_processor()
        assert setting in finding.detail
        assert finding.remedy == "unset ONEDNN_MAX_CPU_ISA"


class TestThreads:
    @pytest.mark.parametrize(
        ("cores", "status", "word"),
        [(2, "ok", "2 threads"), (1, "warning", "in each other's way"), (4, "warning", "idle")],
    )
    def test_against_cores(
        self,
        monkeypatch: pytest.MonkeyPatch,
        machine: cpu.Capabilities,
        cores: int,
        status: str,
        word: str,
    ) -> None:
        _pretend(monkeypatch, machine, physical_cores=cores, quota=cores + 0.5)
        finding = hardware.check_threads()  # with the two threads that every test has
        assert finding.status == status
        assert word in finding.detail
        assert f"quota {cores}.5" in finding.detail
        if status != "ok":
            assert f"OMP_NUM_THREADS={cores}" in finding.remedy

    def test_set_num_threads_is_tried_and_undone(self) -> None:
        assert hardware.check_set_num_threads().status == "ok"
        assert torch.get_num_threads() == 2

    def test_set_num_threads_that_is_not_honoured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
        finding = hardware.check_set_num_threads()
        assert finding.status == "warning"
        assert "asked for 3 threads, got 2" in finding.detail


class TestMemory:
    def test_preloaded_allocator(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hardware, "_mapped", lambda pattern: ["/x/" + pattern + ".so"])
        assert "tcmalloc" in hardware.check_allocator().detail

    def test_c_library_without_mallopt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hardware, "_mapped", lambda pattern: [])
        monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: SimpleNamespace())
        finding = hardware.check_allocator()
        assert finding.status == "note"
        assert "LD_PRELOAD" in finding.remedy

    @pytest.mark.parametrize(
        ("text", "status", "word"),
        [
            ("always [madvise] never\n", "ok", "madvise"),
            ("always madvise [never]\n", "note", "off"),
            ("odd\n", "ok", "unknown"),
            (None, "note", "does not tell"),
        ],
    )
    def test_huge_pages(self, tmp_path: Path, text: str | None, status: str, word: str) -> None:
        path = tmp_path / "enabled"
        if text is not None:
            path.write_text(text)
        finding = hardware.check_huge_pages(path)
        assert finding.status == status
        assert word in finding.detail


class TestOpenMP:
    def test_two_runtimes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runtimes = ["/a/libgomp.so.1", "/b/libiomp5.so"]
        monkeypatch.setattr(hardware, "_mapped", lambda pattern: runtimes)
        finding = hardware.check_openmp()
        assert finding.status == "warning"
        assert all(runtime in finding.detail for runtime in runtimes)

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
    def test_torch_own_runtime_is_found(self) -> None:
        assert any("omp" in path for path in hardware._mapped(r"lib(?:gomp|iomp5|omp)"))


def test_runs_without_a_proc_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    assert hardware._mapped("libgomp") == []
    assert sys.platform  # the patch is undone by pytest
