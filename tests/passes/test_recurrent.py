"""Recurrent layers taken apart: PyTorch's numbers and gradients, for every kind of layer and of batch."""

from __future__ import annotations

import functools
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

from passes import Canonicalize, InsertCasts, recurrent_steps
from passes.recurrent import DECOMPOSITIONS, packed, padded
from passes.recurrent_steps import GATES, SAVED, Kind

BF16, FP32 = torch.bfloat16, torch.float32


MODULES: dict[Kind, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": functools.partial(nn.RNN, nonlinearity="relu"),
}
OPERATORS: dict[Kind, Callable[..., Any]] = {
    "lstm": torch.lstm,
    "gru": torch.gru,
    "tanh": torch.rnn_tanh,
    "relu": torch.rnn_relu,
}
KINDS = tuple(MODULES)


@dataclass
class Layer:
    """Arguments of a module, and of what it is given."""

    kind: Kind = "lstm"
    width: int = 3
    hidden: int = 5
    layers: int = 1
    biases: bool = True
    bidirectional: bool = False
    batch_first: bool = False

    def weights(self) -> list[Tensor]:
        module = MODULES[self.kind](
            self.width,
            self.hidden,
            self.layers,
            bias=self.biases,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
        )
        return list(module.parameters())

    def states(self, sequences: int) -> list[Tensor]:
        shape = (self.layers * (1 + self.bidirectional), sequences, self.hidden)
        count = 2 if self.kind == "lstm" else 1
        return [torch.randn(shape, requires_grad=True) for _ in range(count)]

    def state(self, states: list[Tensor]) -> Any:
        """As the operator takes it."""
        return states if self.kind == "lstm" else states[0]


LAYERS = st.builds(
    Layer,
    kind=st.sampled_from(KINDS),
    width=st.integers(1, 20),
    hidden=st.sampled_from([1, 2, 5, 16, 17, 33, 70]),
    layers=st.integers(1, 2),
    biases=st.booleans(),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
)
kinds = pytest.mark.parametrize("kind", KINDS)


