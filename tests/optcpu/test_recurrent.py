"""Models with recurrent layers: autocast's numbers, FP32 results, and nothing changed in the model."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

import optcpu
from optcpu.recurrent import has_recurrent_layers, under_autocast


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
    assert has_recurrent_layers(nn.Sequential(nn.Sequential(nn.LSTM(2, 2))))
    assert not has_recurrent_layers(nn.Sequential(nn.Linear(2, 2), nn.LSTMCell(2, 2)))


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
