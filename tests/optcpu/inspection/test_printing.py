"""What ``print(inspection)`` shows, from narrow terminals to wide ones."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from optcpu.inspect import Inspection, inspect
from optcpu.inspection.report import to_text
from optcpu.pipeline import default_passes


def a_pass_with_a_name_that_is_longer_than_any_of_ours(graph: fx.Graph) -> int:
    return 123456


def fails(graph: fx.Graph) -> int:
    raise RuntimeError("not today, " * 10 + "/a/path/" + "x" * 90)


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8))
    own = [a_pass_with_a_name_that_is_longer_than_any_of_ours, fails]
    return inspect(model, torch.randn(2, 8), passes=[*default_passes("bf16"), *own])


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_it_fits_and_cuts_nothing_off(inspection: Inspection, width: int) -> None:
    text = to_text(inspection, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    assert "123456" in text
    unbroken = "".join(text.split())  # whatever is longer than a line
    for total in inspection.totals():
        assert total.name in unbroken
    assert "x" * 90 in unbroken


def test_a_table_has_room_at_80_columns() -> None:
    """With the names of the default passes, and with something left for the changes."""
    text = to_text(inspect(nn.Linear(8, 8), torch.randn(2, 8), precision="bf16"), 80)
    heading = next(line for line in text.splitlines() if line.startswith("pass "))
    assert heading.split() == ["pass", "joint", "fwd", "bwd", "numerics", "casts", "other", "nodes"]
