"""The measuring process of one variant: ``python -m optcpu.measure.worker VARIANT FOLDER``.

It reads commands and writes replies as lines of JSON, over what were its stdin and stdout when it
started; what the model prints goes to stderr. Between two commands it is blocked on reading. It
ends when its stdin does, so it cannot outlive the process that started it.

Commands: ``{"do": "prepare"}``, ``{"do": "turn", "steps": n, "reset_peak": bool}`` and
``{"do": "profile", "steps": n}``, each with ``"hand_back": bool``: whether to return
freed memory to the system before sleeping again.
Replies: ``{"progress": text}`` any number of times, then ``{"result": {...}}``, or
``{"failed": reason, "log": traceback}``, after which the worker ends.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from optcpu.errors import FallbackWarning
from optcpu.measure.payload import PAYLOAD_FILE, Payload
from optcpu.measure.resident import peak_mb, reset_peak, resident_mb
from optcpu.measure.training import SETTINGS_FILE, Settings, Training
from optcpu.measure.variants import VARIANTS
from optcpu.memory import hand_back_freed_memory, keep_freed_memory

_PROGRESS_INTERVAL_S = 0.5


class Channel:
    """The pipes to the process that started this one."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._source = os.fdopen(os.dup(0), "r", encoding="utf-8")
        self._sink: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        # The model's own reading and writing must not touch the pipes.
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(2, 1)
        self._stage, self._next_progress = "", 0.0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._source:
            self._commands.put(json.loads(line))
        # The other side is gone, maybe in the middle of a long compilation here.
        os._exit(0)

    def commands(self) -> Iterator[dict[str, Any]]:
        while True:
            yield self._commands.get()

    def send(self, message: dict[str, Any]) -> None:
        self._sink.write(json.dumps(message) + "\n")
        self._sink.flush()

    def progress(self, text: str) -> None:
        """Tell ``text``, unless only the count at its end has changed since a moment ago."""
        now, stage = time.monotonic(), text.rstrip("0123456789/ ")
        if stage != self._stage or now >= self._next_progress:
            self._stage, self._next_progress = stage, now + _PROGRESS_INTERVAL_S
            self.send({"progress": text})


class Worker:
    """One variant, from loading to timed turns."""

    def __init__(self, variant: str, folder: Path, progress: Callable[[str], None]) -> None:
        self._folder = folder
        self._progress = progress
        settings = json.loads((folder / SETTINGS_FILE).read_text())
        self._settings = Settings(**settings)
        self._variant = VARIANTS[variant]
        self._notes: list[str] = []
        torch.set_num_threads(self._settings.threads)
        os.environ.setdefault("NPROC", str(self._settings.threads))  # of JAX
        if self._variant.tuned and not keep_freed_memory():
            self._notes.append("the allocator cannot be tuned on this system")

    def prepare(self) -> dict[str, Any]:
        self._progress("loading")
        before_mb = resident_mb()
        payload = Payload.load(self._folder / PAYLOAD_FILE)
        # Dynamo looks the globals of a function up in the module that the function names.
        for name, value in payload.script_globals.items():
            if not name.startswith("__"):
                setattr(sys.modules["__main__"], name, value)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FallbackWarning)
            self._training = Training(self._variant, payload, self._settings)
            preparation = self._training.prepare(self._folder, self._progress)
        for warning in caught:
            warnings.showwarning(
                warning.message, warning.category, warning.filename, warning.lineno
            )
            if issubclass(warning.category, FallbackWarning):
                self._notes.append(str(warning.message).removeprefix("optcpu: "))
        return {
            **preparation.to_dict(),
            "before_mb": before_mb,
            "resident_mb": resident_mb(),
            "notes": list(dict.fromkeys(self._notes)),
        }

    def turn(self, steps: int, reset_peak_first: bool) -> dict[str, Any]:
        peak_is_of_training = None
        if reset_peak_first:
            # What compiling and comparing have left free is no part of what training needs, and some
            # allocators would have handed it back already.
            gc.collect()
            hand_back_freed_memory()
            peak_is_of_training = reset_peak()
        seconds = self._training.turn(steps)
        return {
            "seconds": seconds,
            "peak_mb": peak_mb(),
            "peak_is_of_training": peak_is_of_training,
        }

    def profile(self, steps: int) -> dict[str, Any]:
        return {"costs": self._training.profile(steps)}


def serve(variant: str, folder: Path) -> int:
    channel = Channel()
    try:
        worker = Worker(variant, folder, channel.progress)
        for command in channel.commands():
            if command["do"] == "prepare":
                result = worker.prepare()
            elif command["do"] == "profile":
                result = worker.profile(command["steps"])
            else:
                result = worker.turn(command["steps"], command["reset_peak"])
            if command["hand_back"]:
                hand_back_freed_memory()
            channel.send({"result": result})
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        channel.send({"failed": reason, "log": traceback.format_exc()})
        return 1
    return 0


if __name__ == "__main__":
    # Not this copy of the module: its names are about to be joined by those of the caller's script.
    from optcpu.measure import worker

    exit_code = worker.serve(sys.argv[1], Path(sys.argv[2]))
    sys.stderr.flush()
    # A compiler pool or a thread of the model's must not keep a finished worker alive.
    os._exit(exit_code)
