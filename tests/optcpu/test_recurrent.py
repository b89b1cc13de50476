"""Models with recurrent layers: captured, or with autocast's numbers, and nothing changed in the model."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import optcpu
from optcpu.compiled_call import compiled_call
from optcpu.errors import CompileError, FallbackWarning
from optcpu.recurrent import is_captured, runs_eagerly_in_part, under_autocast
from passes import recurrent_steps


class Classifier(nn.Module):
    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = layer(8, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.layer(x)[0][:, -1])}


bf16_lstm = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="autocast itself fails on this processor",
)
RECURRENT = [nn.LSTM, nn.GRU, nn.RNN]


@bf16_lstm
@pytest.mark.parametrize("layer", RECURRENT)
def test_bf16_computes_what_autocast_computes(layer: type[nn.RNNBase]) -> None:
    model = Classifier(layer)
    reference = copy.deepcopy(model)
    x = torch.randn(4, 6, 8)
    logits = optcpu.optimize(model, precision="bf16")(x)["logits"]
    with torch.autocast("cpu", torch.bfloat16):
        expected = reference(x)["logits"]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected.float(), rtol=2e-2, atol=2e-2)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("layer", RECURRENT)
def test_fp32_computes_what_eager_computes(layer: type[nn.RNNBase]) -> None:
    model = Classifier(layer)
    reference = copy.deepcopy(model)
    x = torch.randn(4, 6, 8)
    result = optcpu.optimize(model, precision="fp32")(x)["logits"]
    torch.testing.assert_close(result, reference(x)["logits"])


def test_recurrent_layers_are_found_at_any_depth() -> None:
    model = nn.Sequential(nn.Sequential(nn.LSTM(2, 3, proj_size=2)))
    assert runs_eagerly_in_part(model, "fp32")
    assert not runs_eagerly_in_part(nn.Sequential(nn.Linear(2, 2), nn.LSTMCell(2, 2)), "fp32")


class Reversed(nn.LSTM):
    """With a forward of its own, which may do anything."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.flip(0))[0]


class Named(nn.LSTM):
    """An LSTM in all but name."""


@pytest.mark.parametrize(
    ("layers", "captured"),
    [
        ([nn.Linear(2, 2)], False),
        ([nn.LSTM(2, 2)], True),
        ([nn.LSTM(2, 2, 2, bidirectional=True, dropout=0.5, bias=False), Named(2, 2)], True),
        ([nn.LSTM(2, 3, proj_size=2)], False),
        ([nn.LSTM(2, 2), nn.LSTM(2, 3, proj_size=2)], False),
        ([nn.GRU(2, 2), nn.RNN(2, 2, nonlinearity="relu")], True),
        ([Reversed(2, 2)], False),
    ],
    ids=["none", "one", "two", "projection", "beside one", "other kinds", "own forward"],
)
def test_which_layers_are_captured(
    layers: list[nn.Module], captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("optcpu.recurrent")
    monkeypatch.setattr(module, "kernel_available", lambda dtype: dtype == torch.float32)
    model = nn.Sequential(*layers)
    assert is_captured(model, "fp32") == captured
    assert not is_captured(model, "bf16")
    recurrent = any(isinstance(layer, nn.RNNBase) for layer in layers)
    assert runs_eagerly_in_part(model, "fp32") == (recurrent and not captured)


def test_a_layer_that_is_not_captured_is_told_of_once() -> None:
    model = nn.LSTM(4, 6, proj_size=3)
    x = torch.randn(3, 2, 4)
    optcpu.optimize(model, precision="fp32")
    with pytest.warns(FallbackWarning, match="recurrent layers are not captured.*projections"):
        output = model(x)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        model(x)
    torch.testing.assert_close(output, optcpu.restore(model)(x)[0])
    optcpu.optimize(model, precision="fp32", fallback=False)
    with pytest.raises(CompileError, match="recurrent layers are not captured"):
        model(x)


with_kernel = pytest.mark.skipif(
    not recurrent_steps.kernel_available(torch.float32), reason="the steps have no kernel here"
)


def assert_same_step(model: nn.Module, reference: nn.Module, *inputs: Any) -> None:
    """Outputs and all gradients, in FP32."""
    results = []
    for one in (model, reference):
        one.zero_grad()
        output = one(*inputs)
        output.square().mean().backward()
        gradients = [p.grad for p in one.parameters()]
        results.append([output.detach(), *gradients])
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)


