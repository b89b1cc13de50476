"""Early stopping, and which validation was the best."""

from __future__ import annotations

import math
from typing import Any

from optcpu.runtime.options import EarlyStopping


def is_better(value: float, than: float | None, mode: str, min_delta: float = 0.0) -> bool:
    """Whether ``value`` improves on ``than`` by more than ``min_delta``.

    None is improved by any number; NaN and infinities are no improvement, whatever the mode.
    """
    if not math.isfinite(value):
        return False
    if than is None or not math.isfinite(than):
        return True
    return than - value > min_delta if mode == "min" else value - than > min_delta


class Stopper:
    """Decides after each validation whether training shall stop.

    Attributes:
        best: the best value so far; None before the first.
        waited: validations since then.
    """

    def __init__(self, options: EarlyStopping) -> None:
        self.options = options
        self.best: float | None = None
        self.waited = 0

    def reason_to_stop(self, metrics: dict[str, float]) -> str | None:
        """Take note of a validation; why training shall stop now, in words, or None."""
        options, value = self.options, metrics[self.options.monitor]
        if options.check_finite and not math.isfinite(value):
            return f"{options.monitor} is {value}"
        if is_better(value, self.best, options.mode, options.min_delta):
            self.best, self.waited = value, 0
            return None
        self.waited += 1
        if self.waited < options.patience:
            return None
        best = "none" if self.best is None else f"{self.best:.6g}"
        return (
            f"{options.monitor} has not improved in {self.waited} validations (best {best}, "
            f"now {value:.6g})"
        )

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, and how it was set."""
        return {"best": self.best, "waited": self.waited, "options": self.options.model_dump()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; anew if another metric was watched, or another way."""
        before, now = state["options"], self.options.model_dump()
        if all(before[name] == now[name] for name in ("monitor", "mode")):
            self.best, self.waited = state["best"], state["waited"]
