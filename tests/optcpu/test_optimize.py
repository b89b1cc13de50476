"""``optimize`` leaves the module what it is, trains it right, and refuses what it cannot take."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import optcpu
from optcpu.compiled_call import compiled_call
from optcpu.pipeline import resolve_precision


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_the_module_stays_what_it_is() -> None:
    model, x = network(), torch.randn(5, 12)
    keys, names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("hook"))
    expected = model(x)
    assert optcpu.optimize(model, precision="fp32") is model
    assert isinstance(model, nn.Sequential)
    torch.testing.assert_close(model(x), expected)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == names
    assert calls == ["hook", "hook"]
    assert not model.eval().training
    assert model.train().training


def test_copies_and_pickles_are_plain_models() -> None:
    model, x = optcpu.optimize(network(), precision="fp32"), torch.randn(5, 12)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert compiled_call(twin) is None
        torch.testing.assert_close(twin(x), expected)


def test_restore_gives_the_plain_model_back() -> None:
    model = optcpu.optimize(network())
    assert compiled_call(model) is not None
    assert optcpu.restore(model) is model
    assert model._compiled_call_impl is None
    assert optcpu.restore(model) is model


def test_a_second_call_changes_nothing() -> None:
    model = optcpu.optimize(network(), precision="fp32")
    first = compiled_call(model)
    assert optcpu.optimize(model, precision="fp32") is model
    assert compiled_call(model) is first


def test_other_settings_are_refused() -> None:
    model = optcpu.optimize(network(), precision="fp32")
    with pytest.raises(optcpu.OptcpuError, match=r"restore\(model\)"):
        optcpu.optimize(model, precision="fp32", passes=[])


def test_it_trains_like_eager() -> None:
    model, x, y = network(), torch.randn(64, 12), torch.randint(3, (64,))
    reference = copy.deepcopy(model)
    model, optimizer = optcpu.optimize(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), precision="fp32"
    )
    for module, update in (
        (model, optimizer),
        (reference, torch.optim.AdamW(reference.parameters(), lr=1e-2)),
    ):
        for _ in range(20):
            update.zero_grad()
            functional.cross_entropy(module(x), y).backward()
            update.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_evaluation_in_between() -> None:
    model, x = network(), torch.randn(5, 12)
    reference = copy.deepcopy(model)
    optcpu.optimize(model, precision="fp32")
    first = gradients(model, x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x))
    for again, once, eager in zip(gradients(model, x), first, gradients(reference, x), strict=True):
        torch.testing.assert_close(again, once)
        torch.testing.assert_close(once, eager, rtol=1e-4, atol=1e-5)


def test_changing_batch_sizes_compile_twice_at_most() -> None:
    model = network()
    reference = copy.deepcopy(model)
    optcpu.optimize(model, precision="fp32")
    for size in (4, 7, 9, 16, 31):
        x = torch.randn(size, 12)
        for ours, theirs in zip(gradients(model, x), gradients(reference, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    call = compiled_call(model)
    assert call is not None
    assert call.record.regions <= 2
    assert call.record.fallbacks == []


def test_frozen_parameters_have_no_gradient() -> None:
    model = network()
    model[0].requires_grad_(False)
    gradients(optcpu.optimize(model), torch.randn(5, 12))
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


def test_gradients_accumulate() -> None:
    model, x = network(), torch.randn(6, 12)
    reference = copy.deepcopy(model)
    optcpu.optimize(model, precision="fp32")
    for part in x.chunk(2):
        model(part).sum().backward()
    reference(x).sum().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_input_of_the_wrong_shape_fails_as_in_pytorch_and_leaves_the_model_usable() -> None:
    model = optcpu.optimize(network(), precision="fp32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            model(torch.randn(5, 11))
        assert model(torch.randn(5, 12)).shape == (5, 3)
    call = compiled_call(model)
    assert call is not None
    assert call.record.fallbacks == []


def test_bad_models_are_refused_and_left_alone() -> None:
    poisoned = network()
    with torch.no_grad():
        poisoned[0].bias[3] = float("nan")
    cases: list[tuple[object, type[Exception], str]] = [
        (lambda x: x, TypeError, "must be a torch.nn.Module, not function"),
        (network().double(), ValueError, r"'0.weight' is torch.float64.*model.float\(\)"),
        (network().half(), ValueError, "'0.weight' is torch.float16"),
        (network().to("meta"), ValueError, r"'0.weight' is on meta.*model.cpu\(\)"),
        (poisoned, ValueError, "'0.bias' holds NaN or infinity"),
    ]
    for model, error, message in cases:
        with pytest.raises(error, match=message):
            optcpu.optimize(model)  # type: ignore[call-overload]
        if isinstance(model, nn.Module):
            assert model._compiled_call_impl is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"precision": "fp8"}, ValueError, "'auto', 'bf16' or 'fp32', not 'fp8'"),
        ({"passes": ["relu"]}, TypeError, "not 'relu'"),
        ({"activation_memory": "a"}, TypeError, "activation_memory must be a number.*not 'a'"),
        ({"dynamic": "yes"}, TypeError, "dynamic must be True, False or None, not 'yes'"),
        ({"fallback": "no"}, TypeError, "fallback must be True or False, not 'no'"),
        ({"keep_memory": None}, TypeError, "keep_memory must be True or False, not None"),
        ({"optimizer": "adam"}, TypeError, "must be a torch.optim.Optimizer, not str"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    model = network()
    with pytest.raises(error, match=message):
        optcpu.optimize(model, **arguments)  # type: ignore[call-overload]
    assert model._compiled_call_impl is None


def test_bf16_without_hardware_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert resolve_precision("auto") == "fp32"
    with pytest.warns(UserWarning, match="several times longer"):
        optcpu.optimize(network(), precision="bf16")


def test_warnings_point_to_the_users_line() -> None:
    def fails(graph: fx.Graph) -> int:
        raise KeyError("not there")

    model = optcpu.optimize(nn.Linear(3, 3), passes=[fails])
    with pytest.warns(optcpu.FallbackWarning, match="pass fails was undone") as told:
        model(torch.randn(2, 3))
    assert [warning.filename for warning in told] == [__file__]


@pytest.mark.parametrize("before", [False, True], ids=["first", "after a plain backward"])
@pytest.mark.parametrize("stored", [False, True], ids=["plain weights", "stored weights"])
def test_backward_twice(before: bool, stored: bool) -> None:
    """Also where the backward was compiled, and cached, for a graph that was not kept."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    reference = copy.deepcopy(model)
    x = torch.randn(4, 6)
    if stored:
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, lr=0.1)
        model, _ = optcpu.optimize(model, optimizer, precision="fp32")
    else:
        optcpu.optimize(model, precision="fp32")
    for module in (model, reference):
        if before:
            module(x).square().sum().backward()
        loss = module(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, check_dtype=False)


