"""Stored weights are FP32 to everyone who looks, and BF16 inside."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optcpu.errors import OptcpuError
from optcpu.optim.formats import Format
from optcpu.optim.storing import restore_weights, store_weights
from optcpu.optim.weights import StoredWeight

BOTH = pytest.mark.parametrize("format", [Format.SPLIT, Format.STOCHASTIC])


class Tied(nn.Module):
    """An embedding whose weight is the last layer's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.norm = nn.LayerNorm(16)
        self.body = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(self.norm(self.embedding(tokens))))
        return result


@pytest.fixture
def model() -> Tied:
    torch.manual_seed(0)
    return Tied()


def test_split_weights_keep_every_bit_and_their_identity(model: Tied) -> None:
    parameters = list(model.parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert store_weights(model, parameters, Format.SPLIT) == []
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    kinds = {name: isinstance(p, StoredWeight) for name, p in model.named_parameters()}
    assert kinds == {name: p.dim() >= 2 for name, p in model.named_parameters()}
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in after.items():
        assert type(tensor) is Tensor
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])


def test_bf16_weights_take_two_bytes(model: Tied) -> None:
    before = model.head.weight.detach().clone()
    store_weights(model, model.parameters(), Format.STOCHASTIC)
    weight = model.head.weight
    assert isinstance(weight, StoredWeight)
    assert weight.low is None
    assert weight.high.element_size() == 2
    assert torch.equal(weight.detach().clone(), before.bfloat16().float())


@BOTH
def test_restoring_gives_plain_parameters(model: Tied, format: Format) -> None:
    store_weights(model, model.parameters(), format)
    stored = model.state_dict()
    parameters = list(model.parameters())
    model(torch.arange(8)).sum().backward()
    restore_weights(model)
    for parameter, same in zip(model.parameters(), parameters, strict=True):
        assert parameter is same
        assert type(parameter) is nn.Parameter
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
    assert model.head.weight is model.embedding.weight
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._state_dict_hooks for module in model.modules())


def test_parameters_of_others_stay(model: Tied) -> None:
    store_weights(model, model.body.parameters(), Format.SPLIT)
    assert type(model.head.weight) is nn.Parameter
    assert isinstance(model.body[0].weight, StoredWeight)


def test_eager_gradients_are_those_of_the_plain_model(model: Tied) -> None:
    plain = copy.deepcopy(model)
    store_weights(model, model.parameters(), Format.SPLIT)
    tokens = torch.randint(30, (4, 7))
    for module in (model, plain):
        F.cross_entropy(module(tokens).flatten(0, 1), tokens.flatten()).backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


OPERATIONS: dict[str, Callable[[Tensor], object]] = {
    "norm": lambda w: w.norm(),
    "item": lambda w: w.sum().item(),
    "comparison": lambda w: w > 0,
    "indexing": lambda w: w[1],
    "slice": lambda w: w[:2, 1:3],
    "mask": lambda w: w[w > 0],
    "transposed": lambda w: w.t() @ w,
    "flat": lambda w: w.flatten(),
    "reshaped": lambda w: w.reshape(-1, 2),
    "lists": lambda w: torch._foreach_norm([w, w])[1],
    "stacked": lambda w: torch.stack([w, w]),
    "clone": lambda w: w.clone(),
    "cast": lambda w: w.double(),
    "numpy": lambda w: torch.from_numpy(w.numpy()),
    "tolist": lambda w: torch.tensor(w.tolist()),
    "repr": lambda w: repr(w),
    "format": lambda w: f"{w[0, 0]:.3f}",
    "vector": lambda w: nn.utils.parameters_to_vector([w]),
    "einsum": lambda w: torch.einsum("ij,kj->ik", w, w),
    "zeros": lambda w: torch.zeros_like(w),
    "lookup": lambda w: F.embedding(torch.tensor([1, 1, 0]), w),
}


