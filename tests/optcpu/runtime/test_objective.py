"""The loss as one graph with the model: same numbers, same errors, and nothing left of the output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optcpu
from optcpu import workloads
from optcpu.compiled_call import compiled_call
from optcpu.errors import FallbackWarning
from optcpu.measure.batches import Batch, default_loss
from optcpu.runtime.objective import is_own, objective


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))


def batch_of(size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 6, generator=generator)
    return x, torch.randint(5, (size,), generator=generator)


def optimized(model: nn.Module, **options: Any) -> nn.Module:
    return optcpu.optimize(
        model, keep_memory=False, **{"precision": "fp32", "fallback": False, **options}
    )


def assert_same_step(
    model: nn.Module, batch: Batch, loss: Callable[..., Tensor] = default_loss, **options: Any
) -> None:
    plain = copy.deepcopy(model)
    compiled = objective(optimized(model, **options), loss, compile_loss=True)
    for _ in range(2):
        got, expected = compiled(batch), objective(plain, loss, compile_loss=False)(batch)
        torch.testing.assert_close(got, expected)
        got.backward()  # type: ignore[no-untyped-call]
        expected.backward()  # type: ignore[no-untyped-call]
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    for one_buffer, other_buffer in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one_buffer, other_buffer)


class OwnLoss(nn.Module):
    """As models of Hugging Face: a mapping with a loss and what it was computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.inner(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class WithLogits(OwnLoss):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": self.inner(x)}


def test_one_graph_holds_both() -> None:
    model = optimized(network())
    call = compiled_call(model)
    assert call is not None
    loss = objective(model, default_loss, compile_loss=True)
    loss(batch_of()).backward()  # type: ignore[no-untyped-call]
    assert call.record.regions == 1
    model(batch_of()[0])  # compiled by itself
    assert call.record.regions == 2


@pytest.mark.parametrize("dynamic", [False, True, None])
def test_parity(dynamic: bool | None) -> None:
    assert_same_step(network(), batch_of(), dynamic=dynamic)


def test_parity_of_a_regression() -> None:
    x, _ = batch_of()
    assert_same_step(network(), (x, torch.randn(8, 5)))


def test_parity_of_an_own_loss() -> None:
    x, labels = batch_of()
    assert_same_step(OwnLoss(), {"x": x, "labels": labels})
    assert_same_step(WithLogits(), (x, labels))


def test_parity_of_small_integers_and_left_out_targets() -> None:
    x, labels = batch_of()
    labels[2] = -100
    assert_same_step(network(), (x, labels.int()))


def test_parity_of_a_loss_of_the_users() -> None:
    def smooth(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(output, batch[1], label_smoothing=0.1)

    assert_same_step(network(), batch_of(), smooth)


@pytest.mark.filterwarnings("ignore:this processor has no BF16")
def test_bf16_is_as_close_as_with_the_loss_outside() -> None:
    x, labels = batch_of(64)
    expected = default_loss(network()(x), (x, labels))
    model = optimized(network(), precision="bf16")
    inside = objective(model, default_loss, compile_loss=True)((x, labels))
    outside = default_loss(model(x), (x, labels))
    assert abs(inside - expected) <= 1.5 * abs(outside - expected) + 1e-3


@pytest.mark.parametrize(
    ("batch", "error", "told"),
    [
        ((batch_of()[0], torch.full((8,), 5)), ValueError, "the target has class 5"),
        ((batch_of()[0], torch.zeros(7, dtype=torch.int64)), ValueError, "does not fit"),
        ((batch_of()[0],), TypeError, "no target for the default loss"),
        ((torch.randn(8, 4), batch_of()[1]), RuntimeError, "shape"),
    ],
    ids=["class", "length", "none", "input"],
)
def test_errors_are_those_of_the_loss_outside(batch: Batch, error: Any, told: str) -> None:
    loss = objective(optimized(network(), fallback=True), default_loss, compile_loss=True)
    with pytest.raises(error, match=told):
        loss(batch)


def test_an_index_that_is_out_of_range_in_the_model_stays_the_error() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(6, 5))
    loss = objective(optimized(model), default_loss, compile_loss=True)
    with pytest.raises(IndexError, match="index 4 is out of range in Embedding '0'"):
        loss((torch.full((2, 2), 4), torch.zeros(2, dtype=torch.int64)))


def test_what_is_compiled_anew_is_so_with_the_loss() -> None:
    model = optimized(network())
    call = compiled_call(model)
    assert call is not None
    loss = objective(model, default_loss, compile_loss=True)
    loss(batch_of())
    call.compile_anew()
    loss(batch_of())
    assert call.record.regions == 2


def test_an_eager_model_has_an_eager_loss() -> None:
    model = network()
    loss = objective(model, default_loss, compile_loss=True)
    x, labels = batch_of()
    model.eval()
    before = dict(torch._dynamo.utils.counters["stats"])
    assert torch.equal(loss((x, labels)), F.cross_entropy(model(x), labels))
    assert torch._dynamo.utils.counters["stats"] == before


def test_a_model_that_is_not_captured_is_compiled_without_its_loss() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(6, 7, batch_first=True, proj_size=4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])  # type: ignore[no-any-return]

    with pytest.warns(FallbackWarning, match="recurrent layers"):
        assert_same_step(Last(), (torch.randn(8, 3, 6), batch_of()[1]), fallback=True)


def test_which_losses_are_optcpus() -> None:
    assert is_own(default_loss)
    assert is_own(workloads.classification_loss)
    assert is_own(workloads.next_token_loss)
    assert not is_own(lambda output, batch: output.sum())
    assert not is_own(nn.MSELoss())
