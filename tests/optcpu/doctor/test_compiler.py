from __future__ import annotations

import stat
from pathlib import Path

import pytest

from optcpu.doctor import compiler


class TestCompiler:
    @staticmethod
    def _compiler(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
        path = folder / "compiler"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(path))

    def test_works_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CXX", raising=False)
        finding = compiler.check_compiler()
        assert finding.status == "ok", finding
        assert "builds and runs" in finding.detail

    @pytest.mark.parametrize("name", ["g++-of-another-world", "  "])
    def test_missing(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setenv("CXX", name)
        finding = compiler.check_compiler()
        assert finding.status == "error"
        assert "apt-get install g++" in finding.remedy

    def test_fails(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self._compiler(monkeypatch, tmp_path, "echo 'x.cpp:1: error: no such thing' >&2; exit 1")
        finding = compiler.check_compiler()
        assert finding.status == "error"
        assert "error: no such thing" in finding.detail

    def test_without_python_headers(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        message = "x.cpp:2:10: fatal error: Python.h: No such file or directory"
        self._compiler(monkeypatch, tmp_path, f"echo '{message}' >&2; exit 1")
        assert "python3-dev" in compiler.check_compiler().remedy

    def test_builds_what_does_not_run(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        build = (
            'while [ "$1" != -o ]; do shift; done\n'
            'printf "#!/bin/sh\\nexit 3\\n" > "$2"; chmod +x "$2"'
        )
        self._compiler(monkeypatch, tmp_path, build)
        finding = compiler.check_compiler()
        assert finding.status == "error"
        assert "status 3" in finding.detail


class TestCompileCache:
    def test_size(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(bytes(3 * 2**20))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        finding = compiler.check_compile_cache()
        assert finding.status == "ok"
        assert "3 MiB" in finding.detail

    def test_large(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(bytes(100))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(compiler, "_LARGE_CACHE_BYTES", 50)
        assert compiler.check_compile_cache().remedy == f"rm -r {tmp_path} frees it"

    def test_looking_makes_nothing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "new"))
        assert compiler.check_compile_cache().status == "ok"
        assert list(tmp_path.iterdir()) == []

    def test_unwritable(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        # A file where the folder should be: not even root can write there.
        (tmp_path / "file").touch()
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
        finding = compiler.check_compile_cache()
        assert finding.status == "warning"
        assert "TORCHINDUCTOR_CACHE_DIR" in finding.remedy