@pytest.mark.parametrize("name", OPERATIONS)
@BOTH
def test_reading(name: str, format: Format) -> None:
    torch.manual_seed(0)
    numbers = torch.randn(4, 6)
    if format == Format.STOCHASTIC:
        numbers = numbers.bfloat16().float()
    result, expected = OPERATIONS[name](StoredWeight.of(numbers, format)), OPERATIONS[name](numbers)
    if isinstance(expected, Tensor):
        assert isinstance(result, Tensor)
        assert result.dtype == expected.dtype
        torch.testing.assert_close(result.clone(), expected, rtol=1e-6, atol=1e-6)
    else:
        assert (
            result == pytest.approx(expected) if isinstance(expected, float) else result == expected
        )


WRITES: dict[str, Callable[[Tensor], object]] = {
    "copy_": lambda w: w.copy_(torch.arange(24.0).view(4, 6)),
    "mul_": lambda w: w.mul_(0.3),
    "add_": lambda w: w.add_(torch.ones(6), alpha=0.1),
    "initialiser": lambda w: nn.init.constant_(w, 0.7),
    "row": lambda w: w[1].zero_(),
    "column": lambda w: w[:, 2].fill_(3.3),
    "assignment": lambda w: w.__setitem__((slice(None), 0), 1.1),
    "transposed": lambda w: w.t().mul_(2),
    "list": lambda w: torch._foreach_mul_([w], 0.1),
    "self": lambda w: w.add_(w),
    "clamp": lambda w: w.clamp_(min=0.0),
    "chunk": lambda w: w.chunk(2)[1].add_(1),
    "unbind": lambda w: w.unbind()[2].zero_(),
    "diagonal": lambda w: w.fill_diagonal_(8.0),
    "squeeze": lambda w: w[None].squeeze().add_(1),
    "unfold": lambda w: w.unfold(0, 2, 2).add_(1),
    "flat": lambda w: w.flatten()[5].fill_(2.5),
    "complex": lambda w: torch.view_as_complex(w.view(4, 3, 2)).abs(),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", WRITES)
def test_writing(name: str, inference: bool) -> None:
    torch.manual_seed(0)
    numbers = torch.randn(4, 6)
    weight = StoredWeight.of(numbers, Format.SPLIT)
    with torch.inference_mode(inference):
        WRITES[name](weight)
        WRITES[name](numbers)
    assert torch.equal(weight.clone(), numbers)


def test_writing_gives_the_weight_itself_back() -> None:
    weight = StoredWeight.of(torch.ones(2, 2), Format.SPLIT)
    assert weight.mul_(2) is weight


@BOTH
def test_copies_and_pickles_are_plain(model: Tied, format: Format) -> None:
    store_weights(model, model.parameters(), format)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(type(p) is nn.Parameter for p in other.parameters())
        assert other.head.weight is other.embedding.weight
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name])


@BOTH
def test_checkpoints_are_plain_pytorchs(model: Tied, format: Format) -> None:
    plain = copy.deepcopy(model)
    store_weights(model, model.parameters(), format)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        plain.body[0].weight.mul_(3)
    model.load_state_dict(plain.state_dict())
    assert isinstance(model.body[0].weight, StoredWeight)
    tolerance = {"rtol": 0, "atol": 0} if format == Format.SPLIT else {"rtol": 2**-8, "atol": 0}
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), **tolerance)
    # A part of the model gives plain tensors, too.
    assert all(type(tensor) is Tensor for tensor in model.body.state_dict().values())


def test_averages_of_the_weights_are_plain(model: Tied) -> None:
    store_weights(model, model.parameters(), Format.SPLIT)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert all(type(p) is nn.Parameter for p in average.parameters())


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="PyTorch has FP32 gradients only")
def test_gradients_may_be_bf16_or_fp32() -> None:
    layer = nn.Linear(4, 4, bias=False)
    store_weights(layer, layer.parameters(), Format.SPLIT)
    for dtype in (torch.bfloat16, torch.float32):
        layer.weight.grad = torch.ones(4, 4, dtype=dtype)
        assert layer.weight.grad.dtype == dtype


