from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch

from optcpu.doctor import Finding, libraries


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
        finding = libraries.check_torch()
        assert finding.status == status
        assert version in finding.detail

    def test_without_onednn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert "without oneDNN" in libraries.check_torch().detail


class TestExtensions:
    @pytest.fixture
    def installed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
        """Pretend that both extensions are installed; their modules are looked for in a folder."""
        monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.2.3")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        libraries._why_import_fails.cache_clear()
        yield tmp_path
        libraries._why_import_fails.cache_clear()

    def test_absent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(package: str) -> str:
            raise importlib.metadata.PackageNotFoundError(package)

        monkeypatch.setattr(importlib.metadata, "version", absent)
        assert libraries.check_ipex().status == "note"
        assert libraries.check_zentorch().status == "note"

    def test_fits(self, installed: Path) -> None:
        (installed / "zentorch.py").write_text("")
        assert libraries.check_zentorch() == Finding("zentorch", "ok", "1.2.3 can be imported")

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
        finding = libraries.check_ipex()
        assert finding.status == "warning"
        assert told in finding.detail
        assert "torch==2.8.0" in finding.remedy


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else 1)
    finding = libraries.check_optional_libraries()
    assert finding.status == "note"
    assert finding.remedy == "pip install scikit-learn"


@pytest.mark.parametrize(
    ("native_problem", "ipex_problem", "import_problem", "status", "detail"),
    [
        (None, None, None, "ok", "possible: native, ipex, none"),
        (None, "too old", None, "ok", "possible: native, none; not ipex: too old"),
        (None, None, "it fails", "ok", "possible: native, none; not ipex: it fails"),
        ("no BF16", None, None, "note", "possible: none; not native, nor ipex: no BF16"),
        ("no BF16", "too old", None, "note", "possible: none; not native, nor ipex: no BF16"),
    ],
)
def test_layouts_and_what_they_lack(
    monkeypatch: pytest.MonkeyPatch,
    native_problem: str | None,
    ipex_problem: str | None,
    import_problem: str | None,
    status: Literal["ok", "note"],
    detail: str,
) -> None:
    monkeypatch.setattr(libraries.native, "why_impossible", lambda: native_problem)
    monkeypatch.setattr(libraries.ipex, "why_impossible", lambda: ipex_problem)
    monkeypatch.setattr(libraries, "_why_import_fails", lambda module: import_problem)
    assert libraries.check_layouts() == Finding("weight layouts", status, detail)
