"""Hooks that come and go after the first call are run, as in eager PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as module_file
from torch.utils.hooks import RemovableHandle
from torch.utils.module_tracker import ModuleTracker

import optcpu
from optcpu.compiled_call import compiled_call
from optcpu.hooks import hooks_of, hooks_of_all_modules

Results = list[Tensor | None]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def optimized(model: nn.Module) -> nn.Module:
    """A copy that is optimized, without generated code, and was called."""
    twin = optcpu.optimize(copy.deepcopy(model), precision="fp32")
    call = compiled_call(twin)
    assert call is not None
    call.backend.codegen = False
    results(twin)
    return twin


def results(model: nn.Module) -> Results:
    """What a step gives: the output and all gradients."""
    model.zero_grad()
    x = torch.linspace(-1, 1, 24).view(4, 6).requires_grad_()
    output = model(x)
    output.square().sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in model.parameters())]


def assert_close(got: Results, wanted: Results) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


# How each kind is registered with a module, and with all modules; every hook changes numbers.
KINDS: dict[str, Callable[..., Any]] = {
    "forward_pre_hook": lambda module, inputs: (inputs[0] * 3,),
    "forward_hook": lambda module, inputs, output: output * 2 + 1,
    "full_backward_pre_hook": lambda module, gradients: (gradients[0] * 2,),
    "full_backward_hook": lambda module, inputs, outputs: (inputs[0] * 5,),
}


@pytest.mark.parametrize("place", ["model", "submodule", "all modules"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::optcpu.FallbackWarning")
def test_hooks_that_come_and_go_after_the_first_call(kind: str, place: str) -> None:
    plain = network()
    model = optimized(plain)
    without = results(plain)

    def register(module: nn.Module) -> list[RemovableHandle]:
        if place == "all modules":
            return [getattr(module_file, f"register_module_{kind}")(KINDS[kind])]
        return [
            getattr(m if place == "model" else m[0], f"register_{kind}")(KINDS[kind])
            for m in (module, plain)
        ]

    for _ in range(2):
        handles = register(model)
        try:
            wanted = results(plain)
            assert not all(torch.equal(a, b) for a, b in zip(wanted, without, strict=True))  # type: ignore[arg-type]
            assert_close(results(model), wanted)
        finally:
            for handle in handles:
                handle.remove()
        assert_close(results(model), without)


@pytest.mark.parametrize("place", ["model", "submodule"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::optcpu.FallbackWarning")
def test_hooks_that_are_there_from_the_start_go_and_come_again(kind: str, place: str) -> None:
    plain = network()
    without = results(plain)

    def register(module: nn.Module) -> RemovableHandle:
        owner: nn.Module = module if place == "model" else module[0]  # type: ignore[index]
        handle: RemovableHandle = getattr(owner, f"register_{kind}")(KINDS[kind])
        return handle

    handles = [register(plain)]
    model = optcpu.optimize(network(), precision="fp32")
    model.load_state_dict(plain.state_dict())
    handles.append(register(model))
    call = compiled_call(model)
    assert call is not None
    call.backend.codegen = False
    for _ in range(2):
        assert_close(results(model), results(plain))
        for handle in handles:
            handle.remove()
        assert_close(results(model), without)
        handles = [register(plain), register(model)]
    assert_close(results(model), results(plain))


def test_a_hook_in_place_of_another() -> None:
    plain = network()
    model = optimized(plain)
    for factor in (2, 3):
        handles = [
            m[1].register_forward_hook(lambda module, inputs, output, by=factor: output * by)
            for m in (model, plain)  # type: ignore[index]
        ]
        assert_close(results(model), results(plain))
        for handle in handles:
            handle.remove()


def test_a_loss_compiled_with_the_model_has_the_models_hooks() -> None:
    model = optcpu.optimize(network(), precision="fp32")
    call = compiled_call(model)
    assert call is not None
    with_loss = call.with_loss(
        model, functional.mse_loss, lambda x: functional.mse_loss(model(x), torch.ones(2, 3))
    )
    with_loss.backend.codegen = with_loss.backend.fallback = False
    x = torch.ones(2, 6)
    before = with_loss(x)
    model.register_forward_hook(lambda module, inputs, output: 1 + (output - 1) * 2)
    torch.testing.assert_close(with_loss(x), before * 4)


def test_what_is_compiled_stays_where_hooks_are_not_the_models() -> None:
    model = optimized(network())
    call = compiled_call(model)
    assert call is not None
    regions = call.record.regions
    network().register_forward_hook(lambda *_: None)
    model.weight_hook = model[0].weight.register_hook(lambda gradient: None)  # type: ignore[index, assignment]
    results(model)
    assert call.record.regions == regions


def test_hooks_of_all_modules_are_told() -> None:
    model, strict = optimized(network()), optcpu.optimize(network(), fallback=False)
    with ModuleTracker():
        with pytest.warns(optcpu.FallbackWarning, match=r"hooks of all modules.*eagerly") as told:
            assert_close(results(model), results(model))
        with pytest.raises(optcpu.CompileError, match="hooks of all modules"):
            strict(torch.ones(2, 6))
    assert len(told) == 1
    assert not hooks_of_all_modules()


def test_hooks_of_a_model_and_of_modules_in_it() -> None:
    model = network()
    assert hooks_of(model) == set()
    handles = [model.register_forward_hook(print), model[0].register_full_backward_hook(print)]
    assert hooks_of(model) == {handle.id for handle in handles}
    for handle in handles:
        handle.remove()
    assert hooks_of(model) == set()
