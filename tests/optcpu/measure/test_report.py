from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from optcpu.measure.report import to_text
from optcpu.measure.result import Comparison, Row

MakeRow = Callable[..., Row]
MakeComparison = Callable[..., Comparison]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_tables_fit_and_cut_nothing_off(
    width: int, row: MakeRow, comparison: MakeComparison
) -> None:
    made = comparison(
        row("optcpu+optimizer", "optcpu", 1234.5, units_per_second=123456.0),
        row("optcpu", "optcpu", 5e6, peak_memory_mb=1234567.0, compile_seconds=2345.6),
        unit="pictures",
    )
    text = to_text(made, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "transformer.h.11.attn.c_attn.weight" in text
    told = ("123,456", "5.0e+06", "1,234,567", "2345.6", "6.0e-05", "1.9e-05", "1.2e-02", "0.01234")
    assert [figure for figure in told if figure not in text] == []
    for heading in ("pictures/s", "eager", "stock", "ideal", "peak", "compile", "learned"):
        assert heading in text


def test_a_table_without_room_becomes_lines(row: MakeRow, comparison: MakeComparison) -> None:
    lines = to_text(comparison(row("optcpu", "optcpu", 48.0)), 60).splitlines()
    assert "optcpu: ms/step 48.0, (range) 46.6-52.8, samples/s 2,667," in lines
    assert "  x eager 6.25, x stock 2.00, of ideal 125%, peak MB 1,900," in lines


def test_a_narrow_table_leaves_the_ranges_out(row: MakeRow, comparison: MakeComparison) -> None:
    made = comparison(row("optcpu", "optcpu", 50.0))
    assert "(range)" in to_text(made, 120)
    assert "(range)" not in to_text(made, 80)


def test_the_ideal_step_is_told(row: MakeRow, comparison: MakeComparison) -> None:
    text = to_text(comparison(row("optcpu", "optcpu", 80.0)), 200)
    assert "75%" in text
    assert (
        "Ideal step: 60.0 ms, of which 40.0 for 38.4 GFLOP of products at 960 GFLOP/s (bf16, onednn) and "
        "20.0 for an update of 640 MB at 32 GB/s: what this machine was measured to do at best."
        in text
    )


def test_the_terminals_width_is_taken(
    row: MakeRow, comparison: MakeComparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    made = comparison(row("optcpu", "optcpu", 50.0))
    assert str(made) == to_text(made, 80)


def test_the_best_stock_variant_is_marked(row: MakeRow, comparison: MakeComparison) -> None:
    text = to_text(comparison(row("optcpu", "optcpu", 50.0)), 120)
    assert "compiled-bf16-tuned *" in text
    assert "optcpu *" not in text


def test_a_gain_is_told(row: MakeRow, comparison: MakeComparison) -> None:
    made = comparison(row("optcpu", "optcpu", 48.0, compile_seconds=14.0))
    assert made.verdict == [
        "* The fastest stock variant is compiled-bf16-tuned (96.0 ms).",
        "optcpu is 2.00x as fast as the best stock variant (compiled-bf16-tuned), and 6.25x as "
        "fast as eager-fp32.",
    ]


def test_a_loss_is_told(row: MakeRow, comparison: MakeComparison) -> None:
    text = " ".join(comparison(row("optcpu", "optcpu", 120.0)).verdict)
    assert "optcpu is SLOWER than the best stock variant (compiled-bf16-tuned): 0.80x" in text


@pytest.mark.parametrize("ms", [94.0, 96.0, 98.0])
def test_what_noise_could_explain_is_called_level(
    ms: float, row: MakeRow, comparison: MakeComparison
) -> None:
    assert "optcpu is level with" in " ".join(comparison(row("optcpu", "optcpu", ms)).verdict)


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [
        ({"gradient_error": 2e-2}, "gradient error is LARGER than eager-bf16's (2.0e-02 against"),
        ({"output_error": math.nan}, "output error is LARGER than eager-bf16's (nan against"),
        ({"loss_error": 1e-3}, "loss error is LARGER"),
        ({"peak_memory_mb": 4200.0}, "it needs 2.00x the memory of compiled-bf16-tuned"),
        ({"compile_seconds": 34.0}, "it compiles 20 s longer than compiled-bf16-tuned"),
    ],
)
def test_what_else_is_worse_is_told(
    figures: dict[str, float], sentence: str, row: MakeRow, comparison: MakeComparison
) -> None:
    made = comparison(row("optcpu", "optcpu", 50.0, **figures))
    assert sentence in made.verdict[-1]
    assert made.verdict[-1].startswith("Against optcpu: ")


def test_smaller_errors_are_not_held_against_it(row: MakeRow, comparison: MakeComparison) -> None:
    made = comparison(row("optcpu", "optcpu", 50.0, gradient_error=1e-5, compile_seconds=3.0))
    assert not any("Against" in sentence for sentence in made.verdict)


def test_speed_without_learning_means_nothing(row: MakeRow, comparison: MakeComparison) -> None:
    made = comparison(row("optcpu", "optcpu", 1.0, learned=False))
    assert "optcpu did NOT LEARN" in made.verdict[1]
    assert not any("as fast" in sentence for sentence in made.verdict)


def test_peers_are_compared_with_unless_they_did_not_learn(
    row: MakeRow, comparison: MakeComparison
) -> None:
    own = row("optcpu", "optcpu", 50.0)
    good = comparison(row("ipex", "peer", 75.0), own)
    assert "optcpu is 1.50x as fast as ipex." in good.verdict
    bad = comparison(row("zentorch", "peer", 10.0, learned=False), own)
    assert not any("zentorch" in sentence for sentence in bad.verdict)


def test_a_failed_variant_stands_in_both_tables_with_its_reason(
    comparison: MakeComparison,
) -> None:
    failed = Row("optcpu", "optcpu", failed="RuntimeError: no such kernel\nmore lines")
    made = comparison(failed)
    text = to_text(made, 120)
    assert "optcpu failed: RuntimeError: no such kernel" in text
    assert "more lines" not in text
    assert made.verdict[1].startswith("optcpu FAILED")


def test_rows_are_found_by_name(comparison: MakeComparison) -> None:
    made = comparison()
    assert made["eager-bf16"].variant == "eager-bf16"
    with pytest.raises(KeyError, match=r"'ipex' was not measured; measured: eager-fp32"):
        made["ipex"]
