from __future__ import annotations

import pytest

from optcpu import doctor
from optcpu.doctor import Finding


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