class Counting(nn.Module):
    """Counts its calls, and multiplies matrices of which the second may not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        x.mul_(2)
        torch._dynamo.graph_break()
        return self.linear(x) @ y


def test_what_has_run_does_not_run_again_when_the_rest_fails() -> None:
    model, x = optcpu.optimize(Counting(), precision="fp32"), torch.ones(2, 4)
    with pytest.raises(Exception, match=r"(?i)shape|size"):
        model(x, torch.ones(3, 3))
    assert float(model.calls) == 1
    assert float(x[0, 0]) == 2


def test_restore_gives_the_users_own_compilation_back() -> None:
    model = nn.Linear(2, 2)
    model.compile(backend="eager")
    before = model._compiled_call_impl
    optcpu.optimize(model, precision="fp32")
    assert optcpu.restore(model)._compiled_call_impl is before


def test_the_setting_that_differs_is_named() -> None:
    model = optcpu.optimize(nn.Linear(2, 2), precision="fp32")
    with pytest.raises(optcpu.OptcpuError, match=r"dynamic is None, not True.*restore"):
        optcpu.optimize(model, precision="fp32", dynamic=True)
    with pytest.raises(optcpu.OptcpuError, match="other passes"):
        optcpu.optimize(model, precision="fp32", passes=[])
    assert optcpu.optimize(model, precision="fp32", passes=optcpu.default_passes("fp32")) is model


@pytest.mark.slow
def test_activations_are_computed_anew_where_memory_is_short() -> None:
    def blocks() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(6)])

    def kept_bytes(output: Tensor) -> int:
        """Of activations, which are as long as the batch."""
        saved: list[Tensor] = output.grad_fn.saved_tensors  # type: ignore[union-attr]
        return sum(t.nbytes for t in saved if t.dim() and t.shape[0] == len(x))

    x = torch.randn(40, 16)
    expected = gradients(blocks(), x)
    kept = []
    for share in (1.0, 0.5, 0.0):
        model = optcpu.optimize(blocks(), precision="fp32", activation_memory=share)
        kept.append(kept_bytes(model(x)))
        for ours, theirs in zip(gradients(model, x), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert kept[0] > kept[1] > kept[2] == x.nbytes
    with pytest.raises(ValueError, match=r"activation_memory must lie between 0 and 1, not 1.5"):
        optcpu.optimize(blocks(), activation_memory=1.5)


class _Random(nn.Module):
    """Draws random numbers in several ways, between layers whose results are cheap to compute anew."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.norm(self.layers[0](x)), 0.4)
        x = self.norm(self.layers[1](x)) * torch.rand_like(x)
        return self.layers[2](self.norm(x + torch.randn_like(x) * x.detach().abs().sum(1, True)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("codegen", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_is_computed_anew_has_the_random_numbers_of_the_forward_pass(codegen: bool) -> None:
    x, found = torch.randn(40, 16), {}
    for share in (1.0, 0.5, 0.0):
        torch.manual_seed(0)
        model = optcpu.optimize(_Random(), precision="fp32", activation_memory=share)
        call = compiled_call(model)
        assert call is not None
        call.backend.codegen = codegen
        torch.manual_seed(1)
        found[share] = gradients(model, x)
    for share in (0.5, 0.0):
        for one, other in zip(found[share], found[1.0], strict=True):
            torch.testing.assert_close(one, other, msg=f"activation_memory={share}")


def test_all_sizes_from_the_start_where_dynamo_begins_anew() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4))

    ours, plain = model(), model()
    optcpu.optimize(ours, precision="fp32", dynamic=True, fallback=False)
    for size in (4, 7, 9):
        tokens = torch.randint(10, (size, 5))
        for one, other in zip(gradients(ours, tokens), gradients(plain, tokens), strict=True):
            torch.testing.assert_close(one, other)
    inspection = optcpu.inspect(ours, tokens)
    assert not inspection.fallbacks
