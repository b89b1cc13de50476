"""``optimize(model, optimizer)``: the same objects, the same training, less memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import optcpu
from optcpu.compiled_call import compiled_call
from optcpu.errors import OptcpuError
from optcpu.optim import SGD, AdamW, Lamb, Lookahead
from optcpu.optim.base import StoredOptimizer
from optcpu.optim.weights import StoredWeight
from optcpu.takeover import widen_gradients

pytestmark = pytest.mark.filterwarnings("ignore:this processor has no BF16")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 4)
    )


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(20, 4, generator=generator)
    xs = torch.randn(count, 64, 20, generator=generator)
    return [(x, (x @ teacher).argmax(1)) for x in xs]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: list[tuple[Tensor, Tensor]]
) -> list[float]:
    losses = []
    for x, y in steps:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def stored(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if isinstance(p, StoredWeight)]


def test_fp32_training_is_that_of_pytorch() -> None:
    model, twin = network(), network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    result = optcpu.optimize(model, optimizer, precision="fp32")
    assert result == (model, optimizer)
    assert optimizer._optimizer_step_pre_hooks  # which switch PyTorch's fused kernel on
    assert type(optimizer) is torch.optim.AdamW
    assert stored(model) == []
    ours, theirs = train(model, optimizer, batches(15)), train(twin, reference, batches(15))
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("weights", ["auto", "split", "bf16", "fp32"])
def test_bf16_training_learns_as_well(weights: str) -> None:
    model, twin = network(), network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    optcpu.optimize(model, optimizer, precision="bf16", weights=weights)
    assert isinstance(optimizer, StoredOptimizer)
    assert optimizer.state_dtype == torch.bfloat16
    assert stored(model) == ([] if weights == "fp32" else ["0.weight", "2.weight", "4.weight"])
    ours, theirs = train(model, optimizer, batches(60)), train(twin, reference, batches(60))
    assert theirs[-1] < 0.5 * theirs[0]
    assert sum(ours[-10:]) == pytest.approx(sum(theirs[-10:]), rel=0.15)


def test_the_numbers_that_are_kept_a_parameter() -> None:
    model = nn.Linear(100, 100, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    optcpu.optimize(model, optimizer, precision="bf16")
    model(torch.randn(8, 100)).sum().backward()
    optimizer.step()
    weight = model.weight
    assert isinstance(weight, StoredWeight)
    assert weight.low is not None
    gradient = weight.grad
    assert gradient is not None
    kept = [weight.high, weight.low, gradient, *optimizer.state[weight].values()]
    sizes = [t.element_size() for t in kept if isinstance(t, Tensor)]
    assert sum(sizes) == (10 if hasattr(Tensor, "grad_dtype") else 12)


def test_calling_it_twice_changes_nothing() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optcpu.optimize(model, optimizer, precision="bf16")
    before = [id(p) for p in model.parameters()], optimizer.state_dtype  # type: ignore[attr-defined]
    optcpu.optimize(model, optimizer, precision="bf16")
    assert isinstance(optimizer, SGD)
    assert ([id(p) for p in model.parameters()], optimizer.state_dtype) == before


def test_weights_are_stored_in_one_way() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optcpu.optimize(model, optimizer, precision="bf16", weights="bf16")
    with pytest.raises(
        OptcpuError, match=r"'0.weight' is stored as 'bf16', not 'split': call .*restore"
    ):
        optcpu.optimize(model, optimizer, precision="bf16", weights="split")
    other = torch.optim.Adagrad(model.parameters())
    with pytest.raises(OptcpuError, match=r"for another optimizer, and Adagrad updates plain"):
        optcpu.optimize(model, other, precision="bf16", weights="bf16")
    optcpu.restore(model)
    optcpu.optimize(model, optimizer, precision="bf16", weights="split")
    weight = model[0].weight
    assert isinstance(weight, StoredWeight)
    assert weight.low is not None


def test_two_optimizers_for_one_model() -> None:
    model = network()
    optimizers = [
        torch.optim.AdamW(model[0].parameters(), lr=1e-2),
        torch.optim.SGD(model[2:].parameters(), lr=1e-2),
    ]
    for optimizer in optimizers:
        optcpu.optimize(model, optimizer, precision="bf16")
    assert stored(model) == ["0.weight", "2.weight", "4.weight"]
    x, y = batches(1)[0]
    losses = []
    for _ in range(10):
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_weights_that_a_loss_still_refers_to_are_told() -> None:
    model = network()
    loss = model(batches(1)[0][0]).sum()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"3 weights stay FP32 \(0.weight is the first\).*a loss"):
        optcpu.optimize(model, optimizer, precision="bf16")
    assert stored(model) == []
    loss.backward()


def test_moving_a_model_that_has_run() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optcpu.optimize(model, optimizer, precision="bf16")
    train(model, optimizer, batches(1))
    before = model.state_dict()
    model.to("cpu").float()
    assert stored(model) == ["0.weight", "2.weight", "4.weight"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    train(model, optimizer, batches(1))


def test_evaluation_in_inference_mode() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optcpu.optimize(model, optimizer, precision="bf16")
    x = batches(1)[0][0]
    with torch.inference_mode():
        result = model(x)
    torch.testing.assert_close(result, optcpu.restore(model)(x), rtol=0.02, atol=0.02)


def test_the_optimizer_may_come_later() -> None:
    model = network()
    optcpu.optimize(model, precision="bf16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = train(model, optimizer, batches(5))
    optcpu.optimize(model, optimizer, precision="bf16")
    assert stored(model)
    second = train(model, optimizer, batches(5))
    assert second[0] < first[0]


def test_restore_keeps_training_going() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optcpu.optimize(model, optimizer, precision="bf16")
    train(model, optimizer, batches(3))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optcpu.restore(model)
    assert stored(model) == []
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    train(model, optimizer, batches(3))
    assert not torch.equal(weights["0.weight"], model[0].weight)


def test_a_run_goes_on_in_plain_pytorch_and_back() -> None:
    model, twin = network(), network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optcpu.optimize(model, optimizer, precision="bf16")
    train(model, optimizer, batches(5))
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    twin.load_state_dict(model.state_dict())
    plain.load_state_dict(optimizer.state_dict())
    train(twin, plain, batches(5))
    model.load_state_dict(twin.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name])
    assert optimizer.state_dtype == torch.bfloat16  # type: ignore[attr-defined]
    train(model, optimizer, batches(2))


@pytest.mark.parametrize("weights", ["split", "bf16"])
def test_a_resumed_run_is_bit_exact(weights: str) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = network()
        return optcpu.optimize(
            model, AdamW(model.parameters(), lr=1e-2), precision="bf16", weights=weights
        )

    model, optimizer = start()
    train(model, optimizer, batches(8))
    half, half_optimizer = start()
    train(half, half_optimizer, batches(8)[:4])
    saved = copy.deepcopy((half.state_dict(), half_optimizer.state_dict()))
    resumed, resumed_optimizer = start()
    resumed.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[1])
    train(resumed, resumed_optimizer, batches(8)[4:])
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_lookahead_around_pytorchs_optimizer() -> None:
    model = network()
    optimizer = Lookahead(torch.optim.AdamW(model.parameters(), lr=1e-2), k=3)
    optcpu.optimize(model, optimizer, precision="bf16")
    assert isinstance(optimizer.optimizer, AdamW)
    assert stored(model)
    losses = train(model, optimizer, batches(60))
    assert losses[-1] < 0.7 * losses[0]
    with optimizer.slow_weights():
        model(batches(1)[0][0])


def test_own_optimizers_keep_their_state() -> None:
    model = network()
    optimizer = Lamb(model.parameters(), state_dtype=torch.float32)
    optcpu.optimize(model, optimizer, precision="bf16")
    assert optimizer.state_dtype == torch.float32
    assert stored(model)


def test_unknown_optimizers_are_told_and_left() -> None:
    model = network()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-2)
    with pytest.warns(UserWarning, match="Adagrad keeps its own update") as told:
        optcpu.optimize(model, optimizer, precision="bf16")
    assert told[-1].filename == __file__
    assert type(optimizer) is torch.optim.Adagrad
    assert stored(model) == []
    losses = train(model, optimizer, batches(20))
    assert losses[-1] < losses[0]


class Positioned(nn.Module):
    """Gives views of a weight across a graph break, and to the caller."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.view = nn.Linear(8, 8), view
        self.positions = nn.Parameter(torch.randn(1, 5, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.view(self.positions)
        hidden = self.layer(x).relu()
        torch._dynamo.graph_break()
        return hidden + seen, self.layer.weight.t()


@pytest.mark.parametrize(
    "view",
    [lambda p: p[:, 1:], lambda p: p.expand(3, -1, -1)[:, 1:], lambda p: p.view(5, 8)[1:]],
    ids=["slice", "expand", "view"],
)
def test_views_of_stored_weights_have_gradients(view: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Positioned(view)
    twin, x = copy.deepcopy(model), torch.randn(3, 4, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    optcpu.optimize(model, optimizer, precision="fp32", weights="split", fallback=False)
    for module in (model, twin):
        hidden, weight = module(x)
        (hidden.square().mean() + (weight @ weight.t()).square().mean()).backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.RAdam, {}),
    ],
)
def test_another_optimizer_of_stored_weights_trains_as_of_plain_ones(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    model, twin = network(), network()
    optcpu.optimize(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), precision="fp32", weights="split"
    )
    later, reference = (kind(m.parameters(), lr=1e-2, **options) for m in (model, twin))  # type: ignore[call-arg]
    ours = train(model, later, batches(5))
    assert ours == pytest.approx(train(twin, reference, batches(5)), rel=1e-5)
    assert stored(model)


def test_another_optimizer_may_find_bf16_gradients() -> None:
    model = network()
    optcpu.optimize(model, torch.optim.AdamW(model.parameters(), lr=1e-2), precision="bf16")
    losses = train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), batches(40))
    assert losses[-1] < 0.7 * losses[0]
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_parameters_that_it_does_not_update_stay_plain() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model[2].parameters())
    optcpu.optimize(model, optimizer, precision="bf16")
    assert stored(model) == ["2.weight"]


