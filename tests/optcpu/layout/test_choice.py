"""Intel's layout is taken where it was measured to be faster, in another process, once."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from optcpu.layout import choice, ipex, native

SHAPES = [(64, 32), (8, 8), (64, 32), (4, 2), (2, 2), (3, 1)]


@pytest.fixture
def both_possible(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipex, "why_impossible", lambda: None)
    monkeypatch.setattr(native, "why_impossible", lambda: None)


def answering(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[list[str]]:
    """Let the trial print ``answer``, or raise it; returns the commands that were run."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer, returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.mark.parametrize(
    ("seconds", "wins"), [((1.0, 0.9), True), ((1.0, 0.97), False), ((1.0, 1.3), False)]
)
def test_it_has_to_be_clearly_faster(
    both_possible: None, monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float], wins: bool
) -> None:
    answer = json.dumps(dict(zip(("native", "ipex"), seconds, strict=True)))
    commands = answering(monkeypatch, f"a warning\n{answer}\n")
    assert [choice.ipex_wins(SHAPES) for _ in range(3)] == [wins] * 3
    assert len(commands) == 1, "it is remembered"
    shapes = json.loads(commands[0][-2])
    assert shapes == [[[64, 32], 2], [[8, 8], 1], [[4, 2], 1], [[2, 2], 1]]


@pytest.mark.parametrize(
    "answer", ["", "no JSON", '{"native": 1.0}', "[]", subprocess.TimeoutExpired("trial", 300)]
)
def test_a_trial_without_a_result_is_lost(
    both_possible: None, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    answering(monkeypatch, answer)
    assert choice.ipex_wins(SHAPES) is False


@pytest.mark.parametrize("module", [ipex, native])
def test_nothing_is_tried_where_one_of_them_is_impossible(
    both_possible: None, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    monkeypatch.setattr(module, "why_impossible", lambda: "not here")
    commands = answering(monkeypatch, "")
    assert choice.ipex_wins(SHAPES) is False
    assert choice.ipex_wins([]) is False
    assert commands == []


@pytest.mark.skipif(
    ipex.why_impossible() is not None or native.why_impossible() is not None,
    reason="needs both layouts",
)
@pytest.mark.slow
def test_the_trial_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choice._winner([((256, 512), 3)]) in ("ipex", "native")
    seconds = choice.trial([((256, 512), 3)])
    assert set(seconds) == {"ipex", "native"}
    assert all(value > 0 for value in seconds.values())
