from __future__ import annotations

from typing import Any

import pytest

from optcpu import bench
from optcpu.bench import SUITE, Case, cases_named, run_suite
from optcpu.errors import OptcpuError
from optcpu.workloads import BUILT_IN
from tests.optcpu.measure.conftest import make_comparison, make_row

SMALL = Case("digits-cnn", "digits-cnn", steps=3, accumulation_steps=2)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Nothing is measured; what ``compare`` was asked for."""
    calls: list[dict[str, Any]] = []

    def compare(model: Any, batches: Any, **options: Any) -> Any:
        calls.append(options)
        return make_comparison(make_row("optcpu", "optcpu", 80.0))

    monkeypatch.setattr(bench, "compare", compare)
    return calls


def test_the_suite_trains_what_there_is_to_train() -> None:
    assert {case.workload for case in SUITE} == set(BUILT_IN)
    assert len({case.name for case in SUITE}) == len(SUITE)


def test_cases_are_named() -> None:
    assert [case.name for case in cases_named(["lstm", "mlp"])] == ["mlp", "lstm"]
    (accumulating,) = cases_named(["mlp-accumulation-8"])
    assert (accumulating.workload, accumulating.accumulation_steps) == ("mlp", 8)
    with pytest.raises(ValueError, match=r"no workload 'resnet'; did you mean 'resnet18'\?"):
        cases_named(["mlp", "resnet"])


def test_options_are_handed_on(asked: list[dict[str, Any]]) -> None:
    suite = run_suite([SMALL], variants=["optcpu"], rounds=7, precision="fp32", threads=1)
    (options,) = asked
    given = {"variants": ["optcpu"], "rounds": 7, "precision": "fp32", "threads": 1}
    given |= {"steps": 3, "accumulation_steps": 2, "unit": "samples", "units_per_batch": 256}
    assert given.items() <= options.items()
    assert suite.machine.threads == 1
    (entry,) = suite.entries
    assert entry.standing is not None


def test_a_case_that_fails_does_not_end_the_suite(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bench.workload

    def workload(name: str, **options: Any) -> Any:
        if name == "mlp":
            raise OptcpuError("no source here")
        return real(name, **options)

    monkeypatch.setattr(bench, "workload", workload)
    begun: list[str] = []
    done: list[int] = []
    suite = run_suite(
        [Case("mlp", "mlp", steps=1), SMALL],
        before=lambda case: begun.append(case.name),
        after=lambda suite: done.append(len(suite.entries)),
    )
    assert [entry.problem for entry in suite.entries] == ["OptcpuError: no source here", None]
    assert begun == ["mlp", "digits-cnn"]
    assert done == [1, 2], "told at once, so that it can be saved"


def test_no_case(asked: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        run_suite([])


def test_wrong_options_end_it_at_once() -> None:
    with pytest.raises(ValueError, match="rounds must be"):
        run_suite([SMALL], rounds=0)


@pytest.mark.slow
@pytest.mark.usefixtures("known_limits")
def test_a_real_case() -> None:
    suite = run_suite([SMALL], variants=["optcpu"], rounds=1, round_seconds=0.05, progress=False)
    (entry,) = suite.entries
    assert entry.problem is None
    assert entry.standing is not None
    assert entry.standing.eager.times > 0