def test_gradient_clipping_and_accumulation() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optcpu.optimize(model, optimizer, precision="bf16")
    first = last = 0.0
    for step in range(15):
        optimizer.zero_grad()
        for x, y in batches(2):
            loss = F.cross_entropy(model(x), y) / 2
            loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert norm.isfinite()
        optimizer.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert last < first


@pytest.mark.parametrize("weights", ["split", "bf16"])
def test_other_shapes_within_an_accumulation_are_compiled(weights: Any) -> None:
    """Dynamo refuses a tensor whose gradient has another dtype, as a weight has by then."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    optcpu.optimize(
        model, optimizer, precision="bf16", weights=weights, dynamic=False, fallback=False
    )
    call = compiled_call(model)
    assert call is not None
    ((x, y),) = batches(1)
    first, gradients = None, []
    for size in (64, 24):
        F.cross_entropy(model(x[:size]), y[:size]).backward()
        first = model[0].weight.grad if first is None else first
        assert model[0].weight.grad is first  # added to in place, as it would be
        gradients.append(first.clone().float())
        with torch.no_grad():
            model(x[: size // 2])
    assert call.record.regions == 4
    optimizer.zero_grad()
    F.cross_entropy(model(x[:24]), y[:24]).backward()
    torch.testing.assert_close(
        gradients[1] - gradients[0], model[0].weight.grad.float(), rtol=0.1, atol=2e-3
    )


@pytest.mark.parametrize("weights", ["split", "bf16"])
@pytest.mark.parametrize("change", ["in place", "step"])
def test_a_weight_that_changes_before_backward_is_told(weights: Any, change: str) -> None:
    """As plain PyTorch does, which cannot compute that gradient any more either."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optcpu.optimize(model, optimizer, precision="bf16", weights=weights)
    ((x, y),) = batches(1)
    F.cross_entropy(model(x), y).backward()
    loss = F.cross_entropy(model(x), y)
    if change == "step":
        optimizer.step()
    else:
        with torch.no_grad():
            model[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    F.cross_entropy(model(x), y).backward()


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="gradients have the weight's dtype")
def test_wide_gradients_of_many_batches_lose_nothing() -> None:
    """The sum of as many in BF16 is off by percents."""
    model = network()
    optcpu.optimize(model, torch.optim.SGD(model.parameters(), lr=0.1), precision="bf16")
    ((x, y),) = batches(1)
    F.cross_entropy(model(x), y).backward()
    weight = model[0].weight
    one = weight.grad.float()
    assert weight.grad.dtype == torch.bfloat16
    widen_gradients(p for p in model.parameters() if isinstance(p, StoredWeight))
    torch.testing.assert_close(weight.grad, one, rtol=0, atol=0)
    for _ in range(299):
        F.cross_entropy(model(x), y).backward()
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, 300 * one, rtol=1e-4, atol=1e-4)


