"""AutoFreeze's rule against examples worked out by hand, and what holds for any gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optcpu.runtime.freezing.rule import (
    Progress,
    Rule,
    after_freeze,
    after_unfreeze,
    after_window,
    is_time_to_unfreeze,
    percentile,
    proposed,
    relative_change,
)


def run(windows: Sequence[Sequence[float]], rule: Rule) -> list[Progress]:
    """The progress behind each window, with every proposal carried out."""
    progress, history = Progress.start(len(windows[0])), []
    for norms in windows:
        progress = after_window(progress, norms, rule)
        if is_time_to_unfreeze(progress, rule):
            progress = after_unfreeze(progress)
        count = proposed(progress, rule)
        if count > progress.frozen:
            progress = after_freeze(progress, count)
        history.append(progress)
    return history


# Changes of the second window: 5, 10, 30 and 40 %, their median 20 %. Of the third, for the last
# two blocks: 10 and 50 %, median 30 %.
EXAMPLE = [[10.0, 10.0, 10.0, 10.0], [9.5, 9.0, 7.0, 14.0], [9.5, 9.0, 6.3, 7.0]]


def test_the_worked_example() -> None:
    frozen = [progress.frozen for progress in run(EXAMPLE, Rule(patience=1))]
    assert frozen == [0, 2, 3]


def test_patience_wants_windows_in_a_row() -> None:
    # Block 0 qualifies in the second window but in the third it changes most; then twice in a row.
    windows = [[10.0, 10.0, 10.0], [10.0, 20.0, 30.0], [50.0, 20.0, 30.0]]
    windows += [[50.0, 10.0, 10.0], [50.0, 20.0, 20.0]]
    frozen = [progress.frozen for progress in run(windows, Rule(patience=2))]
    assert frozen == [0, 0, 0, 0, 1]
    assert [p.frozen for p in run(windows, Rule(patience=1))][1] == 1


def test_only_a_prefix_is_frozen() -> None:
    # Blocks 1 and 2 change least, but block 0 in front of them does not qualify.
    progress = run([[10.0] * 4, [20.0, 10.0, 10.0, 20.0]], Rule(patience=1))[-1]
    assert progress.streaks == (0, 1, 1, 0)
    assert progress.frozen == 0


def test_the_last_block_stays_though_it_qualifies() -> None:
    # 0, 0 and 50 %: all below 100 % but the greatest, which is that of block 0.
    windows = [[10.0] * 3, [15.0, 10.0, 10.0], [15.0, 10.0, 10.0]]
    assert run(windows, Rule(percentile=100, patience=1))[-1].frozen == 0
    windows = [[10.0] * 3, [10.0, 10.0, 15.0], [10.0, 10.0, 15.0]]
    assert run(windows, Rule(percentile=100, patience=1))[-1].frozen == 2


def test_nothing_is_known_behind_the_first_window() -> None:
    progress = after_window(Progress.start(3), [1.0, 2.0, 3.0], Rule(patience=1))
    assert progress.streaks == (0, 0, 0)
    assert progress.norms == (1.0, 2.0, 3.0)


def test_equal_changes_leave_nobody_below_the_percentile() -> None:
    assert run([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], Rule(patience=1))[-1].frozen == 0


def test_a_window_without_numbers_qualifies_nobody_and_is_no_measure_for_the_next() -> None:
    rule = Rule(patience=1)
    history = run([[10.0, 10.0], [math.nan, 20.0], [10.0, 60.0], [10.0, 90.0]], rule)
    assert [p.frozen for p in history] == [0, 0, 0, 1]
    assert history[1].norms == (None, 20.0)


def test_unfreezing_begins_anew_but_keeps_the_count() -> None:
    rule = Rule(patience=1, unfreeze_after=2, max_freezes=1)
    history = run([*EXAMPLE, [9.5, 9.0, 6.3, 7.0], *EXAMPLE], rule)
    assert [p.frozen for p in history] == [0, 2, 2, 0, 0, 0, 0]
    assert history[3].norms == (None,) * 4
    assert history[-1].freezes == 1


@pytest.mark.parametrize(
    ("before", "now", "change"),
    [
        (2.0, 3.0, 0.5),
        (2.0, 1.0, 0.5),
        (0.0, 0.0, 0.0),
        (0.0, 1.0, math.inf),
        (1.0, math.nan, math.inf),
        (math.inf, math.inf, math.inf),
        (math.inf, 1.0, math.inf),
    ],
)
def test_relative_change(before: float, now: float, change: float) -> None:
    assert relative_change(before, now) == change


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=20),
    st.floats(0, 100, exclude_min=True),
)
def test_percentile_is_that_of_numpy(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), abs=1e-9)


def test_percentile_takes_infinities() -> None:
    assert percentile([1.0, math.inf, math.inf], 75) == math.inf
    assert percentile([1.0, 2.0, math.inf], 50) == 2.0
    assert percentile([1.0, 2.0, math.inf], 60) == math.inf


NORMS = st.one_of(st.floats(0, 1e3), st.just(math.nan), st.just(math.inf))


@given(st.data())
def test_what_holds_for_any_gradients(data: st.DataObject) -> None:
    blocks = data.draw(st.integers(2, 6))
    norms = st.lists(NORMS, min_size=blocks, max_size=blocks)
    windows = data.draw(st.lists(norms, min_size=1, max_size=12))
    rule = Rule(
        percentile=data.draw(st.floats(1, 100)),
        patience=data.draw(st.integers(1, 3)),
        max_freezes=data.draw(st.one_of(st.none(), st.integers(0, 3))),
    )
    history = run(windows, rule)
    frozen = [progress.frozen for progress in history]
    assert frozen == sorted(frozen)  # never fewer without unfreezing
    assert max(frozen) < blocks  # never the last
    assert all(count == 0 for count in frozen[: rule.patience])  # a change needs two windows
    freezes = sum(b > a for a, b in zip([0, *frozen], frozen, strict=False))
    assert freezes == history[-1].freezes
    assert rule.max_freezes is None or freezes <= rule.max_freezes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window", 0),
        ("window", 2.5),
        ("patience", 0),
        ("patience", True),
        ("max_freezes", -1),
        ("unfreeze_after", 0),
        ("percentile", 0),
        ("percentile", 101),
        ("percentile", math.nan),
        ("percentile", "50"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must .*{value!r}"):
        Rule(**{name: value})  # type: ignore[arg-type]
