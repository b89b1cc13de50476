"""When to freeze which blocks: AutoFreeze's rule as pure functions of gradient norms.

Liu, Agarwal, Venkataraman 2021, arXiv 2102.01386: the gradients of each block are accumulated over an
interval; the relative change of their norm from one interval to the next says how far the block is from
having converged; the blocks in front of the first one whose change reaches a percentile of the changes
of all active blocks are frozen. Two differences: norms are added up, where the paper adds gradients,
which would take a copy of each; and a block may have to qualify several times in a row (``patience``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rule:
    """The settings of the rule.

    Attributes:
        window: optimizer steps from one decision to the next, at least 1.
        percentile: of the changes of all active blocks; those below it qualify. Above 0, at most 100.
        patience: windows in a row that a block has to qualify in, at least 1.
        max_freezes: how often blocks may be frozen, since each time costs a compilation; None for no cap.
        unfreeze_after: windows without a freeze after which everything is unfrozen; None for never.

    Raises:
        ValueError: a setting is out of its range.
    """

    window: int = 50
    percentile: float = 50.0
    patience: int = 2
    max_freezes: int | None = 3
    unfreeze_after: int | None = None

    def __post_init__(self) -> None:
        check_integer("window", self.window, 1)
        check_integer("patience", self.patience, 1)
        if self.max_freezes is not None:
            check_integer("max_freezes", self.max_freezes, 0)
        if self.unfreeze_after is not None:
            check_integer("unfreeze_after", self.unfreeze_after, 1)
        if not _is_number(self.percentile) or not 0 < self.percentile <= 100:
            raise ValueError(
                f"percentile must lie above 0 and not above 100, not {self.percentile!r}: 50 lets the "
                "less changing half of the blocks qualify"
            )


@dataclass(frozen=True)
class Progress:
    """What the rule remembers from window to window.

    Attributes:
        frozen: how many blocks are frozen, counted from the first.
        norms: of each block's gradients in the last window; None where there was none, or no number.
        streaks: in how many windows in a row each block has qualified.
        freezes: how often blocks were frozen.
        windows: complete windows since the last freeze.
    """

    frozen: int
    norms: tuple[float | None, ...]
    streaks: tuple[int, ...]
    freezes: int = 0
    windows: int = 0

    @classmethod
    def start(cls, blocks: int) -> Progress:
        """Nothing frozen, nothing known, for so many blocks."""
        return cls(0, (None,) * blocks, (0,) * blocks)


def after_window(progress: Progress, norms: Sequence[float], rule: Rule) -> Progress:
    """Take note of a complete window.

    Args:
        progress: before it.
        norms: of each block's gradients in it; those of frozen blocks are not looked at.
        rule: the settings.
    """
    active = range(progress.frozen, len(norms))
    changes = {
        block: relative_change(before, norms[block])
        for block in active
        if (before := progress.norms[block]) is not None
    }
    streaks = [0] * len(norms)
    if changes:
        threshold = percentile(list(changes.values()), rule.percentile)
        for block, change in changes.items():
            streaks[block] = progress.streaks[block] + 1 if change < threshold else 0
    kept = tuple(
        norm if block in active and math.isfinite(norm) else None
        for block, norm in enumerate(norms)
    )
    return replace(progress, norms=kept, streaks=tuple(streaks), windows=progress.windows + 1)


def proposed(progress: Progress, rule: Rule) -> int:
    """How many blocks should be frozen, counted from the first; never all of them, never fewer than are.

    The last block always stays active.
    """
    if rule.max_freezes is not None and progress.freezes >= rule.max_freezes:
        return progress.frozen
    count = progress.frozen
    while count < len(progress.streaks) - 1 and progress.streaks[count] >= rule.patience:
        count += 1
    return count


def is_time_to_unfreeze(progress: Progress, rule: Rule) -> bool:
    """Whether ``unfreeze_after`` windows have gone by since the last freeze."""
    if rule.unfreeze_after is None or not progress.frozen:
        return False
    return progress.windows >= rule.unfreeze_after


def after_freeze(progress: Progress, count: int) -> Progress:
    """``count`` blocks are frozen now, more than before."""
    return replace(progress, frozen=count, freezes=progress.freezes + 1, windows=0)


def after_unfreeze(progress: Progress) -> Progress:
    """Nothing is frozen any more; what was seen before says nothing about what comes."""
    fresh = Progress.start(len(progress.streaks))
    return replace(fresh, freezes=progress.freezes)


def reason(before: Progress, norms: Sequence[float], count: int, rule: Rule) -> str:
    """Why the blocks up to ``count`` qualify, in words.

    Args:
        before: the progress before the last window.
        norms: of that window.
        count: how many blocks, from the first, will be frozen.
        rule: the settings.
    """
    changes = [
        relative_change(norm, norms[block])
        for block in range(before.frozen, count)
        if (norm := before.norms[block]) is not None
    ]
    return (
        f"gradient norms changed by at most {max(changes):.1%}, below the {rule.percentile:g}th percentile "
        f"of all active blocks in {rule.patience} window(s) in a row"
    )


def relative_change(before: float, now: float) -> float:
    """``|before - now| / before``; infinite where that is no number, as with gradients of NaN."""
    if before == now:
        return 0.0 if math.isfinite(now) else math.inf
    if not (math.isfinite(before) and math.isfinite(now)) or before == 0:
        return math.inf
    return abs(before - now) / before


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile of ``values``, interpolated linearly as NumPy does by default."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    below, above = ordered[low], ordered[min(low + 1, len(ordered) - 1)]
    if below == above or position == low:
        return below  # infinity minus infinity would be NaN
    return below + (position - low) * (above - below)


def check_integer(name: str, number: object, least: int) -> None:
    """Raise ValueError unless ``number`` is an integer of at least ``least``."""
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {number!r}")


def check_seconds(name: str, seconds: object) -> None:
    """Raise ValueError unless ``seconds`` is None or a finite number of at least 0."""
    if seconds is not None and not (_is_number(seconds) and 0 <= seconds < math.inf):  # type: ignore[operator]
        raise ValueError(f"{name} must be None or a number of seconds, not {seconds!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
