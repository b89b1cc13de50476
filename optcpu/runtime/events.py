"""Telling the callbacks of what happens, each once, also where one of them fails."""

from __future__ import annotations

from typing import Any

from optcpu.runtime.callbacks import Callback
from optcpu.runtime.run import Run


def tell(run: Run, trainer: Any, event: str, *arguments: dict[str, float]) -> None:
    """Call ``event`` of each callback.

    Where one raises, those behind it stand in ``run.position.untold``, and thus in a checkpoint: a run that
    goes on calls them first (:func:`tell_the_rest`), and the one that failed not again.

    Args:
        run: whose callbacks are told.
        trainer: their first argument.
        event: the name of a method of :class:`optcpu.runtime.callbacks.Callback`.
        arguments: those that follow, metrics by name, which a checkpoint can hold.
    """
    if not run.callbacks:
        return
    left = [type(callback).__name__ for callback in run.callbacks]
    noted = [dict(metrics) for metrics in arguments]  # before a callback adds what it likes
    run.position.untold = {"event": event, "arguments": noted, "left": left}
    for callback in run.callbacks:
        del left[0]
        getattr(callback, event)(trainer, *arguments)
    run.position.untold = None


def tell_the_rest(run: Run, trainer: Any) -> None:
    """Call the callbacks that an event was not told to, since one in front of them raised."""
    untold = run.position.untold
    if untold is None:
        return
    names = list(untold["left"])
    behind: list[Callback] = []
    # From the last on, as there may be several of a kind, of which the first have been told. The callbacks
    # that a run has may have changed since then.
    for callback in reversed(run.callbacks):
        if type(callback).__name__ in names:
            names.remove(type(callback).__name__)
            behind.insert(0, callback)
    left = untold["left"] = [type(callback).__name__ for callback in behind]
    for callback in behind:
        del left[0]
        getattr(callback, untold["event"])(trainer, *untold["arguments"])
    run.position.untold = None
