"""One worker, seen from the process that started it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from optcpu.errors import WorkerError
from optcpu.measure.progress import Reporter
from optcpu.measure.variants import Variant

_ANSWER_LIMIT_S = 3600.0  # a worker that is silent for so long hangs
_POLL_S = 0.5
_LOG_LINES = 30


def same_modules() -> dict[str, str]:
    """The variables with which a Python process finds the modules that this one finds."""
    return {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "PYTHONSAFEPATH": "1",
    }


class WorkerProcess:
    """A worker process and the pipes to it.

    Attributes:
        variant: what it measures.
        failed: why it ended early, in one line; None while it is well.
        log: the end of its output, where it failed.
    """

    def __init__(self, variant: Variant, folder: Path, cold: bool) -> None:
        self.variant = variant
        self.failed: str | None = None
        self.log: str | None = None
        self._log_file = folder / f"{variant.name}.log"
        environment = {
            **dict(variant.environment),
            **os.environ,
            **same_modules(),
            "PYTHONFAULTHANDLER": "1",
        }
        if cold:
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"{variant.name}-cache")
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "optcpu.measure.worker", variant.name, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                encoding="utf-8",
                # Ctrl-C reaches this process alone, which then ends the worker and its children.
                start_new_session=True,
            )
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):  # a killed worker may leave half a line
                self._answers.put(json.loads(line))
        self._answers.put(None)

    def ask(self, command: dict[str, Any], reporter: Reporter | None) -> dict[str, Any] | None:
        """The worker's result, or None if it fails, which ends it and sets ``failed``.

        While it waits it tells ``reporter`` how far the worker is; without one it stays asleep.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except OSError:
            self._end(self._why_it_ended())
            return None
        silent = 0.0
        while True:
            try:
                # Not in one long wait, so that Ctrl-C is noticed on every system.
                answer = self._answers.get(timeout=_POLL_S)
            except queue.Empty:
                silent += _POLL_S
                if silent >= _ANSWER_LIMIT_S:
                    self._end(f"gave no answer for {_ANSWER_LIMIT_S / 60:.0f} minutes")
                    return None
                if reporter is not None:
                    reporter.tick()
                continue
            silent = 0.0
            if answer is None:
                self._end(self._why_it_ended())
                return None
            if "progress" in answer:
                if reporter is not None:
                    reporter.detail(answer["progress"])
            elif "failed" in answer:
                self._end(answer["failed"], answer["log"])
                return None
            else:
                result: dict[str, Any] = answer["result"]
                return result

    def _why_it_ended(self) -> str:
        code = self._process.wait()
        if code >= 0:
            return f"the worker process ended with exit code {code}"
        name = signal.Signals(-code).name
        hint = ": the system was probably out of memory" if name == "SIGKILL" else ""
        return f"the worker process was ended by {name}{hint}"

    def _end(self, reason: str, log: str | None = None) -> None:
        self.close()
        output = self._log_file.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        self.failed = reason
        self.log = log or "\n".join(output)

    def close(self) -> None:
        """End the worker and every process that it has started."""
        if hasattr(os, "killpg"):
            # The worker leads its own process group (start_new_session).
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            # What was not written yet has no reader any more.
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def error(self) -> WorkerError:
        """The failure of this worker, to be raised."""
        return WorkerError(f"{self.variant.name} failed: {self.failed}\n{self.log}")