@BOTH
def test_assigning_data_stores_it(format: Format) -> None:
    layer = nn.Linear(4, 4, bias=False)
    store_weights(layer, layer.parameters(), format)
    layer.weight.grad = torch.ones(4, 4)
    numbers = torch.randn(4, 4).bfloat16().float()
    weight = layer.weight
    weight.data = numbers
    assert isinstance(weight, StoredWeight)
    assert torch.equal(weight.high.float(), numbers)
    assert (weight.low is None) == (format == Format.STOCHASTIC)
    assert weight.requires_grad
    assert weight.grad is not None
    weight.data.zero_()
    assert not weight.any()


def test_the_memory_order_may_change_later() -> None:
    layer = nn.Conv2d(8, 16, 3)
    weight, plain = layer.weight, copy.deepcopy(layer)
    store_weights(layer, layer.parameters(), Format.SPLIT)
    layer.to(memory_format=torch.channels_last)
    assert layer.weight is weight
    assert isinstance(weight, StoredWeight)
    assert weight.high.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("move", [nn.Module.double, nn.Module.bfloat16, nn.Module.half])
def test_other_dtypes_are_refused_and_change_nothing(move: Callable[[nn.Module], object]) -> None:
    layer = nn.Linear(4, 4, bias=False)
    store_weights(layer, layer.parameters(), Format.SPLIT)
    before = layer.state_dict()["weight"]
    with pytest.raises(OptcpuError, match=r"cannot become torch\..*optcpu\.restore"):
        move(layer)
    assert torch.equal(layer.state_dict()["weight"], before)


@pytest.mark.parametrize("move", [nn.Module.float, nn.Module.cpu, nn.Module.share_memory])
def test_what_changes_nothing(move: Callable[[nn.Module], object]) -> None:
    layer = nn.Linear(4, 4, bias=False)
    store_weights(layer, layer.parameters(), Format.SPLIT)
    weight, before = layer.weight, layer.state_dict()["weight"]
    known = weakref.ref(weight)  # as compiled code has
    move(layer)
    del known
    assert layer.weight is weight
    assert isinstance(weight, StoredWeight)
    assert torch.equal(layer.state_dict()["weight"], before)


def test_channels_last_weights_stay_so() -> None:
    layer = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
    strides = layer.weight.stride()
    plain = copy.deepcopy(layer)
    store_weights(layer, layer.parameters(), Format.SPLIT)
    assert layer.weight.stride() == strides
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(layer(x), plain(x))
    assert layer.state_dict()["weight"].stride() == strides


def test_hooks_and_marks_of_users_stay() -> None:
    layer = nn.Linear(4, 4, bias=False)
    calls: list[str] = []
    layer.weight.register_hook(lambda _: calls.append("gradient"))
    layer.weight.register_post_accumulate_grad_hook(lambda _: calls.append("accumulated"))
    layer.weight.no_decay = True
    for change in (
        lambda: store_weights(layer, layer.parameters(), Format.SPLIT),
        lambda: setattr(layer.weight, "data", torch.randn(3, 4)),
        lambda: restore_weights(layer),
    ):
        change()
        calls.clear()
        layer(torch.ones(2, 4)).sum().backward()
        assert calls == ["gradient", "accumulated"]
        assert layer.weight.no_decay
    assert set(layer.weight.__dict__) == {"no_decay"}


def with_gradients(format: Format) -> nn.Linear:
    """A layer with a gradient of the weight in BF16, where PyTorch lets it be that."""
    layer = nn.Linear(4, 4)
    store_weights(layer, layer.parameters(), format)
    layer(torch.ones(2, 4)).sum().backward()
    if hasattr(layer.weight, "grad_dtype"):
        layer.weight.grad = torch.ones(4, 4, dtype=torch.bfloat16)
    return layer


@BOTH
def test_export_in_the_middle_of_an_accumulation(format: Format) -> None:
    layer, x = with_gradients(format), torch.randn(3, 4)
    gradient = layer.weight.grad
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))
    assert layer.weight.grad is gradient


