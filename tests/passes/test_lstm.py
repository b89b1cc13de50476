"""LSTM layers taken apart: PyTorch's numbers and gradients, for every kind of layer and of batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from captured import operators, traced
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from passes import Canonicalize, InsertCasts, lstm_steps
from passes.lstm import lstm, packed_lstm

BF16 = torch.bfloat16


@dataclass
class Layer:
    """Arguments of ``nn.LSTM``, and of what it is given."""

    width: int = 3
    hidden: int = 5
    layers: int = 1
    biases: bool = True
    bidirectional: bool = False
    batch_first: bool = False

    def build(self) -> nn.LSTM:
        return nn.LSTM(
            self.width,
            self.hidden,
            self.layers,
            bias=self.biases,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
        )

    def states(self, sequences: int) -> tuple[Tensor, Tensor]:
        shape = (self.layers * (1 + self.bidirectional), sequences, self.hidden)
        return torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)


LAYERS = st.builds(
    Layer,
    width=st.integers(1, 20),
    hidden=st.sampled_from([1, 2, 5, 16, 17, 33, 70]),
    layers=st.integers(1, 2),
    biases=st.booleans(),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
)


def _with_gradients(
    call: Callable[[], tuple[Tensor, Tensor, Tensor]], inputs: list[Tensor]
) -> list[Tensor]:
    """The results of ``call``, and the gradients of ``inputs`` for always the same ones of these."""
    results = call()
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    gradients = torch.autograd.grad(results, inputs, seeds)
    return [*(result.detach() for result in results), *gradients]


def _assert_close(ours: list[Tensor], expected: list[Tensor], rtol: float = 1e-5) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert float((one - other).norm()) <= rtol * float(other.norm()) + 1e-6


def _assert_as_pytorch(layer: Layer, x: Tensor) -> None:
    module = layer.build()
    batch = x.shape[0 if layer.batch_first else 1]
    states = layer.states(batch)
    weights = list(module.parameters())
    arguments = (layer.biases, layer.layers, 0.0, True, layer.bidirectional, layer.batch_first)
    inputs = [x, *states, *weights]
    _assert_close(
        _with_gradients(lambda: lstm(x, states, weights, *arguments), inputs),
        _with_gradients(lambda: torch.lstm(x, states, weights, *arguments), inputs),  # type: ignore[arg-type]
    )


@pytest.fixture(params=[True, False], ids=["kernel", "operators"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the kernel."""
    if not request.param:
        monkeypatch.setattr(lstm_steps, "kernel_available", lambda dtype: False)
    elif not lstm_steps.kernel_available(torch.float32):
        pytest.skip("the kernel cannot run here")


@settings(max_examples=40)
@given(layer=LAYERS, steps=st.integers(1, 6), batch=st.integers(1, 5))
def test_padded_sequences(layer: Layer, steps: int, batch: int) -> None:
    leading = (batch, steps) if layer.batch_first else (steps, batch)
    _assert_as_pytorch(layer, torch.randn(*leading, layer.width, requires_grad=True))


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("batch", [3, 64, 65, 130])  # the kernel takes 64 sequences at a time
@pytest.mark.parametrize("hidden", [5, 64, 100])
def test_blocks(batch: int, hidden: int) -> None:
    layer = Layer(hidden=hidden, bidirectional=True)
    _assert_as_pytorch(layer, torch.randn(4, batch, layer.width, requires_grad=True))


def _assert_packed_as_pytorch(layer: Layer, lengths: list[int]) -> None:
    packed = pack_sequence(
        [torch.randn(length, layer.width) for length in lengths], enforce_sorted=False
    )
    x = packed.data.requires_grad_()
    module, states = layer.build(), layer.states(len(lengths))
    weights = list(module.parameters())
    arguments = (layer.biases, layer.layers, 0.0, True, layer.bidirectional)
    inputs = [x, *states, *weights]
    sizes = packed.batch_sizes
    _assert_close(
        _with_gradients(lambda: packed_lstm(x, sizes, states, weights, *arguments), inputs),
        _with_gradients(lambda: torch.lstm(x, sizes, states, weights, *arguments), inputs),  # type: ignore[arg-type]
    )


