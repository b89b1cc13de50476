from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import stat
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from optcpu import cpu, doctor
from optcpu.doctor import Finding


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
    monkeypatch.setattr(doctor, "capabilities", lambda: replace(machine, **changes))


def test_every_check_answers_on_this_machine() -> None:
    findings = doctor.examine()
    assert len(findings) == len(doctor.CHECKS)
    assert len({finding.check for finding in findings}) == len(findings)
    for finding in findings:
        assert finding.detail
        assert "could not be checked" not in finding.detail
        if finding.status in ("warning", "error"):
            assert finding.remedy, finding


def test_a_check_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_of_the_moon() -> Finding:
        raise OSError("clouds")

    monkeypatch.setattr(
        doctor, "CHECKS", (check_of_the_moon, lambda: Finding("other", "ok", "fine"))
    )
    first, second = doctor.examine()
    assert first == Finding("of the moon", "warning", "could not be checked: OSError: clouds")
    assert second.status == "ok"


def test_only_errors_make_it_unusable() -> None:
    assert doctor.usable([Finding("a", "warning", "x"), Finding("b", "note", "y")])
    assert not doctor.usable([Finding("a", "ok", "x"), Finding("b", "error", "y")])


class TestProcessor:
    def test_bf16(self, monkeypatch: pytest.MonkeyPatch, machine: cpu.Capabilities) -> None:
        _pretend(monkeypatch, machine)
        assert doctor.check_processor().status == "ok"
        _pretend(monkeypatch, machine, isa="amx_bf16", amx=True)
        assert "AMX" in doctor.check_processor().detail

    def test_none(self, monkeypatch: pytest.MonkeyPatch, machine: cpu.Capabilities) -> None:
        _pretend(monkeypatch, machine, isa="avx2", bf16=False)
        finding = doctor.check_processor()
        assert finding.status == "warning"
        assert "trains in FP32" in finding.detail
        assert "AVX512_BF16" in finding.remedy

    def test_emulated(self, monkeypatch: pytest.MonkeyPatch, machine: cpu.Capabilities) -> None:
        setting = "ONEDNN_MAX_CPU_ISA=AVX2"
        _pretend(monkeypatch, machine, isa="avx2", bf16=False, emulated=(setting,))
        finding = doctor.check_processor()
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
        finding = doctor.check_threads()  # with the two threads that every test has
        assert finding.status == status
        assert word in finding.detail
        assert f"quota {cores}.5" in finding.detail
        if status != "ok":
            assert f"OMP_NUM_THREADS={cores}" in finding.remedy

    def test_set_num_threads_is_tried_and_undone(self) -> None:
        assert doctor.check_set_num_threads().status == "ok"
        assert torch.get_num_threads() == 2

    def test_set_num_threads_that_is_not_honoured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
        finding = doctor.check_set_num_threads()
        assert finding.status == "warning"
        assert "asked for 3 threads, got 2" in finding.detail