@BOTH
def test_a_module_moves_to_another_device_with_its_gradients(format: Format) -> None:
    layer = with_gradients(format).to("meta")
    for parameter in layer.parameters():
        assert parameter.device.type == "meta"
        assert parameter.grad is not None
        assert (parameter.grad.device.type, parameter.grad.dtype) == ("meta", torch.float32)


def test_weights_in_a_living_graph_stay_plain() -> None:
    layer = nn.Linear(4, 4)
    loss = layer(torch.ones(2, 4)).sum()
    assert store_weights(layer, layer.parameters(), Format.SPLIT) == ["weight"]
    loss.backward()
    assert layer.weight.grad is not None


def test_backward_through_weights_that_are_restored_meanwhile_is_refused() -> None:
    layer = nn.Linear(4, 4)
    store_weights(layer, layer.parameters(), Format.SPLIT)
    loss = layer(torch.ones(2, 4)).sum()
    restore_weights(layer)
    with pytest.raises(OptcpuError, match="between forward and backward"):
        loss.backward()


def test_numbers_can_be_assigned_while_a_graph_lives() -> None:
    layer = nn.Linear(4, 4)
    store_weights(layer, layer.parameters(), Format.SPLIT)
    loss = layer(torch.ones(2, 4)).sum()
    layer.weight.data = torch.zeros(4, 4)
    loss.backward()
    assert layer.weight.grad is not None


def test_weights_that_are_tied_by_their_memory_stay_plain() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight.data = model[0].weight.data
    assert store_weights(model, model.parameters(), Format.SPLIT) == ["0.weight", "2.weight"]
    assert isinstance(model[1].weight, StoredWeight)


def test_a_pickle_can_be_read_without_optcpu(model: Tied) -> None:
    plain = copy.deepcopy(model)
    store_weights(model, model.parameters(), Format.SPLIT)
    saved = pickle.dumps(model)
    assert b"optcpu.optim" not in saved.replace(__name__.encode(), b"")
    copied = pickle.loads(saved)
    torch.testing.assert_close(copied.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_a_pickled_weight_keeps_its_marks() -> None:
    layer = nn.Linear(4, 4)
    layer.weight.no_decay = True
    store_weights(layer, layer.parameters(), Format.SPLIT)
    assert pickle.loads(pickle.dumps(layer)).weight.no_decay


@BOTH
def test_inference_mode(format: Format) -> None:
    attention = nn.MultiheadAttention(8, 2)
    plain = copy.deepcopy(attention)
    store_weights(attention, attention.parameters(), format)
    query, key = torch.randn(3, 2, 8), torch.randn(5, 2, 8)
    tolerance = 1e-5 if format == Format.SPLIT else 1e-2
    with torch.inference_mode():
        result, expected = attention(query, key, key)[0], plain(query, key, key)[0]
        torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)
        weight = attention.in_proj_weight
        assert torch.equal(weight.to(torch.float64), weight.clone().double())
        attention.load_state_dict(attention.state_dict())


def test_compiled_code_sees_how_weights_are_stored() -> None:
    """PyTorch 2.8 took the old graph, and read memory that was not there."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    compiled, x = torch.compile(layer), torch.randn(3, 4)
    expected = layer(x).detach()
    for change in (
        lambda: None,
        lambda: store_weights(layer, layer.parameters(), Format.SPLIT),
        lambda: restore_weights(layer),
    ):
        change()
        torch.testing.assert_close(compiled(x).detach(), expected)


def test_an_optimizer_of_others_in_one_call_for_plain_and_stored_weights() -> None:
    layer = nn.Linear(4, 4)
    store_weights(layer, layer.parameters(), Format.SPLIT)
    plain = copy.deepcopy(layer)
    for module in (layer, plain):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, foreach=True)
        module(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())


@BOTH
def test_shared_memory_holds_both_halves(format: Format) -> None:
    layer = nn.Linear(4, 4)
    store_weights(layer, layer.parameters(), format)
    layer.share_memory()
    weight = layer.weight
    assert isinstance(weight, StoredWeight)
    assert weight.is_shared()
    assert weight.high.is_shared()
    assert weight.low is None or weight.low.is_shared()
