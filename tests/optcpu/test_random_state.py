"""Whatever a block draws, or raises, the caller's generators go on as if it had not run."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch

from optcpu.random_state import random_state_kept


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


@pytest.mark.parametrize("fails", [False, True])
def test_generators_go_on_where_they_were(fails: bool) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = [draw(), draw()]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    first = draw()
    with contextlib.suppress(KeyError), random_state_kept():
        torch.manual_seed(9)
        draw()
        if fails:
            raise KeyError
    assert [first, draw()] == expected
