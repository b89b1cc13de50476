"""Where optcpu stands, from made-up comparisons to the table, the files and the chart."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest

from optcpu.measure.suite import Entry, Ratio, Suite, standing_in
from optcpu.measure.suite_table import to_text
from tests.optcpu.measure.conftest import MACHINE, make_comparison, make_row

OPTCPU = make_row("optcpu", "optcpu", 80.0, peak_memory_mb=2310.0)
FASTER = make_row("optcpu+optimizer", "optcpu", 60.0, of_ideal=0.8)
PEER = make_row("ipex-compiled-tuned", "peer", 75.0)
WRONG_PEER = make_row("zentorch", "peer", 10.0, learned=False)
COMPILED = make_row("compiled-fp32", "stock", 280.0)


def suite_of(*entries: Entry) -> Suite:
    return Suite(MACHINE, list(entries))


def test_the_one_with_its_optimizer_stands_for_optcpu() -> None:
    standing = standing_in(make_comparison(COMPILED, PEER, WRONG_PEER, OPTCPU, FASTER))
    assert standing is not None
    assert standing.variant == "optcpu+optimizer"
    assert standing.eager == Ratio("eager-fp32", pytest.approx(5.0))
    assert standing.compiled == Ratio("compiled-fp32", pytest.approx(280 / 60))
    assert standing.best_stock == Ratio("compiled-bf16-tuned", pytest.approx(1.6))
    assert standing.best_peer == Ratio("ipex-compiled-tuned", pytest.approx(1.25)), "the right one"
    assert standing.of_ideal == 0.8
    assert standing.memory == pytest.approx(1900 / 2100)


def test_noise_does_not_choose_the_variant() -> None:
    slower = make_row("optcpu+optimizer", "optcpu", 81.0)
    standing = standing_in(make_comparison(OPTCPU, slower))
    assert standing is not None
    assert standing.variant == "optcpu+optimizer"


def test_ratios_are_of_rounds_and_not_of_medians() -> None:
    own = make_row("optcpu", "optcpu", 100.0, rounds_ms=[100.0, 50.0, 400.0])
    comparison = make_comparison(own)
    comparison.rows[0].rounds_ms = [300.0, 200.0, 400.0]
    standing = standing_in(comparison)
    assert standing is not None
    assert standing.eager.times == 3.0


def test_compiled_in_bf16_comes_before_fp32() -> None:
    in_bf16 = make_row("compiled-bf16", "stock", 120.0)
    standing = standing_in(make_comparison(COMPILED, in_bf16, OPTCPU))
    assert standing is not None
    assert standing.compiled == Ratio("compiled-bf16", pytest.approx(1.5))


def test_a_variant_that_did_not_learn_does_not_stand_for_optcpu() -> None:
    wrong = make_row("optcpu+optimizer", "optcpu", 6.0, learned=False, notes=["did not learn: x"])
    standing = standing_in(make_comparison(OPTCPU, wrong))
    assert standing is not None
    assert standing.variant == "optcpu"
    assert standing.compiled is standing.best_peer is None
    alone = Entry("mlp", make_comparison(wrong))
    assert alone.standing is None
    assert alone.problem == "did not learn: x"


def test_problems_are_told() -> None:
    failed = make_row("optcpu", "optcpu", 80.0, failed="out of memory", learned=False, rounds_ms=[])
    assert Entry("mlp", make_comparison(failed)).problem == "out of memory"
    assert Entry("mlp", make_comparison()).problem == "optcpu was not among the variants"
    assert Entry("mlp", failed="no data").problem == "no data"
    assert Entry("mlp", make_comparison(OPTCPU)).problem is None


@pytest.mark.parametrize(
    ("width", "variant"), [(100, ["optcpu+optimizer"]), (80, [])], ids=["wide", "usual"]
)
def test_the_table_fits_a_terminal(width: int, variant: list[str]) -> None:
    suite = suite_of(
        Entry("encoder-accumulation-4", make_comparison(COMPILED, PEER, FASTER)),
        Entry("digits-cnn", failed="scikit-learn is not installed"),
    )
    text = to_text(suite, width)
    lines = [line.split() for line in text.splitlines()]
    figures = ["60.0", "5.00", "4.67", "1.60", "1.25", "80%", "0.90"]
    assert ["encoder-accumulation-4", *variant, *figures] in lines
    assert ["digits-cnn", *(["failed"] if variant else []), *["-"] * 7] in lines
    assert "digits-cnn: scikit-learn is not installed." in text
    assert max(len(line) for line in text.splitlines()) <= width


def test_markdown(tmp_path: Path) -> None:
    suite = suite_of(
        Entry("mlp", make_comparison(COMPILED, OPTCPU)), Entry("lstm", failed="no text")
    )
    text = suite.to_markdown(tmp_path / "bench.md")
    assert (tmp_path / "bench.md").read_text() == text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert table[2] == (
        "| mlp | optcpu | 80.0 | 3.75 | 3.50 | 1.20 (compiled-bf16-tuned) | - | 75% | 1.10 |"
    )
    assert "lstm: no text." in text
    assert str(MACHINE) in text
    with pytest.raises(ValueError, match=r"must end in '\.md'"):
        suite.to_markdown(tmp_path / "bench.csv")


def test_json(tmp_path: Path) -> None:
    odd = make_row("zentorch", "peer", 10.0, learned=False, gradient_error=math.nan)
    suite = suite_of(Entry("mlp", make_comparison(odd, OPTCPU)), Entry("lstm", failed="no text"))
    suite.to_json(tmp_path / "bench.json")
    read = json.loads((tmp_path / "bench.json").read_text())
    assert read["machine"]["cpu"] == MACHINE.cpu
    mlp, lstm = read["workloads"]
    assert mlp["standing"]["best_stock"]["variant"] == "compiled-bf16-tuned"
    assert mlp["comparison"]["rows"][3]["gradient_error"] is None
    assert (lstm["problem"], lstm["standing"], lstm["comparison"]) == ("no text", None, None)


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="no matplotlib")
def test_a_png_is_drawn(tmp_path: Path) -> None:
    suite = suite_of(
        Entry("mlp", make_comparison(COMPILED, PEER, OPTCPU)), Entry("lstm", failed="no text")
    )
    assert suite.plot(tmp_path / "bench.png") == tmp_path / "bench.png"
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    suite_of(Entry("lstm", failed="no text")).plot(tmp_path / "bench.png")
