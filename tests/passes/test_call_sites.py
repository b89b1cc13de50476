"""What generated code calls computes what the operators do, by the kernels that were chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

from passes import call_sites, gemm, packed
from passes.call_sites import CallSite
from passes.operators import IMPLEMENTATIONS

OPERATORS = (
    *("mm", "linear", "linear_add", "linear_backward", "convolution", "convolution_backward"),
    *("max_pool_backward", "attention", "attention_backward", "recurrent_steps"),
    *("recurrent_steps_backward", "add_rows", "checked_index", "join"),
)


def _arguments(operator: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    torch.manual_seed(0)
    x, weight, y = (torch.randn(s).to(dtype) for s in ((96, 256), (320, 256), (96, 320)))
    bias = torch.randn(320).to(dtype)
    image, kernel, written = (
        torch.randn(size).to(dtype).to(memory_format=torch.channels_last)
        for size in ((2, 32, 8, 8), (64, 32, 3, 3), (2, 64, 4, 4))
    )
    geometry = (None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
    pooled, where = torch.nn.functional.max_pool2d(image, 2, return_indices=True)
    heads = [torch.randn(2, 2, 64, 32).bfloat16() for _ in range(4)]  # their only dtype
    attended = torch.ops.optcpu.attention.default(*heads[:3], None, True, 0.2)
    gates, state, recurrent = (torch.randn(s) for s in ((5, 3, 64), (3, 16), (64, 16)))
    steps = (gates, None, recurrent, None, state, state, "lstm", False, True)
    output, *last, saved, previous, cells = torch.ops.optcpu.recurrent_steps.default(*steps)
    kept = (None, recurrent, state, saved, previous, cells, "lstm", False, True)
    index = torch.tensor([[3, 1], [0, 3]])
    return {
        "mm": (x, weight.t()),
        "linear": (x, weight, bias, "relu"),
        "linear_add": (x, weight, bias, y),
        "linear_backward": (y, y.relu(), x, weight, "relu", True, torch.float32),
        "convolution": (image, kernel, [2, 2], [1, 1]),
        "convolution_backward": (written, image, kernel, *geometry),
        "max_pool_backward": (pooled, image.shape, *([2, 2], [2, 2], [0, 0], [1, 1], False), where),
        "attention": (*heads[:3], None, True, 0.2),
        "attention_backward": (heads[3], *heads[:3], *attended, None, True, 0.2),
        "recurrent_steps": steps,
        "recurrent_steps_backward": (output, *last, *kept),
        "add_rows": (x, index, torch.randn(2, 2, 256).to(dtype), -1),
        "checked_index": (index, 4, True, ""),
        "join": (bias.bfloat16(), torch.arange(320, dtype=torch.int16)),
    }[operator]


def _same(one: Any, other: Any) -> bool:
    ones, others = ([a] if isinstance(a, Tensor) else list(a) for a in (one, other))
    return len(ones) == len(others) and all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(ones, others, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_site_gives_the_bits_of_its_operator(operator: str, dtype: torch.dtype) -> None:
    site, arguments = CallSite(operator), _arguments(operator, dtype)
    expected = getattr(torch.ops.optcpu, operator).default(*arguments)
    for _ in range(3):  # the first call settles the kernels
        assert _same(site(*arguments), expected)


def test_what_is_not_wanted_is_empty() -> None:
    y, _, x, *_ = _arguments("linear_backward")
    site = CallSite("linear_backward")
    for _ in range(2):
        of_x, of_weight, of_bias = site(y, None, x, None, "none", False, torch.float32)
        assert of_x.numel() == of_bias.numel() == 0
        torch.testing.assert_close(of_weight, y.t() @ x, rtol=1e-4, atol=1e-4)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are called, by name."""
    called: list[str] = []

    def noting(name: str, kernel: gemm.Kernel) -> gemm.Kernel:
        def run(a: Tensor, b: Tensor) -> Tensor:
            called.append(name)
            return kernel(a, b)

        return run

    noted = {name: noting(name, k) for name, k in gemm.kernels(torch.float32).items()}
    monkeypatch.setattr(gemm, "kernels", lambda dtype: noted)
    return called


def test_the_search_is_made_once(
    own_cache: object, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, arguments = CallSite("mm"), _arguments("mm")
    site(*arguments)

    def fail(*_: object) -> str:
        raise AssertionError("searched again")

    monkeypatch.setattr(gemm, "fastest", fail)
    calls.clear()
    site(*arguments)
    assert len(calls) == 1


def test_adopted_choices_are_followed(own_cache: object, calls: list[str]) -> None:
    site, (a, b) = CallSite("mm"), _arguments("mm")
    site(a, b)
    for name in gemm.kernels(torch.float32):
        gemm.adopt({gemm.shape_key(a, b): name})
        calls.clear()
        site(a, b)
        assert calls == [name]


def test_another_number_of_threads_is_another_search(
    own_cache: object, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, (a, b) = CallSite("mm"), _arguments("mm")
    site(a, b)
    (other,) = (name for name in ("aten", "onednn") if name != gemm.fastest(a, b))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        gemm._choices()[gemm.shape_key(a, b)] = other
        calls.clear()
        site(a, b)
        assert calls == [other]
    finally:
        torch.set_num_threads(before)


def test_weights_that_are_kept_packed_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    site, arguments = CallSite("mm"), _arguments("mm")
    expected = site(*arguments)
    monkeypatch.setattr(packed, "any_kept", lambda: True)
    monkeypatch.setattr(packed, "product", lambda x, weight, *_: x @ weight.t() + 1)
    assert torch.allclose(site(*arguments), expected + 1, atol=1e-4)


def test_profiles_show_the_operator() -> None:
    site, arguments = CallSite("linear"), _arguments("linear")
    site(*arguments)
    with profile() as record:
        site(*arguments)
    assert "optcpu::linear" in {event.key for event in record.key_averages()}


def test_all_operators_are_called_directly_but_those_that_write() -> None:
    operators = {name: getattr(torch.ops.optcpu, name).default for name in IMPLEMENTATIONS}
    direct = {name for name, operator in operators.items() if call_sites.takes(operator)}
    assert operators.keys() - direct == {"add_rows_", "hand_over"}
    assert direct - {*OPERATORS} == {"linear_saving_input"}  # which is lowered to others
    assert not call_sites.takes(torch.ops.aten.mm.default)