def test_compiled_code_of_stored_weights_is_found_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The next process needs no compilation, unless other weights are trained."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cache = torch._dynamo.utils.counters["aot_autograd"]
    for frozen, hits in ((True, 0), (True, 1), (False, 0), (False, 1)):
        torch._dynamo.reset()
        cache.clear()
        model = network()
        model[0].weight.requires_grad_(not frozen)
        optcpu.optimize(model, torch.optim.AdamW(model.parameters()), precision="bf16")
        ((x, y),) = batches(1)
        F.cross_entropy(model(x), y).backward()
        assert (cache["autograd_cache_hit"], cache["autograd_cache_miss"]) == (hits, 1 - hits)
        assert (model[0].weight.grad is None) == frozen


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="gradients have the weight's dtype")
def test_a_model_that_dynamo_gives_up_is_told() -> None:
    for fallback in (True, False):
        model = optcpu.optimize(network(), precision="fp32", fallback=fallback)
        weight = model[0].weight
        weight.grad_dtype = None
        weight.grad = torch.zeros_like(weight, dtype=torch.bfloat16)
        told = "the model is not compiled: .*dtype mismatch between tensor"
        if fallback:
            with pytest.warns(optcpu.FallbackWarning, match=told):
                model(torch.ones(2, 20)).sum().backward()
            assert len(compiled_call(model).record.fallbacks) == 1
        else:
            with pytest.raises(OptcpuError, match=told):
                model(torch.ones(2, 20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int8"}, "weights must be 'auto', 'fp32', 'split' or 'bf16', not 'int8'"),
        (
            {"state_dtype": torch.float16},
            "state_dtype must be torch.bfloat16, torch.float32 or None",
        ),
    ],
)
def test_bad_options_change_nothing(options: dict[str, object], message: str) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=message):
        optcpu.optimize(model, optimizer, **options)  # type: ignore[call-overload]
    assert type(optimizer) is torch.optim.AdamW
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optcpu.restore(model)