class Last(nn.Module):
    """The last state of two layers, in training and evaluation."""

    def __init__(self, layer: type[nn.RNNBase] = nn.LSTM, **given: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.layer = layer(8, 16, num_layers=2, batch_first=True, **given)
        self.head = nn.Linear(16 * (1 + self.layer.bidirectional), 3)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(self.layer(self.embedding(tokens))[0][:, -1])
        return result


@with_kernel
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"bidirectional": True},
        {"layer": nn.GRU},
        {"layer": nn.RNN},
        {"layer": nn.RNN, "nonlinearity": "relu", "bias": False},
    ],
    ids=["lstm", "both directions", "gru", "tanh", "relu"],
)
def test_they_are_a_part_of_one_graph_whatever_the_length(given: dict[str, Any]) -> None:
    model = Last(**given)
    reference = copy.deepcopy(model)
    optcpu.optimize(model, precision="fp32", fallback=False)
    for batch, steps in ((4, 6), (5, 9), (3, 7), (2, 30)):
        assert_same_step(model, reference, torch.randint(9, (batch, steps)))
    with torch.no_grad():
        tokens = torch.randint(9, (4, 6))
        torch.testing.assert_close(model.eval()(tokens), reference.eval()(tokens))
    call = compiled_call(model)
    assert call is not None
    assert call.record.regions <= 3  # as it is, with sizes that vary, and without gradients
    assert not torch._dynamo.config.allow_rnn


@with_kernel
@pytest.mark.parametrize("layer", RECURRENT)
def test_packed_sequences(layer: type[nn.RNNBase]) -> None:
    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = layer(8, 16, bidirectional=True), nn.Linear(32, 3)

        def forward(self, packed: PackedSequence) -> Tensor:
            result: Tensor = self.head(self.layer(packed)[0].data)
            return result

    model = Packing()
    reference = copy.deepcopy(model)
    optcpu.optimize(model, precision="fp32", fallback=False)
    for lengths in ((5, 3, 2), (7, 7, 1, 1), (2, 2)):
        packed = pack_sequence([torch.randn(length, 8) for length in lengths])
        assert_same_step(model, reference, packed)


@with_kernel
def test_their_update_is_fused() -> None:
    model = Last()
    reference = copy.deepcopy(model)
    model, optimizer = optcpu.optimize(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), precision="fp32", weights="split"
    )
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    for _ in range(5):
        assert_same_step(model, reference, torch.randint(9, (4, 6)))
        optimizer.step()
        plain.step()
    expected = reference.state_dict()
    for name, ours in model.state_dict().items():
        torch.testing.assert_close(ours, expected[name], rtol=1e-3, atol=1e-5)


@with_kernel
def test_other_compilations_are_not_concerned() -> None:
    optcpu.optimize(Last(), precision="fp32")(torch.randint(9, (4, 6)))
    captured: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, inputs: Any) -> Any:
        captured.append(module)
        return module.forward

    stock, x = nn.LSTM(8, 16), torch.randn(3, 2, 8)
    torch.testing.assert_close(torch.compile(stock, backend=keep)(x)[0], stock(x)[0])
    assert captured == []  # it is not captured, as ever
    weights = list(stock.parameters())
    state = (torch.zeros(1, 2, 16), torch.zeros(1, 2, 16))

    def output(x: Tensor) -> Tensor:
        return torch.lstm(x, state, weights, True, 1, 0.0, True, False, False)[0]  # type: ignore[arg-type]

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, enable_python_dispatcher():
        graph = make_fx(output)(mode.from_tensor(x)).graph
    assert not [node for node in graph.nodes if "optcpu" in str(node.target)]


@pytest.mark.parametrize("layer", RECURRENT)
def test_bf16_runs_on_every_processor(
    layer: type[nn.RNNBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model = Classifier(layer)
    reference, x = copy.deepcopy(model), torch.randn(4, 6, 8)
    logits = optcpu.optimize(model, precision="bf16")(x)["logits"]
    logits.sum().backward()
    torch.testing.assert_close(logits, reference(x)["logits"], rtol=2e-2, atol=2e-2)


@dataclasses.dataclass(frozen=True)
class Answer:
    logits: Tensor
    more: dict[str, list[Tensor]]
    name: str = "answer"


def test_results_of_any_form_are_widened() -> None:
    narrow = torch.randn(2).bfloat16()

    def call() -> tuple[Answer, Tensor, int]:
        return Answer(narrow, {"a": [narrow]}), torch.arange(2), 3

    answer, integers, number = under_autocast(call)()
    assert answer.logits.dtype == answer.more["a"][0].dtype == torch.float32
    assert (answer.name, integers.dtype, number) == ("answer", torch.int64, 3)