class TestCompiler:
    @staticmethod
    def _compiler(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
        path = folder / "compiler"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(path))

    def test_works_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CXX", raising=False)
        finding = doctor.check_compiler()
        assert finding.status == "ok", finding
        assert "builds and runs" in finding.detail

    @pytest.mark.parametrize("name", ["g++-of-another-world", "  "])
    def test_missing(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setenv("CXX", name)
        finding = doctor.check_compiler()
        assert finding.status == "error"
        assert "apt-get install g++" in finding.remedy

    def test_fails(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self._compiler(monkeypatch, tmp_path, "echo 'x.cpp:1: error: no such thing' >&2; exit 1")
        finding = doctor.check_compiler()
        assert finding.status == "error"
        assert "error: no such thing" in finding.detail

    def test_without_python_headers(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        message = "x.cpp:2:10: fatal error: Python.h: No such file or directory"
        self._compiler(monkeypatch, tmp_path, f"echo '{message}' >&2; exit 1")
        assert "python3-dev" in doctor.check_compiler().remedy

    def test_builds_what_does_not_run(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        build = (
            'while [ "$1" != -o ]; do shift; done\n'
            'printf "#!/bin/sh\\nexit 3\\n" > "$2"; chmod +x "$2"'
        )
        self._compiler(monkeypatch, tmp_path, build)
        finding = doctor.check_compiler()
        assert finding.status == "error"
        assert "status 3" in finding.detail


class TestMemory:
    def test_preloaded_allocator(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "_mapped", lambda pattern: ["/x/" + pattern + ".so"])
        assert "tcmalloc" in doctor.check_allocator().detail

    def test_c_library_without_mallopt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "_mapped", lambda pattern: [])
        monkeypatch.setattr(doctor.ctypes, "CDLL", lambda name: SimpleNamespace())
        finding = doctor.check_allocator()
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
        finding = doctor.check_huge_pages(path)
        assert finding.status == status
        assert word in finding.detail


class TestOpenMP:
    def test_two_runtimes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runtimes = ["/a/libgomp.so.1", "/b/libiomp5.so"]
        monkeypatch.setattr(doctor, "_mapped", lambda pattern: runtimes)
        finding = doctor.check_openmp()
        assert finding.status == "warning"
        assert all(runtime in finding.detail for runtime in runtimes)

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
    def test_torch_own_runtime_is_found(self) -> None:
        assert any("omp" in path for path in doctor._mapped(r"lib(?:gomp|iomp5|omp)"))


class TestTorch:
    @pytest.mark.parametrize(
        ("version", "status"),
        [
            ("2.13.0+cpu", "ok"),
            ("2.8.0", "ok"),
            ("2.11.1", "warning"),
            ("3.0.0a0+git123", "warning"),
            ("2.7.1", "error"),
        ],
    )
    def test_version(self, monkeypatch: pytest.MonkeyPatch, version: str, status: str) -> None:
        monkeypatch.setattr(torch, "__version__", version)
        finding = doctor.check_torch()
        assert finding.status == status
        assert version in finding.detail

    def test_without_onednn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert "without oneDNN" in doctor.check_torch().detail


class TestExtensions:
    @pytest.fixture
    def installed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        """Pretend that both extensions are installed; their modules are looked for in a folder."""
        monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.2.3")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return tmp_path

    def test_absent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(package: str) -> str:
            raise importlib.metadata.PackageNotFoundError(package)

        monkeypatch.setattr(importlib.metadata, "version", absent)
        assert doctor.check_ipex().status == "note"
        assert doctor.check_zentorch().status == "note"

    def test_fits(self, installed: Path) -> None:
        (installed / "zentorch.py").write_text("")
        assert doctor.check_zentorch() == Finding("zentorch", "ok", "1.2.3 can be imported")

    @pytest.mark.parametrize(
        ("source", "told"),
        [
            ("raise SystemExit('needs torch 2.8')", "needs torch 2.8"),
            ("import os; os.abort()", "status -6"),
            ("raise AttributeError('no _C')", "AttributeError: no _C"),
        ],
    )
    def test_does_not_fit(self, installed: Path, source: str, told: str) -> None:
        (installed / "intel_extension_for_pytorch.py").write_text(source)
        finding = doctor.check_ipex()
        assert finding.status == "warning"
        assert told in finding.detail
        assert "torch==2.8.0" in finding.remedy


class TestCompileCache:
    def test_size(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(bytes(3 * 2**20))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        finding = doctor.check_compile_cache()
        assert finding.status == "ok"
        assert "3 MiB" in finding.detail

    def test_large(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(bytes(100))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(doctor, "_LARGE_CACHE_BYTES", 50)
        assert doctor.check_compile_cache().remedy == f"rm -r {tmp_path} frees it"

    def test_looking_makes_nothing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "new"))
        assert doctor.check_compile_cache().status == "ok"
        assert list(tmp_path.iterdir()) == []

    def test_unwritable(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        # A file where the folder should be: not even root can write there.
        (tmp_path / "file").touch()
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
        finding = doctor.check_compile_cache()
        assert finding.status == "warning"
        assert "TORCHINDUCTOR_CACHE_DIR" in finding.remedy


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else 1)
    finding = doctor.check_optional_libraries()
    assert finding.status == "note"
    assert finding.remedy == "pip install scikit-learn"


def test_table_fits_80_columns_and_cuts_nothing() -> None:
    console = Console(width=80, file=io.StringIO())
    path = "/a/very/long/path/" + "x" * 100
    doctor.show([Finding("compile cache", "warning", path, f"rm {path}")], console)
    text = console.file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "".join(text.split()).count("x" * 100) == 2


def test_runs_without_a_proc_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    assert doctor._mapped("libgomp") == []
    assert sys.platform  # the patch is undone by pytest
