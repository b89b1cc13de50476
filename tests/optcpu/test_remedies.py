"""Each error that users can do something about comes with what they can do."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from optcpu.remedies import first_line, remedy_for


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (PermissionError(13, "Permission denied"), "TORCHINDUCTOR_CACHE_DIR"),
        (OSError(30, "Read-only file system"), "TORCHINDUCTOR_CACHE_DIR"),
        (OSError(28, "No space left on device"), "free disk space"),
        (RuntimeError("No working C++ compiler found in clang++, g++"), "install a C++ compiler"),
        (DynamicOutputShapeException(torch.ops.aten.nonzero.default), "torch.where"),
        (RuntimeError("there are hooks of all modules"), "modules of the model"),
        (KeyError("x"), "optcpu.inspect"),
    ],
)
def test_remedies(error: Exception, remedy: str) -> None:
    assert remedy in remedy_for(error)


def test_the_remedy_is_one_for_the_cause() -> None:
    outer = RuntimeError("outer")
    outer.inner_exception = PermissionError(13, "Permission denied")  # type: ignore[attr-defined]
    assert "TORCHINDUCTOR_CACHE_DIR" in remedy_for(outer)


def test_the_first_line_names_the_cause() -> None:
    outer = RuntimeError("outer")
    outer.inner_exception = KeyError("missing")  # type: ignore[attr-defined]
    assert first_line(outer) == "KeyError: 'missing'"
    assert first_line(ValueError("\n  one \ntwo")) == "ValueError: one"
    assert first_line(ValueError()) == "ValueError"
