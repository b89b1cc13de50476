"""Telling the callbacks of what happens, each once, also where one of them fails."""

from __future__ import annotations

from typing import Any

from optcpu.runtime.run import Run


def tell(run: Run, trainer: Any, event: str, *arguments: Any) -> None:
    """Call ``event`` of each callback.

    Where one raises, those behind it stand in ``run.position.untold``, and thus in a checkpoint: a run that
    goes on calls them first (:func:`tell_the_rest`), and the one that failed not again.

    Args:
        run: whose callbacks are told.
        trainer: their first argument.
        event: the name of a method of :class:`optcpu.runtime.callbacks.Callback`.
        arguments: those that follow, which a checkpoint can hold.
    """
    if not run.callbacks:
        return
    left = [type(callback).__name__ for callback in run.callbacks]
    run.position.untold = {"event": event, "arguments": list(arguments), "left": left}
    for callback in run.callbacks:
        del left[0]
        getattr(callback, event)(trainer, *arguments)
    run.position.untold = None


def tell_the_rest(run: Run, trainer: Any) -> None:
    """Call the callbacks that an event was not told to, since one in front of them raised."""
    untold = run.position.untold
    if untold is None:
        return
    left = untold["left"]
    behind = []
    # From the last on, as there may be several of a kind, of which the first have been told.
    for callback in reversed(run.callbacks):
        if left and type(callback).__name__ == left[-1]:
            behind.append(callback)
            left.pop()
    left[:] = [type(callback).__name__ for callback in reversed(behind)]
    for callback in reversed(behind):
        del left[0]
        getattr(callback, untold["event"])(trainer, *untold["arguments"])
    run.position.untold = None