def _with_gradients(call: Callable[[], tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor]:
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
    states, weights = layer.states(x.shape[0 if layer.batch_first else 1]), layer.weights()
    arguments = (layer.biases, layer.layers, 0.0, True, layer.bidirectional, layer.batch_first)
    state, inputs = layer.state(states), [x, *states, *weights]
    _assert_close(
        _with_gradients(lambda: padded(layer.kind)(x, state, weights, *arguments), inputs),
        _with_gradients(lambda: OPERATORS[layer.kind](x, state, weights, *arguments), inputs),
    )


@pytest.fixture(params=[True, False], ids=["kernel", "operators"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the kernel."""
    if not request.param:
        monkeypatch.setattr(recurrent_steps, "kernel_available", lambda dtype: False)
    elif not recurrent_steps.kernel_available(torch.float32):
        pytest.skip("the kernel cannot run here")


@settings(max_examples=40)
@given(layer=LAYERS, steps=st.integers(1, 6), batch=st.integers(1, 5))
def test_padded_sequences(layer: Layer, steps: int, batch: int) -> None:
    leading = (batch, steps) if layer.batch_first else (steps, batch)
    _assert_as_pytorch(layer, torch.randn(*leading, layer.width, requires_grad=True))


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("batch", [3, 64, 65, 130])  # the kernel takes 64 sequences at a time
@pytest.mark.parametrize("hidden", [5, 64, 100])
@kinds
def test_blocks(kind: Kind, batch: int, hidden: int) -> None:
    layer = Layer(kind, hidden=hidden, bidirectional=True)
    _assert_as_pytorch(layer, torch.randn(4, batch, layer.width, requires_grad=True))


def _assert_packed_as_pytorch(layer: Layer, lengths: list[int]) -> None:
    sequences = pack_sequence(
        [torch.randn(length, layer.width) for length in lengths], enforce_sorted=False
    )
    x, sizes = sequences.data.requires_grad_(), sequences.batch_sizes
    states, weights = layer.states(len(lengths)), layer.weights()
    arguments = (layer.biases, layer.layers, 0.0, True, layer.bidirectional)
    state, inputs = layer.state(states), [x, *states, *weights]
    operator = OPERATORS[layer.kind]
    _assert_close(
        _with_gradients(lambda: packed(layer.kind)(x, sizes, state, weights, *arguments), inputs),
        _with_gradients(lambda: operator(x, sizes, state, weights, *arguments), inputs),
    )


@settings(max_examples=40)
@given(layer=LAYERS, lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_packed_sequences(layer: Layer, lengths: list[int]) -> None:
    _assert_packed_as_pytorch(layer, lengths)


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("bidirectional", [False, True])
@kinds
def test_packed_blocks(kind: Kind, bidirectional: bool) -> None:
    lengths = [7] * 3 + [5] * 70 + [2] * 60 + [1] * 4
    _assert_packed_as_pytorch(Layer(kind, hidden=33, bidirectional=bidirectional), lengths)


@pytest.mark.usefixtures("by")
@kinds
def test_a_batch_without_sequences(kind: Kind) -> None:
    _assert_as_pytorch(Layer(kind), torch.randn(4, 0, 3, requires_grad=True))


@pytest.mark.usefixtures("by")
@kinds
def test_a_large_gate_is_closed_or_open(kind: Kind) -> None:
    """No overflow on the way to 0 or 1; what is not a number stays none."""
    layer = Layer(kind)
    state = layer.state([torch.zeros(1, 2, 5)] * 2)
    x = torch.tensor([[[1e30, -1e30, 0.0], [float("nan"), 1.0, 1.0]]])
    arguments = x, state, layer.weights(), True, 1, 0.0, False, False, False
    for one, other in zip(padded(kind)(*arguments), OPERATORS[kind](*arguments), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.usefixtures("by")
def test_small_numbers_keep_their_digits() -> None:
    """The kernel's tanh is made of two parts, one for numbers close to 0."""
    weights, state = [torch.ones(1, 1), torch.zeros(1, 1)], torch.zeros(1, 1, 1)
    for size in (1e-20, 1e-6, 0.3, 0.62499, 0.62501, 2.0, 8.0, 90.0):
        for x in (size, -size):
            given = torch.full((1, 1, 1), x)
            ours, _ = padded("tanh")(given, state, weights, False, 1, 0.0, False, False, False)
            torch.testing.assert_close(ours, given.tanh(), rtol=5e-7, atol=0.0)


def _steps(
    kind: Kind, inputs: Tensor, sizes: Tensor | None, weight: Tensor, state: Tensor, **given: Any
) -> tuple[Tensor, ...]:
    """With ``state`` for the cell and a bias, too, where there are such."""
    wide = state.float()
    return torch.ops.optcpu.recurrent_steps(  # type: ignore[no-any-return]
        inputs,
        sizes,
        weight,
        wide[0].repeat(SAVED[kind]),
        state,
        wide if kind == "lstm" else None,
        kind,
        given.get("reverse", False),
        given.get("saves", True),
    )


def _steps_backward(
    kind: Kind,
    gradient: Tensor,
    sizes: Tensor | None,
    weight: Tensor,
    state: Tensor,
    forward: tuple[Tensor, ...],
    **given: Any,
) -> tuple[Tensor, ...]:
    """With ``state`` for the gradients of the last state and cell, too."""
    wide = state.float()
    *_, saved, previous, cells = forward
    return torch.ops.optcpu.recurrent_steps_backward(  # type: ignore[no-any-return]
        gradient,
        state,
        wide if kind == "lstm" else torch.empty(0),
        sizes,
        weight,
        wide if kind == "lstm" else None,
        saved,
        previous,
        cells,
        kind,
        given.get("reverse", False),
        given.get("wants_state", True),
    )


@pytest.mark.usefixtures("by")
@kinds
def test_nothing_is_saved_where_nothing_will_be_differentiated(kind: Kind) -> None:
    gates = GATES[kind]
    inputs, weight, state = (
        torch.randn(3, 2, gates * 5),
        torch.randn(gates * 5, 5),
        torch.randn(2, 5),
    )
    full = _steps(kind, inputs, None, weight, state)
    without = _steps(kind, inputs, None, weight, state, saves=False)
    assert without[3].numel() == 0
    for place in (0, 1, 2):
        assert torch.equal(full[place], without[place])


@kinds
def test_dropout_between_layers(kind: Kind) -> None:
    layer = Layer(kind, width=8, hidden=400, layers=2)
    weights, state = layer.weights(), layer.state(layer.states(2))
    x = torch.randn(3, 2, 8)

    def output(dropout: float, training: bool) -> Tensor:
        result: Tensor = padded(kind)(x, state, weights, True, 2, dropout, training, False, False)[
            0
        ]
        return result.detach()

    assert torch.equal(output(0.5, False), output(0.0, True))
    assert not torch.allclose(output(0.5, True), output(0.0, True))


@pytest.mark.skipif(not recurrent_steps.kernel_available(torch.float32), reason="no kernel here")
@pytest.mark.parametrize("sizes", [None, [70, 66, 3, 1]])
@kinds
def test_bits_do_not_depend_on_threads(kind: Kind, sizes: list[int] | None) -> None:
    hidden, sequences, width = 200, 70, GATES[kind] * 200
    rows = (4, sequences) if sizes is None else (sum(sizes),)
    counts = None if sizes is None else torch.tensor(sizes)
    inputs, state = torch.randn(*rows, width), torch.randn(sequences, hidden)
    weight, gradient = torch.randn(width, hidden) / 14, torch.randn(*rows, hidden)

    def all_bits(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        forward = _steps(kind, inputs, counts, weight, state, reverse=True)
        # Without the first state's gradient, which is a product by a library.
        backward = _steps_backward(
            kind, gradient, counts, weight, state, forward, reverse=True, wants_state=False
        )
        return [*forward, *backward]

    for one, other in zip(all_bits(1), all_bits(2), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("hidden", [16, 33])
@kinds
def test_bf16_is_close_to_fp32(kind: Kind, hidden: int) -> None:
    """By the kernel where the processor multiplies BF16, and by operators."""
    width = GATES[kind] * hidden
    inputs, state = torch.randn(4, 3, width), torch.randn(3, hidden)
    weight, gradient = torch.randn(width, hidden) / 10, torch.randn(4, 3, hidden)

    def all_results(dtype: torch.dtype) -> list[Tensor]:
        x, w, s, g = (t.bfloat16().to(dtype) for t in (inputs, weight, state, gradient))
        forward = _steps(kind, x, None, w, s)
        assert [r.dtype for r in forward] == [dtype, dtype, FP32, dtype, dtype, FP32]
        backward = _steps_backward(kind, g, None, w, s, forward)
        assert [r.dtype for r in backward] == [dtype, dtype, dtype, FP32]
        return [*forward, *backward]

    # What rounding takes to the other side of ReLU's bend gets a gradient, or loses it.
    rtol = 5e-2 if kind == "relu" else 1.5e-2
    for narrow, wide in zip(all_results(BF16), all_results(FP32), strict=True):
        assert float((narrow.float() - wide).norm()) <= rtol * float(wide.norm())


def _joint(x: Tensor, of_input: Tensor, of_state: Tensor, state: Tensor) -> Any:
    states = (state[None], state[None])
    weights = [of_input, of_state]
    output, _, _ = padded("lstm")(x, states, weights, False, 1, 0.0, True, False, False)
    return torch.autograd.grad(output.sum(), (of_input, of_state))


def test_all_products_are_moved_to_bf16() -> None:
    inputs = torch.randn(3, 2, 8), torch.randn(64, 8), torch.randn(64, 16)
    of_input, of_state = (weight.requires_grad_() for weight in inputs[1:])
    module = traced(_joint, inputs[0], of_input, of_state, torch.randn(2, 16))
    Canonicalize()(module.graph)
    before = [o for o in operators(module.graph) if o.startswith(("aten.mm", "optcpu."))]
    assert before == [
        "aten.mm",
        "optcpu.recurrent_steps",
        "optcpu.recurrent_steps_backward",
        "aten.mm",
        "aten.mm",
    ]
    assert InsertCasts()(module.graph) == 5
    dtypes = {
        str(node.target): [a.meta["val"].dtype for a in node.args if isinstance(a, torch.fx.Node)]
        for node in module.graph.nodes
        if "recurrent_steps" in str(node.target)
    }
    forward, backward = dtypes.values()
    assert forward == [BF16, BF16, BF16, FP32]  # inputs, weight, state; cell
    # The output's gradient and the last state's, the last cell's, weight, cell, gates, states, cells.
    assert backward == [BF16, BF16, FP32, BF16, FP32, BF16, BF16, FP32]


def test_what_pytorch_has_is_taken_apart() -> None:
    assert {str(operator) for operator in DECOMPOSITIONS} == {
        f"aten.{name}.{overload}"
        for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
        for overload in ("input", "data")
    }


@pytest.mark.parametrize("module", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_input_of_a_module_is_what_is_tested(module: type[nn.RNNBase]) -> None:
    """The modules hand the same arguments over."""
    kind: Kind = {nn.LSTM: "lstm", nn.GRU: "gru", nn.RNN: "tanh"}[module]  # type: ignore[assignment]
    layer = module(3, 5)
    given = pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    state = Layer(kind).state([torch.zeros(1, 2, 5)] * 2)
    output, _ = layer(given)
    assert isinstance(output, PackedSequence)
    arguments = given.data, given.batch_sizes, state, list(layer.parameters())
    ours = packed(kind)(*arguments, True, 1, 0.0, True, False)
    torch.testing.assert_close(ours[0], output.data)
