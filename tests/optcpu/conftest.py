"""What tests of whole comparisons share."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest

from tests.optcpu.measure.conftest import LIMITS


@pytest.fixture(scope="module")
def known_limits() -> Iterator[None]:
    """Those of this machine are measured in tests of their own, and where a script is run."""
    with pytest.MonkeyPatch.context() as patch:
        compare_module = importlib.import_module("optcpu.compare")
        patch.setattr(compare_module, "measure_limits", lambda threads: LIMITS)
        yield
