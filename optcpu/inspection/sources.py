"""From a stack trace to the line of the user's that it belongs to."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from traceback import FrameSummary

import torch

from optcpu.compiled_call import own_frame
from optcpu.inspection.model import Source

_FRAME = re.compile(r'^ *File "(?P<file>.*)", line (?P<line>\d+), in (?P<function>.*)$')
_RESUMED = re.compile(r"torch_dynamo_resume_in_(.+)_at_\d+")
_TORCH = str(Path(torch.__file__).parent)
# Every compiled call begins in a frame of this file, which is nobody's model.
_WRAPPER = own_frame.__code__.co_filename


@dataclass(frozen=True)
class _Frame:
    file: str
    line: int
    function: str
    code: str


def source_of(stack_trace: str | None) -> Source | None:
    """The innermost line of the user's in a formatted stack trace.

    Where only PyTorch's own files are in it, as for a plain ``nn.Sequential``, the innermost of
    those.
    """
    return _innermost(list(_parse(stack_trace or "")))


def source_of_frames(frames: Iterable[FrameSummary]) -> Source | None:
    """As :func:`source_of`, from a traceback's frames, the outermost first."""
    return _innermost(
        [_Frame(f.filename, f.lineno or 0, f.name, (f.line or "").strip()) for f in frames]
    )


def _parse(stack_trace: str) -> Iterator[_Frame]:
    lines = stack_trace.splitlines()
    for number, text in enumerate(lines):
        match = _FRAME.match(text)
        if match is None:
            continue
        code = lines[number + 1].strip() if number + 1 < len(lines) else ""
        if _FRAME.match(code):
            code = ""  # the source of the frame was not at hand
        yield _Frame(match["file"], int(match["line"]), match["function"], code)


def _innermost(frames: list[_Frame]) -> Source | None:
    named = [f for f in frames if f.file != _WRAPPER and not f.file.startswith("<eval_with_key>")]
    own = [f for f in named if not f.file.startswith(_TORCH)]
    if not named:
        return None
    frame = own[-1] if own else named[-1]
    return Source(
        file=shorten(frame.file),
        line=frame.line,
        function=_RESUMED.sub(r"\1", frame.function),
        code=frame.code,
        library=not own,
    )


def shorten(file: str) -> str:
    """``file`` without the working directory or the import path that it lies below."""
    candidates = [Path.cwd(), *(Path(entry) for entry in sys.path if entry)]
    inside = [root for root in candidates if Path(file).is_relative_to(root)]
    if not inside:
        return file
    return str(Path(file).relative_to(max(inside, key=lambda root: len(root.parts))))