@settings(max_examples=40)
@given(layer=LAYERS, lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_packed_sequences(layer: Layer, lengths: list[int]) -> None:
    _assert_packed_as_pytorch(layer, lengths)


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_blocks(bidirectional: bool) -> None:
    lengths = [7] * 3 + [5] * 70 + [2] * 60 + [1] * 4
    _assert_packed_as_pytorch(Layer(hidden=33, bidirectional=bidirectional), lengths)


@pytest.mark.usefixtures("by")
def test_a_batch_without_sequences() -> None:
    _assert_as_pytorch(Layer(), torch.randn(4, 0, 3, requires_grad=True))


@pytest.mark.usefixtures("by")
def test_a_large_gate_is_closed_or_open() -> None:
    """No overflow on the way to 0 or 1; what is not a number stays none."""
    state = torch.zeros(1, 2, 5)
    x = torch.tensor([[[1e30, -1e30, 0.0], [float("nan"), 1.0, 1.0]]])
    weights = list(Layer(hidden=5).build().parameters())
    ours = lstm(x, (state, state), weights, True, 1, 0.0, False, False, False)
    expected = torch.lstm(x, (state, state), weights, True, 1, 0.0, False, False, False)  # type: ignore[arg-type]
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.usefixtures("by")
def test_small_numbers_keep_their_digits() -> None:
    """The kernel's tanh is made of two parts, one for numbers close to 0."""
    state = torch.zeros(1, 1, 1)
    weights = [torch.tensor([[0.0], [0.0], [1.0], [0.0]]), torch.zeros(4, 1)]
    for size in (1e-20, 1e-6, 0.3, 0.62499, 0.62501, 2.0, 8.0, 90.0):
        for x in (size, -size):
            given = torch.full((1, 1, 1), x)
            cell = lstm(given, (state, state), weights, False, 1, 0.0, False, False, False)[2]
            torch.testing.assert_close(2 * cell, given.tanh(), rtol=5e-7, atol=0.0)


@pytest.mark.usefixtures("by")
def test_nothing_is_saved_where_nothing_will_be_differentiated() -> None:
    inputs, weight, state = torch.randn(3, 2, 20), torch.randn(20, 5), torch.randn(2, 5)
    with_gates = torch.ops.optcpu.lstm_steps(inputs, None, weight, state, state, False, True)
    without = torch.ops.optcpu.lstm_steps(inputs, None, weight, state, state, False, False)
    assert without[3].numel() == 0
    for place in (0, 1, 2):
        assert torch.equal(with_gates[place], without[place])


def test_dropout_between_layers() -> None:
    torch.manual_seed(0)
    layer = Layer(width=8, hidden=400, layers=2)
    weights, states = list(layer.build().parameters()), layer.states(2)
    x = torch.randn(3, 2, 8)

    def output(dropout: float, training: bool) -> Tensor:
        return lstm(x, states, weights, True, 2, dropout, training, False, False)[0].detach()

    assert torch.equal(output(0.5, False), output(0.0, True))
    assert not torch.allclose(output(0.5, True), output(0.0, True))


@pytest.mark.skipif(not lstm_steps.kernel_available(torch.float32), reason="no kernel here")
@pytest.mark.parametrize("sizes", [None, [70, 66, 3, 1]])
def test_bits_do_not_depend_on_threads(sizes: list[int] | None) -> None:
    hidden, sequences = 200, 70
    rows = (4, sequences) if sizes is None else (sum(sizes),)
    counts = None if sizes is None else torch.tensor(sizes)
    inputs, state = torch.randn(*rows, 4 * hidden), torch.randn(sequences, hidden)
    weight, gradient = torch.randn(4 * hidden, hidden) / 14, torch.randn(*rows, hidden)

    def all_bits(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        forward = torch.ops.optcpu.lstm_steps(inputs, counts, weight, state, state, True, True)
        *_, gates, _, cells = forward
        backward = torch.ops.optcpu.lstm_steps_backward(
            gradient, state, state, counts, weight, state, gates, cells, True, False
        )  # without the state's gradient, which is a product by a library
        return [*forward, *backward]

    for one, other in zip(all_bits(1), all_bits(2), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("hidden", [16, 33])
@pytest.mark.usefixtures("by")
def test_bf16_is_close_to_fp32(hidden: int) -> None:
    """By the kernel where the processor multiplies BF16, and by operators."""
    inputs, state = torch.randn(4, 3, 4 * hidden), torch.randn(3, hidden)
    weight, gradient = torch.randn(4 * hidden, hidden) / 10, torch.randn(4, 3, hidden)

    def all_results(dtype: torch.dtype) -> list[Tensor]:
        narrow = [t.to(dtype) for t in (inputs, weight, state)]
        forward = torch.ops.optcpu.lstm_steps(narrow[0], None, *narrow[1:], state, False, True)
        *_, gates, _, cells = forward
        assert cells.dtype == torch.float32
        assert gates.dtype == dtype
        return [
            *forward,
            *torch.ops.optcpu.lstm_steps_backward(
                gradient.to(dtype),
                narrow[2],
                state,
                None,
                narrow[1],
                state,
                gates,
                cells,
                False,
                True,
            ),
        ]

    for narrow, wide in zip(all_results(BF16), all_results(torch.float32), strict=True):
        assert float((narrow.float() - wide).norm()) <= 1e-2 * float(wide.norm())


def _joint(x: Tensor, of_input: Tensor, of_state: Tensor, state: Tensor) -> Any:
    states = (state[None], state[None])
    output, _, _ = lstm(x, states, [of_input, of_state], False, 1, 0.0, True, False, False)
    return torch.autograd.grad(output.sum(), (of_input, of_state))


def test_all_products_are_moved_to_bf16() -> None:
    inputs = torch.randn(3, 2, 8), torch.randn(64, 8), torch.randn(64, 16)
    of_input, of_state = (weight.requires_grad_() for weight in inputs[1:])
    module = traced(_joint, inputs[0], of_input, of_state, torch.randn(2, 16))
    Canonicalize()(module.graph)
    before = [o for o in operators(module.graph) if o.startswith(("aten.mm", "optcpu."))]
    assert before == [
        "aten.mm",
        "optcpu.lstm_steps",
        "optcpu.lstm_steps_backward",
        "aten.mm",
        "aten.mm",
    ]
    assert InsertCasts()(module.graph) == 5
    kinds = {}
    for node in module.graph.nodes:
        if "lstm_steps" in str(node.target):
            values = [a.meta["val"].dtype for a in node.args if isinstance(a, torch.fx.Node)]
            kinds[str(node.target)] = values
    wide = torch.float32
    assert kinds["optcpu.lstm_steps.default"] == [BF16, BF16, BF16, wide]
    assert kinds["optcpu.lstm_steps_backward.default"] == [BF16, BF16, wide, BF16, wide, BF16, wide]


def test_packed_input_of_a_module_is_what_is_tested() -> None:
    """``nn.LSTM`` hands the same arguments over."""
    module = nn.LSTM(3, 5)
    packed = pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    states = (torch.zeros(1, 2, 5), torch.zeros(1, 2, 5))
    output, _ = module(packed)
    assert isinstance(output, PackedSequence)
    weights = list(module.parameters())
    ours = packed_lstm(packed.data, packed.batch_sizes, states, weights, True, 1, 0.0, True, False)
    torch.testing.assert_close(ours[0], output.data)
