"""The user's optimizer keeps its meaning when it is switched to its fused kernel."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from optcpu.update import _is_open, use_fused_update

Make = Callable[..., torch.optim.Optimizer]

OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.Adagrad, {"lr": 0.01}),
]


@contextmanager
def watched(optimizer: torch.optim.Optimizer) -> Iterator[list[bool]]:
    """Whether each step within the block used the fused kernel."""
    used: list[bool] = []
    handle = optimizer.register_step_post_hook(lambda *_: None)
    inner = optimizer._optimizer_step_code
    optimizer._optimizer_step_code = lambda: used.append(bool(optimizer.param_groups[0]["fused"]))  # type: ignore[method-assign]
    yield used
    optimizer._optimizer_step_code = inner  # type: ignore[method-assign]
    handle.remove()


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 3])
def test_same_steps(
    kind: type[torch.optim.Optimizer], options: dict[str, object], steps_before: int
) -> None:
    model = nn.Linear(7, 5)
    twin = copy.deepcopy(model)
    ours, theirs = kind(model.parameters(), **options), kind(twin.parameters(), **options)
    batches = torch.randn(8, 4, 7)
    for i, x in enumerate(batches):
        if i == steps_before:
            assert use_fused_update(ours) is ours
        for module, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
    torch.testing.assert_close(model.weight, twin.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.bias, twin.bias, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_a_backward_behind_the_step_is_refused_as_with_pytorchs_own(
    kind: type[torch.optim.Optimizer], options: dict[str, object]
) -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    optimizer = use_fused_update(kind(model.parameters(), **options))
    first, second = (model(torch.randn(4, 7)).square().mean() for _ in range(2))
    first.backward()
    with watched(optimizer) as used:
        optimizer.step()
    assert used == [True]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


@pytest.mark.parametrize("choice", ["fused", "foreach", "differentiable", "capturable"])
def test_a_group_with_a_choice_of_the_users_is_not_open(choice: str) -> None:
    (group,) = torch.optim.AdamW(nn.Linear(2, 2).parameters()).param_groups
    assert _is_open(group)
    assert not _is_open(group | {choice: True})
    assert _is_open(group | {choice: False}) == (choice in ("differentiable", "capturable"))


@pytest.mark.parametrize("choice", [{"fused": False}, {"foreach": True}, {"differentiable": True}])
def test_the_users_choice_stands(choice: dict[str, bool]) -> None:
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), **choice)
    before = copy.deepcopy(optimizer.defaults)
    use_fused_update(optimizer)
    assert optimizer.param_groups[0]["fused"] == before["fused"]


def test_what_it_does_not_know_is_left_alone() -> None:
    class Own(torch.optim.AdamW):
        pass

    for optimizer in (
        Own(nn.Linear(2, 2).parameters()),
        torch.optim.RMSprop(nn.Linear(2, 2).parameters()),
        torch.optim.AdamW([nn.Parameter(torch.randn(2, device="meta"))]),
    ):
        use_fused_update(optimizer)
        assert optimizer.param_groups[0].get("fused") is None


def test_the_state_loads_into_a_plain_optimizer() -> None:
    model = nn.Linear(3, 3)
    optimizer = use_fused_update(torch.optim.AdamW(model.parameters()))
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    plain = torch.optim.AdamW(model.parameters())
    plain.load_state_dict(optimizer.state_dict())
    plain.step()


def gaps() -> nn.Parameter:
    return nn.Parameter(torch.randn(8, 16)[:, ::2])


def steps(
    optimizer: torch.optim.Optimizer, gradients: list[list[torch.Tensor | None]]
) -> list[bool]:
    (group,) = optimizer.param_groups
    with watched(optimizer) as fused:
        for step in gradients:
            for parameter, gradient in zip(group["params"], step, strict=True):
                parameter.grad = gradient
            optimizer.step()
    return fused


W, V = torch.randn(6, 4), torch.randn(6, 4)
SPARSE = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 4), (6, 4))
CASES: dict[str, tuple[list[list[torch.Tensor | None]], list[bool]]] = {
    "plain": ([[W, V], [V, W]], [True, True]),
    # SGD keeps the order of the first gradient in its momentum.
    "a gradient in another order": ([[W, torch.randn(4, 6).t()], [V, W]], [False, None]),
    "the first gradient comes late": ([[W, None], [V, W], [V, W]], [True, None, True]),
    "sparse": ([[SPARSE, SPARSE]], [False]),
}


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_what_the_fused_kernel_cannot_do_is_done_without(
    kind: Make, options: dict[str, object], case: str
) -> None:
    gradients, expected = CASES[case]
    if case == "sparse" and kind is not torch.optim.SGD:
        pytest.skip("eager refuses it too, or knows it as another optimizer")
    if case == "sparse":
        options = {"lr": 0.1}
    mine = [nn.Parameter(W.clone()), nn.Parameter(V.clone())]
    plain = [nn.Parameter(W.clone()), nn.Parameter(V.clone())]
    fused = steps(use_fused_update(kind(mine, **options)), gradients)
    steps(kind(plain, **options), gradients)
    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)
    late = kind is not torch.optim.SGD  # whose momentum the kernel wants for all or for none
    assert fused == [late if value is None else value for value in expected]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_a_parameter_with_gaps_in_memory(kind: Make, options: dict[str, object]) -> None:
    mine, plain = gaps(), None
    plain = nn.Parameter(mine.detach().clone())
    gradients = [torch.randn(8, 8) for _ in range(3)]
    strided = [torch.randn(8, 16)[:, ::2].copy_(g) for g in gradients]
    assert steps(use_fused_update(kind([mine], **options)), [[g] for g in strided]) == [False] * 3
    steps(kind([plain], **options), [[g] for g in gradients])
    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
@pytest.mark.parametrize("shape", [(4, 1, 3, 3), (4, 3, 1, 1)])
def test_strides_of_one_number_do_not_matter(
    kind: Make, options: dict[str, object], shape: tuple[int, ...]
) -> None:
    mine = nn.Parameter(torch.randn(shape))
    plain = nn.Parameter(mine.detach().clone())
    gradients = [torch.randn(shape) for _ in range(3)]
    last = [g.to(memory_format=torch.channels_last) for g in gradients]
    last = [g.as_strided(shape, _of_channels_last(shape)) for g in last]  # as convolutions have it
    assert last[0].stride() != mine.stride()
    assert steps(use_fused_update(kind([mine], **options)), [[g] for g in last]) == [True] * 3
    steps(kind([plain], **options), [[g] for g in gradients])
    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)


def _of_channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    _, channels, height, width = shape
    return channels * height * width, 1, width * channels, channels


@pytest.mark.parametrize("named", [True, False])
def test_closure(named: bool) -> None:
    model = nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3)
    for module in (model, twin):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        if module is model:
            use_fused_update(use_fused_update(optimizer))

        def closure() -> torch.Tensor:
            optimizer.zero_grad()  # noqa: B023
            loss = module(x).square().mean()  # noqa: B023
            loss.backward()
            return loss

        with watched(optimizer) as fused:
            loss = optimizer.step(closure=closure) if named else optimizer.step(closure)
        assert isinstance(loss, torch.Tensor)
        assert fused == [module is model]
    torch.testing.assert_close(model.weight, twin.weight)


def test_a_step_that_raises_leaves_the_settings_alone() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = use_fused_update(torch.optim.AdamW([parameter]))
    parameter.grad = torch.ones(3)
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(Exception, match=r"fast|str|float"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["fused"] is None
