from __future__ import annotations

import csv
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from optcpu import doctor
from optcpu.cli import main
from optcpu.errors import OptcpuError

ROOT = Path(__file__).parents[2]
QUICK = ["--model", "digits-cnn", "--batch-size", "8", "--no-progress"]


class FakeComparison:
    """Stands in for a comparison that would take a minute."""

    def __init__(self, failed: str | None = None) -> None:
        self.rows = [
            SimpleNamespace(kind="stock", failed="not here"),
            SimpleNamespace(kind="optcpu", failed=failed),
        ]

    def to_json(self, path: Path) -> None:
        path.write_text("{}")

    def to_csv(self, path: Path) -> None:
        path.write_text("variant\n")

    def plot(self, path: Path) -> None:
        path.write_bytes(b"PNG")

    def __rich__(self) -> str:
        return "the table"


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Run in an empty folder, with ``compare`` replaced; gives what it was called with."""
    seen: dict[str, Any] = {}

    def fake(model: nn.Module, batch: object, **options: object) -> FakeComparison:
        seen.update(options, model=model, batch=batch)
        return FakeComparison()

    monkeypatch.setattr(importlib.import_module("optcpu.compare"), "compare", fake)
    _pretend_matplotlib(monkeypatch, installed=True)
    monkeypatch.chdir(tmp_path)
    return seen


def _pretend_matplotlib(monkeypatch: pytest.MonkeyPatch, *, installed: bool) -> None:
    find = importlib.util.find_spec
    spec = ModuleSpec("matplotlib", None) if installed else None
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: spec if name == "matplotlib" else find(name)
    )


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    return line


class TestCompare:
    def test_options_arrive(self, compared: dict[str, Any]) -> None:
        counts = ["--steps", "7", "--rounds", "2", "--accumulation", "4", "--threads", "1"]
        others = ["--round-seconds", "0.5", "--precision", "fp32"]
        names = ["--variants", "eager-fp32, optcpu"]
        assert main(["compare", *QUICK, *counts, *others, *names]) == 0
        assert compared["steps"] == 7
        assert compared["rounds"] == 2
        assert compared["round_seconds"] == 0.5
        assert compared["accumulation_steps"] == 4
        assert compared["threads"] == 1
        assert compared["variants"] == ["eager-fp32", "optcpu"]
        assert compared["precision"] == "fp32"
        assert compared["progress"] is False
        assert (compared["unit"], compared["units_per_batch"]) == ("samples", 8)
        assert compared["name"] == "digits-cnn"
        assert compared["batch"][0][0].shape == (8, 1, 8, 8)

    def test_without_arguments_it_trains_the_mlp(self, compared: dict[str, Any]) -> None:
        assert main(["compare"]) == 0
        assert compared["name"] == "mlp"
        assert sum(p.numel() for p in compared["model"].parameters()) > 50_000_000
        assert compared["variants"] is None
        assert compared["progress"] is None

    @pytest.mark.parametrize(
        ("output", "prefix"),
        [
            (None, "optcpu-compare-digits-cnn"),
            ("run1", "run1"),
            ("run1.json", "run1"),
            ("run.v2", "run.v2"),
            ("new/folder/", "new/folder/optcpu-compare-digits-cnn"),
            (".", "optcpu-compare-digits-cnn"),
            ("new/run", "new/run"),
        ],
    )
    def test_files_go_where_asked(
        self, compared: dict[str, Any], tmp_path: Path, output: str | None, prefix: str
    ) -> None:
        chosen = [] if output is None else ["--output", output]
        assert main(["compare", *QUICK, *chosen]) == 0
        for suffix in (".json", ".csv", ".png"):
            assert (tmp_path / f"{prefix}{suffix}").stat().st_size > 0

    def test_table_and_file_names_are_printed(
        self, compared: dict[str, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        main(["compare", *QUICK])
        printed = " ".join(capsys.readouterr().out.split())  # however wide the terminal is
        assert "handwritten digits" in printed
        assert "the table" in printed
        assert "optcpu-compare-digits-cnn.png" in printed

    def test_missing_matplotlib_is_told(
        self,
        compared: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
    ) -> None:
        _pretend_matplotlib(monkeypatch, installed=False)
        assert main(["compare", *QUICK]) == 0
        assert "pip install matplotlib" in capsys.readouterr().out
        assert not list(tmp_path.glob("*.png"))
        assert list(tmp_path.glob("*.csv"))

    def test_own_model_from_the_current_folder(
        self, compared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
        (tmp_path / "my_net.py").write_text(
            "import torch\ndef make(): return torch.nn.Linear(2, 1), torch.ones(3, 2)\n"
        )
        assert main(["compare", "--model", "my_net:make"]) == 0
        assert compared["units_per_batch"] == 3
        assert (tmp_path / "optcpu-compare-my_net-make.json").exists()

    def test_failure_of_optcpu_is_seen_in_the_status(
        self, compared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            importlib.import_module("optcpu.compare"),
            "compare",
            lambda *arguments, **options: FakeComparison(failed="it broke"),
        )
        assert main(["compare", *QUICK]) == 1


class TestWrongInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--model", "mpl"], "did you mean 'mlp'?"),
            (["--model", "no_such_module:f"], "no module 'no_such_module'"),
            (["--model", "json:dumpss"], "did you mean 'dumps'?"),
            (["--model", "json:dumps"], "needs a value for obj"),
            (["--model", "net.py:make"], "is a file, not a module"),
            (["--model", ""], "no workload is called ''"),
            (["--model", "digits-cnn", "--batch-size", "100000"], "larger than the data set"),
            ([*QUICK, "--output", "/proc/nowhere/x"], "cannot write into /proc/nowhere"),
            ([*QUICK, "--output", "file/x"], "cannot write into file"),
        ],
    )
    def test_one_line_says_what_is_wrong(
        self,
        compared: dict[str, Any],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        arguments: list[str],
        message: str,
    ) -> None:
        (tmp_path / "file").touch()
        assert main(["compare", *arguments]) == 2
        line = _error(capsys)
        assert line.startswith("optcpu: ")
        assert message in line
        assert not compared  # nothing was started

    def test_a_page_of_another_kind_is_refused_at_once(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["inspect", "--model", "no_such_module:f", "--output", "x.weird"]) == 2
        assert "'x.weird' ends in '.weird'" in _error(capsys)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["compare", "--steps", "0"], "expected a positive whole number, got '0'"),
            (["compare", "--steps", "many"], "got 'many'"),
            (["compare", "--rounds", "1.5"], "got '1.5'"),
            (["compare", "--round-seconds", "nan"], "expected a positive number, got 'nan'"),
            (["compare", "--round-seconds", "inf"], "got 'inf'"),
            (["compare", "--variants", ","], "names with commas"),
            (["compare", "--precision", "int8"], "invalid choice: 'int8'"),
            (["compare", "--nonsense"], "unrecognized arguments: --nonsense"),
            (["compaer"], "invalid choice: 'compaer'"),
        ],
    )
    def test_options_are_checked_before_anything_runs(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err

    def test_several_lines_become_one(
        self,
        compared: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def fail(*arguments: object, **options: object) -> None:
            raise OptcpuError("first\n  second")

        monkeypatch.setattr(importlib.import_module("optcpu.compare"), "compare", fail)
        assert main(["compare", *QUICK]) == 2
        assert _error(capsys) == "optcpu: first second"

    def test_traceback_on_demand(self) -> None:
        with pytest.raises(ValueError, match="did you mean"):
            main(["compare", "--model", "mpl", "--traceback"])

    def test_other_errors_are_not_hidden(
        self, compared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*arguments: object, **options: object) -> None:
            raise AssertionError("a bug")

        monkeypatch.setattr(importlib.import_module("optcpu.compare"), "compare", fail)
        with pytest.raises(AssertionError, match="a bug"):
            main(["compare", *QUICK])

    def test_interruption(
        self,
        compared: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def interrupt(*arguments: object, **options: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(importlib.import_module("optcpu.compare"), "compare", interrupt)
        assert main(["compare", *QUICK]) == 130
        assert "interrupted" in capsys.readouterr().err


class TestDoctor:
    FINDINGS = (
        doctor.Finding("threads", "warning", "5 threads for 2 cores", "OMP_NUM_THREADS=2"),
        doctor.Finding("huge pages", "note", "off"),
    )

    def test_table(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(doctor, "examine", lambda: list(self.FINDINGS))
        assert main(["doctor"]) == 0
        printed = capsys.readouterr().out
        assert "5 threads for 2 cores" in printed
        assert "→ OMP_NUM_THREADS=2" in printed

    def test_json(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(doctor, "examine", lambda: list(self.FINDINGS))
        assert main(["doctor", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["remedy"] == "OMP_NUM_THREADS=2"

    def test_without_utf_8(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "examine", lambda: list(self.FINDINGS))
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
        assert main(["doctor"]) == 0
        sys.stdout.flush()
        assert b"? OMP_NUM_THREADS=2" in written.getvalue()

    def test_unusable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        findings = [*self.FINDINGS, doctor.Finding("C++ compiler", "error", "none")]
        monkeypatch.setattr(doctor, "examine", lambda: findings)
        assert main(["doctor"]) == 1


def _run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command as a user calls it, in a process and folder of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-m", "optcpu", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=600,
    )


class TestAsAProcess:
    def test_help_and_no_command(self, tmp_path: Path) -> None:
        helped = _run("--help", cwd=tmp_path)
        assert helped.returncode == 0
        assert all(command in helped.stdout for command in ("compare", "inspect", "doctor"))
        bare = _run(cwd=tmp_path)
        assert bare.returncode == 2
        assert bare.stderr == helped.stdout

    def test_version(self, tmp_path: Path) -> None:
        try:
            version = importlib.metadata.version("optcpu")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("optcpu is not installed, only on the path")
        assert _run("--version", cwd=tmp_path).stdout == f"optcpu {version}\n"

    def test_help_does_not_import_torch(self, tmp_path: Path) -> None:
        code = "import sys, optcpu.cli; print('torch' in sys.modules)"
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        told = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )
        assert told.stdout == "False\n"

    def test_wrong_input_leaves_no_traceback(self, tmp_path: Path) -> None:
        ended = _run("compare", "--model", "nothing", cwd=tmp_path)
        assert ended.returncode == 2
        assert "Traceback" not in ended.stderr
        assert ended.stdout == ""

    @pytest.mark.slow
    def test_reader_that_leaves_early(self, tmp_path: Path) -> None:
        command = f"{sys.executable} -m optcpu doctor --json | head -c 1"
        ended = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert ended.stderr == ""

    @pytest.mark.slow
    def test_compare(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        ended = _run(
            *("compare", "--model", "digits-cnn", "--batch-size", "32", "--steps", "40"),
            *("--rounds", "1", "--round-seconds", "0.2", "--variants", "optcpu"),
            cwd=tmp_path,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        saved = json.loads((tmp_path / "optcpu-compare-digits-cnn.json").read_text())
        rows = {row["variant"]: row for row in saved["rows"]}
        assert set(rows) == {"eager-fp32", "optcpu"}
        assert rows["optcpu"]["step_ms"] > 0
        assert rows["optcpu"]["learned"]
        with (tmp_path / "optcpu-compare-digits-cnn.csv").open() as file:
            assert [row["variant"] for row in csv.DictReader(file)] == ["eager-fp32", "optcpu"]
        assert (tmp_path / "optcpu-compare-digits-cnn.png").read_bytes()[:4] == b"\x89PNG"
        assert all(len(line) <= 80 for line in ended.stdout.splitlines())

    @pytest.mark.slow
    def test_inspect(self, tmp_path: Path) -> None:
        ended = _run(
            *("inspect", "--model", "digits-cnn", "--batch-size", "8", "--output", "out/page.html"),
            cwd=tmp_path,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "<html" in (tmp_path / "out/page.html").read_text()
        assert "out/page.html" in ended.stdout

    def test_doctor(self, tmp_path: Path) -> None:
        ended = _run("doctor", "--json", cwd=tmp_path)
        findings = json.loads(ended.stdout)
        assert len(findings) == len(doctor.CHECKS)
        unusable = any(finding["status"] == "error" for finding in findings)
        assert ended.returncode == int(unusable), ended.stderr
