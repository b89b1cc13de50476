"""Arguments that make no sense are told by name, with what was expected."""

from __future__ import annotations

import numpy as np
import pytest

from optcpu.checks import check_flag, checked_share


def test_flags() -> None:
    check_flag("fallback", False)
    check_flag("dynamic", None, or_none=True)
    with pytest.raises(TypeError, match="fallback must be True or False, not 'no'"):
        check_flag("fallback", "no")
    with pytest.raises(TypeError, match="fallback must be True or False, not None"):
        check_flag("fallback", None)
    with pytest.raises(TypeError, match="dynamic must be True, False or None, not 1"):
        check_flag("dynamic", 1, or_none=True)


def test_shares() -> None:
    assert checked_share("share", 1) == 1.0
    assert checked_share("share", np.float32(0.5)) == 0.5
    for given in ("a", None, True, [0.5]):
        with pytest.raises(TypeError, match="share must be a number between 0 and 1, not"):
            checked_share("share", given)
    for outside in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="share must lie between 0 and 1, not"):
            checked_share("share", outside)
