"""Where capture stopped, and why.

Dynamo tells it in three places, none of them complete: its log of graph breaks has the user's line of
nearly all, its counters have the reason of all, and the captured graphs know what ended them.
"""

from __future__ import annotations

import contextlib
import linecache
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from torch._dynamo.utils import counters

from optcpu.inspection.model import GraphBreak, Source
from optcpu.inspection.sources import shorten, source_of

_LOGGERS = (
    "torch._dynamo.symbolic_convert.__graph_breaks",
    "torch._dynamo.convert_frame.__graph_breaks",
)
_LOGGED = re.compile(
    r"in user code at (?P<file>.+):(?P<line>\d+)\n"
    r"Graph Break Reason: (?P<reason>.*?)"
    r"(?:\n+User code traceback:\n(?P<stack>.*))?\Z",
    re.DOTALL,
)
_LIMIT_LOGGER = "torch._dynamo.convert_frame"
_LIMIT = re.compile(
    r"torch\._dynamo hit config\.(?P<limit>\w+) \((?P<number>\d+)\)\s+"
    r"function: '(?P<function>.*)' \((?P<file>.+):(?P<line>\d+)\)"
)
_SKIPPED = "The graph break occurred in the following user code:\n"
_DETAIL = re.compile(r"^  (Explanation|Hint|Developer debug context): ?", re.MULTILINE)
_LINK = re.compile(r"\s*For more details about this graph break.*", re.DOTALL)


class BreakLog:
    """The graph breaks that happen while :meth:`listening`."""

    def __init__(self) -> None:
        self._messages: list[str] = []
        self._counted: Counter[str] = Counter()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Read Dynamo's log of graph breaks along with whoever else reads it."""
        already = Counter(counters["graph_break"])
        handler = _Listener(self._messages)
        with contextlib.ExitStack() as stack:
            for name in _LOGGERS:
                stack.enter_context(_heard_by(handler, logging.getLogger(name)))
            limits = logging.getLogger(_LIMIT_LOGGER)
            limits.addHandler(handler)
            stack.callback(limits.removeHandler, handler)
            yield
        self._counted += Counter(counters["graph_break"]) - already

    def breaks(self) -> tuple[GraphBreak, ...]:
        """What was seen, each place and reason once."""
        found: dict[tuple[str, str], GraphBreak] = {}
        for message in self._messages:
            seen = _read(message)
            if seen is not None and seen.source is not None:
                found.setdefault((seen.reason, f"{seen.source.file}:{seen.source.line}"), seen)
        told = {reason for reason, _ in found}
        for text in self._counted:
            counted = _explained(text)
            if counted.reason not in told:
                found[counted.reason, ""] = counted
        return tuple(found.values())


class _Listener(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.DEBUG)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


@contextlib.contextmanager
def _heard_by(handler: logging.Handler, logger: logging.Logger) -> Iterator[None]:
    level, propagate = logger.level, logger.propagate
    # Where nobody asked for these messages before, nobody else shall see them now.
    logger.propagate = propagate and logger.isEnabledFor(logging.DEBUG)
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _read(message: str) -> GraphBreak | None:
    logged = _LOGGED.search(message)
    if logged is not None:
        source = source_of(logged["stack"]) or _line(logged)
        return replace(_explained(logged["reason"]), source=source)
    limit = _LIMIT.search(message)
    if limit is not None:
        return GraphBreak(
            f"{limit['limit']} ({limit['number']}) reached: {limit['function']} is compiled no more",
            "Every call that needs code of its own counts; the calls after these run eagerly.",
            (
                f"Remove the graph breaks in {limit['function']}, or raise "
                f"torch._dynamo.config.{limit['limit']}.",
            ),
            _line(limit),
        )
    head, found, stack = message.partition(_SKIPPED)
    if found:
        return replace(_explained(head), source=source_of(stack))
    return None


def _line(place: re.Match[str]) -> Source:
    file, line = place["file"], int(place["line"])
    return Source(shorten(file), line, "", linecache.getline(file, line).strip())


def _explained(text: str) -> GraphBreak:
    """Take apart what Dynamo says: the reason, then explanation and hints in indented lines."""
    reason, *details = _DETAIL.split(_LINK.sub("", text))
    named = list(zip(details[::2], details[1::2], strict=True))
    return GraphBreak(
        # What stands before is how Dynamo came there.
        reason=_one_line(reason.strip().rpartition("\n\n")[2]),
        explanation=" ".join(_one_line(t) for kind, t in named if kind == "Explanation"),
        remedies=tuple(_one_line(t) for kind, t in named if kind == "Hint"),
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
