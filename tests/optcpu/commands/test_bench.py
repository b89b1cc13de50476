"""``optcpu bench``: the machine's limits as a table or as JSON, and the suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optcpu import bench
from optcpu.cli import main
from optcpu.measure import roofline
from tests.optcpu.measure.conftest import LIMITS, make_comparison, make_row


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nothing is measured; with how many threads it would have been."""
    asked: list[int] = []

    def measured(threads: int) -> roofline.Limits:
        asked.append(threads)
        return LIMITS

    monkeypatch.setattr(roofline, "measure_limits", measured)
    return asked


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--roofline"]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["products", "in", "bf16,", "onednn", "960", "GFLOP"] in shown
    assert ["update", "in", "place", "32", "GB"] in shown
    assert ["first", "touch,", "huge", "pages", "18", "GB"] in shown


def test_json(capsys: pytest.CaptureFixture[str], threads: list[int]) -> None:
    assert main(["bench", "--roofline", "--json", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out) == LIMITS.to_dict()
    assert threads == [1]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``compare`` was asked for; it gives made-up figures."""
    asked: list[dict[str, Any]] = []

    def compare(model: Any, batches: Any, **options: Any) -> Any:
        asked.append(options)
        return make_comparison(make_row("optcpu", "optcpu", 80.0), name=options["name"])

    monkeypatch.setattr(bench, "compare", compare)
    return asked


def test_suite(
    compared: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "new" / "result"
    command = ["bench", "--workloads", "digits-cnn, small-cnn", "--rounds", "3", "--no-progress"]
    assert main([*command, "--output", f"{prefix}.json"]) == 0
    assert [(asked["name"], asked["rounds"], asked["progress"]) for asked in compared] == [
        ("small-cnn", 3, False),
        ("digits-cnn", 3, False),
    ]
    told = capsys.readouterr().out
    assert "small-cnn (1 of 2)" in told
    assert "optcpu is 1.20x as fast as the best stock variant" in told
    assert "1.20 (compiled-bf16-tuned)" in Path(f"{prefix}.md").read_text()
    assert len(json.loads(Path(f"{prefix}.json").read_text())["workloads"]) == 2


def test_what_was_measured_before_an_interruption_is_there(
    compared: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bench.compare

    def interrupted(*args: Any, **options: Any) -> Any:
        if compared:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(bench, "compare", interrupted)
    main(["bench", "--workloads", "digits-cnn,small-cnn", "--output", f"{tmp_path}/"])
    (only,) = json.loads((tmp_path / "optcpu-bench.json").read_text())["workloads"]
    assert only["name"] == "small-cnn"


def test_a_failure_shows_in_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "compare", lambda *args, **options: make_comparison())
    assert main(["bench", "--workloads", "digits-cnn", "--output", f"{tmp_path}/"]) == 1
    assert "optcpu was not among the variants" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "digit"], "no workload 'digit'; did you mean 'digits-cnn'?"),
        (["--json"], "--json goes with --roofline or --updates"),
        (["--roofline", "--updates"], "exclude each other"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
