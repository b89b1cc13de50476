"""The order in memory is told from strides, but for those that say nothing."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from optcpu.memory_order import in_one_order, is_dense

SHAPES = st.lists(st.integers(1, 3), min_size=1, max_size=4)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of one shape, each in an order and with strides of its own where there is one number."""
    shape = draw(SHAPES)

    def one() -> torch.Tensor:
        order = draw(st.permutations(range(len(shape))))
        back = sorted(range(len(order)), key=order.__getitem__)
        tensor = torch.empty([shape[d] for d in order]).permute(back)
        meaningless = [draw(st.integers(1, 9)) for _ in shape]
        strides = [
            any_ if size == 1 else stride
            for size, stride, any_ in zip(shape, tensor.stride(), meaningless, strict=True)
        ]
        return tensor.as_strided(shape, strides)

    return one(), one()


def places(tensor: torch.Tensor) -> list[int]:
    """Where each number lies, counted from the first."""
    where = torch.arange(tensor.numel()).as_strided(tensor.shape, tensor.stride())
    return where.flatten().tolist()


@given(pairs())
def test_the_order_is_that_of_the_numbers(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    one, other = pair
    assert in_one_order(one, other) == (places(one) == places(other))


def test_density() -> None:
    dense = torch.empty(4, 6)
    assert is_dense(dense)
    assert is_dense(dense.t())
    assert not is_dense(dense[:, ::2])
