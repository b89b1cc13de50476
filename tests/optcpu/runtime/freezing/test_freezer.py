"""The freezer in a training loop: the compute goes, the training stays right, a run can be resumed."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import optcpu
from optcpu.compiled_call import compiled_call
from optcpu.optim import AdamW, Lookahead
from optcpu.optim.weights import StoredWeight
from optcpu.runtime.freezing.freezer import DynamicFreezer, FreezeEvent
from tests.families import BY_NAME, loss_of

pytestmark = pytest.mark.filterwarnings("ignore:this processor has no BF16")

Optimizer = torch.optim.Optimizer


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.GELU()),
        *(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)),
    )


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 8, generator=generator)
    return x, (x[:, :3] + x[:, 3:6]).argmax(1)


def train(
    model: nn.Module,
    optimizer: Optimizer,
    freezer: DynamicFreezer | None,
    steps: range,
) -> list[float]:
    losses = []
    for step in steps:
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if freezer is not None:
            freezer.step()
        losses.append(loss.item())
    return losses


def without_codegen(model: nn.Module, *, keep_graphs: bool = False) -> nn.Module:
    """Graphs are made and rewritten, but run by PyTorch: no C++ has to be compiled."""
    call = compiled_call(model)
    assert call is not None
    call.backend.codegen = False
    call.record.keep_graphs = keep_graphs
    return model


def count(model: nn.Module, kind: str, *operators: str) -> int:
    """How many nodes of the graphs made last of one kind run one of the operators."""
    call = compiled_call(model)
    assert call is not None
    graphs = [graph for graph in call.record.graphs if graph.kind == kind]
    nodes = graphs[-1].final.nodes if graphs and graphs[-1].final is not None else ()
    return sum(str(node.target).split(".")[-2:-1] == [name] for node in nodes for name in operators)


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def test_the_compute_of_a_frozen_prefix_goes() -> None:
    model = without_codegen(
        optcpu.optimize(network(), precision="fp32", passes=[]), keep_graphs=True
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = DynamicFreezer(model, optimizer)
    seen = []
    for frozen in (0, 1, 2, 3):
        if frozen:
            freezer.freeze(frozen)
        train(model, optimizer, freezer, range(2))
        seen.append((count(model, "forward", "addmm"), count(model, "backward", "mm")))
    # Four weight gradients and three input gradients; a frozen layer takes one of each with it.
    assert seen == [(4, 7), (4, 5), (4, 3), (4, 1)]


def test_the_passes_fuse_what_is_left() -> None:
    model = without_codegen(optcpu.optimize(network(), precision="fp32"), keep_graphs=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = DynamicFreezer(model, optimizer)
    train(model, optimizer, freezer, range(2))
    assert count(model, "backward", "linear_backward") == 4
    freezer.freeze(2)
    train(model, optimizer, freezer, range(2))
    assert count(model, "forward", "linear", "linear_saving_input") == 4
    assert count(model, "backward", "linear_backward") == 2
    call = compiled_call(model)
    assert call is not None
    assert call.record.fallbacks == []


def test_a_tied_embedding_keeps_the_input_gradients_only() -> None:
    model = BY_NAME["tied-embeddings"].build()
    without_codegen(optcpu.optimize(model, precision="fp32", passes=[]), keep_graphs=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = DynamicFreezer(model, optimizer)
    products = []
    for _ in range(2):
        model(torch.randint(50, (4, 12))).square().mean().backward()
        products.append(count(model, "backward", "mm"))
        if not freezer.frozen_blocks:
            freezer.freeze(4)
    assert (
        products[0] - products[1] == 4
    )  # the weight gradients of qkv, out, and the two of the MLP
    assert model.tokens.weight.grad is not None
    assert model.positions.weight.grad is None


@pytest.mark.parametrize(
    "family",
    [
        *("mlp", "cnn-batchnorm", "tied-embeddings", "lstm"),
        pytest.param("gpt2-block", marks=pytest.mark.slow),
        pytest.param("hf-gpt2", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore::optcpu.FallbackWarning")
def test_parity_with_eager_training_with_the_same_prefix(family: str) -> None:
    if family.startswith("hf-"):
        pytest.importorskip("transformers")
    kind = BY_NAME[family]
    torch.manual_seed(0)
    model = kind.build()
    args, kwargs = kind.inputs(4)
    reference = copy.deepcopy(model)
    without_codegen(optcpu.optimize(model, precision="fp32"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    freezer = DynamicFreezer(model, optimizer)
    loss_of(model(*args, **kwargs)).backward()
    reference(*args, **kwargs)  # batch statistics go on as well
    freezer.freeze(2)
    frozen = {id(p) for block in freezer.frozen_blocks for p in block.parameters}
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        theirs.requires_grad_(id(ours) not in frozen)
    optimizer.zero_grad()
    ours, theirs = loss_of(model(*args, **kwargs)), loss_of(reference(*args, **kwargs))
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for mine, other in zip(gradients(model), gradients(reference), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


MAKERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "lamb": lambda p: optcpu.Lamb(p, lr=1e-2),
    "lookahead": lambda p: Lookahead(torch.optim.AdamW(p, lr=1e-2), k=3),
    "lookahead-optcpu": lambda p: Lookahead(AdamW(p, lr=1e-2), k=3, pullback="reset"),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MAKERS)
def test_frozen_layers_stay_bit_for_bit_and_free_their_state(name: str, precision: str) -> None:
    model = network()
    optimizer = MAKERS[name](list(model.parameters()))
    optcpu.optimize(model, optimizer, precision=precision)
    without_codegen(model)
    freezer = DynamicFreezer(model, optimizer)
    train(model, optimizer, freezer, range(4))
    freezer.freeze(2)
    frozen = [p for block in freezer.frozen_blocks for p in block.parameters]
    active = [p for block in freezer.blocks.blocks[2:] for p in block.parameters]
    assert [p for p in model.parameters() if not p.requires_grad] == frozen
    assert isinstance(frozen[0], StoredWeight) == (precision == "bf16")
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, freezer, range(4, 11))
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.detach(), value) == (parameter in set(frozen))
    assert all(p.grad is None for p in frozen)
    assert not any(optimizer.state.get(p) for p in frozen)
    assert all(optimizer.state.get(p) for p in active)
    assert freezer.frozen_fraction == pytest.approx((9 * 16 + 17 * 12) / (9 * 16 + 17 * 12 + 163))
    optimizer.load_state_dict(optimizer.state_dict())


def freezer_of(model: nn.Module, optimizer: Optimizer, **settings: Any) -> DynamicFreezer:
    """A freezer that decides often."""
    usual: dict[str, Any] = {"window": 3, "patience": 1, "observe_every": 1, "percentile": 80}
    return DynamicFreezer(model, optimizer, **(usual | settings))


def give(model: nn.Module, numbers: list[float]) -> None:
    """Gradients of each Linear layer that are one number everywhere."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    for layer, number in zip(layers, numbers, strict=True):
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, number)


def feed(freezer: DynamicFreezer, windows: list[list[float]]) -> list[FreezeEvent | None]:
    """Windows of one step each; what the freezer did behind each."""
    events = []
    for numbers in windows:
        give(freezer.model, numbers)
        freezer.optimizer.step()
        events.append(freezer.step())
    return events


EXAMPLE = [[1.0, 1.0, 1.0, 1.0], [1.05, 0.9, 0.7, 1.4], [0.0, 0.0, 0.63, 0.7]]


def test_the_worked_example_in_a_loop() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = freezer_of(model, optimizer, window=1, percentile=50)
    lines = io.StringIO()
    handler, logger = logging.StreamHandler(lines), logging.getLogger("optcpu.freezer")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        first, second, third = feed(freezer, EXAMPLE)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert first is None
    assert second is not None
    assert third is not None
    assert (second.step, second.kind, second.blocks) == (2, "freeze", ("0", "2"))
    assert (third.step, third.kind, third.blocks) == (3, "freeze", ("4",))
    assert "changed by at most 10.0%, below the 50th percentile" in second.reason
    assert freezer.events == [second, third]
    assert third.fraction == freezer.frozen_fraction
    assert [block.name for block in freezer.frozen_blocks] == ["0", "2", "4"]
    assert "step 2: freeze 0, 2; 68.1 %" in lines.getvalue()


def test_nothing_happens_between_optimizer_steps() -> None:
    model = network()
    freezer = freezer_of(model, torch.optim.SGD(model.parameters(), lr=0.1), window=1)
    for _ in range(5):
        assert freezer.step() is None
    assert freezer.steps == 0
    feed(freezer, EXAMPLE[:1])
    freezer.step()
    assert freezer.state_dict()["progress"]["windows"] == 1


def test_the_cap_on_freezes() -> None:
    for most, expected in ((0, 0), (1, 2), (None, 3)):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        freezer = freezer_of(model, optimizer, window=1, percentile=50, max_freezes=most)
        feed(freezer, EXAMPLE)
        assert len(freezer.frozen_blocks) == expected


def test_a_freeze_that_does_not_pay_is_declined_and_told_once() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # 8 steps of a second remain, and two of the layers hold 320 of 470 weights.
    cost = 8 * 2 / 3 * 320 / 470 + 0.01
    settings = {"total_steps": 10, "step_seconds": 1.0, "compile_seconds": cost}
    freezer = freezer_of(model, optimizer, window=1, percentile=50, **settings)
    quiet, told, longer = feed(freezer, EXAMPLE)
    assert quiet is None
    assert longer is None or longer.blocks != ("0", "2")
    assert told is not None
    assert (told.kind, told.blocks, told.fraction) == ("decline", ("0", "2"), 0.0)
    assert "8 steps of 1e+03 ms remain" in told.reason
    assert freezer.frozen_blocks == ()
    assert all(p.requires_grad for p in model.parameters())
    same = [[0.0, 0.0, 0.5, 9.0]]
    assert feed(freezer, same * 2) == [None, None]


def test_a_freeze_that_pays_is_made() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # 8 steps of a second remain, and two of the layers hold 320 of 470 weights.
    cost = 8 * 2 / 3 * 320 / 470 - 0.01
    settings = {"total_steps": 10, "step_seconds": 1.0, "compile_seconds": cost}
    freezer = freezer_of(model, optimizer, window=1, percentile=50, **settings)
    _, made, _ = feed(freezer, EXAMPLE)
    assert made is not None
    assert made.kind == "freeze"
    assert "8 steps of 1e+03 ms remain" in made.reason


def test_an_eager_model_freezes_until_the_end_since_it_costs_nothing() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = freezer_of(model, optimizer, window=1, percentile=50, total_steps=3)
    feed(freezer, EXAMPLE[:2])
    assert [event.kind for event in freezer.events] == ["freeze"]


def test_unfreezing_after_some_windows() -> None:
    model = network()
    without_codegen(optcpu.optimize(model, precision="fp32"))
    optimizer = torch.optim.AdamW(model.parameters())
    freezer = freezer_of(model, optimizer, unfreeze_after=2, max_freezes=1)
    train(model, optimizer, freezer, range(30))
    assert [event.kind for event in freezer.events] == ["freeze", "unfreeze"]
    freeze, unfreeze = freezer.events
    assert unfreeze.step == freeze.step + 6
    assert unfreeze.blocks == freeze.blocks
    assert freezer.frozen_fraction == 0
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, freezer, range(30, 32))
    assert all(
        not torch.equal(p.detach(), b) for p, b in zip(model.parameters(), before, strict=True)
    )
    assert freezer.unfreeze() is None


def test_evaluation_mode_of_frozen_blocks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 3))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for eval_frozen in (False, True):
        freezer = DynamicFreezer(model, optimizer, eval_frozen=eval_frozen)
        freezer.freeze(1)
        mean = model[1].running_mean.clone()
        train(model.train(), optimizer, freezer, range(1))
        freezer.keep_modes()
        mean = model[1].running_mean.clone()
        train(model, optimizer, freezer, range(1, 4))
        assert torch.equal(model[1].running_mean, mean) is eval_frozen
        assert [m.training for m in model] == [not eval_frozen] * 3 + [True] * 2
        freezer.unfreeze()
        assert all(m.training for m in model)
        freezer.close()


def test_what_never_required_gradients_is_never_unfrozen() -> None:
    model = network()
    model[2].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = DynamicFreezer(model, optimizer)
    trained = [p.requires_grad for p in model.parameters()]
    freezer.freeze(2)
    assert freezer.events[0].blocks == ("0", "4")
    freezer.unfreeze()
    assert [p.requires_grad for p in model.parameters()] == trained


def resumed(
    make: Callable[[list[nn.Parameter]], Optimizer], at: int, settings: dict[str, Any], order: str
) -> tuple[nn.Module, DynamicFreezer]:
    """Train 40 steps, stopped and resumed in new objects ``at`` a step; 0 is never."""

    def build(seed: int) -> tuple[nn.Module, Optimizer, DynamicFreezer]:
        model = network(seed)
        optimizer = make(list(model.parameters()))
        return model, optimizer, freezer_of(model, optimizer, **settings)

    parts = build(0)
    train(*parts, range(at))
    if at:
        states = [copy.deepcopy(part.state_dict()) for part in parts]
        states[2] = json.loads(json.dumps(states[2], allow_nan=False))
        parts = build(1)
        for place in map(int, order):
            parts[place].load_state_dict(states[place])
    train(*parts, range(at, 40))
    return parts[0], parts[2]


@pytest.mark.parametrize(
    ("name", "unfreeze_after", "order"),
    [
        *((name, None, "012") for name in MAKERS),
        *((name, 3, "201") for name in ("adamw", "lookahead", "lookahead-optcpu")),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    name: str, unfreeze_after: int | None, order: str
) -> None:
    torch.set_num_threads(1)  # small tensors, and other processes may want the other one
    costs = {"total_steps": 40, "step_seconds": 1.0, "compile_seconds": 4.0}
    settings = {**costs, "unfreeze_after": unfreeze_after}
    model, freezer = resumed(MAKERS[name], 0, settings, order)
    assert {event.kind for event in freezer.events} >= {"freeze"}
    for at in (7, 12, 20):
        other, resumed_freezer = resumed(MAKERS[name], at, settings, order)
        assert resumed_freezer.state_dict() == freezer.state_dict()
        assert resumed_freezer.events == freezer.events
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.requires_grad == theirs.requires_grad


def test_loading_compiles_anew_and_goes_back_too() -> None:
    model = without_codegen(optcpu.optimize(network(), precision="fp32"), keep_graphs=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = DynamicFreezer(model, optimizer)
    train(model, optimizer, freezer, range(2))
    early = freezer.state_dict()
    freezer.freeze(2)
    late = freezer.state_dict()
    for state, layers in ((early, 4), (late, 2), (early, 4)):
        freezer.load_state_dict(state)
        train(model, optimizer, None, range(2))
        assert count(model, "backward", "linear_backward") == layers
        freezer.load_state_dict(state)


def test_a_state_of_other_blocks_is_refused() -> None:
    model, other = network(), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    freezers = [DynamicFreezer(m, torch.optim.SGD(m.parameters(), lr=0.1)) for m in (model, other)]
    with pytest.raises(ValueError, match=r"blocks \['0', '2', '4', '6'\], but this one has"):
        freezers[1].load_state_dict(freezers[0].state_dict())


def test_bad_arguments_are_told() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for arguments, error, message in (
        ((3, optimizer), TypeError, "model must be a torch.nn.Module, not int"),
        ((model, model), TypeError, "optimizer must be a torch.optim.Optimizer, not Sequential"),
        ((network(), optimizer), ValueError, "holds no parameter of this Sequential"),
    ):
        with pytest.raises(error, match=message):
            DynamicFreezer(*arguments)  # type: ignore[arg-type]
    for name, value in (
        *(("window", 0), ("percentile", 120), ("patience", 0), ("max_freezes", -1)),
        *(("total_steps", 0), ("step_seconds", -1), ("compile_seconds", "3")),
        *(("observe_every", 0), ("unfreeze_after", 0)),
    ):
        with pytest.raises(ValueError, match=f"^{name} must"):
            DynamicFreezer(model, optimizer, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no module '44'"):
        DynamicFreezer(model, optimizer, blocks=["0", "44"])
    assert not optimizer._optimizer_step_pre_hooks
    freezer = DynamicFreezer(model, optimizer)
    freezer.freeze(2)
    for wrong in (0, 2, 4, 1.5):
        with pytest.raises(ValueError, match=r"above 2 .* and at most 3"):
            freezer.freeze(wrong)  # type: ignore[arg-type]


def test_updates_in_backward_are_refused() -> None:
    model = network()
    optimizer = AdamW(model.parameters())
    optimizer.update_in_backward()
    with pytest.raises(optcpu.OptcpuError, match="update_in_step"):
        DynamicFreezer(model, optimizer)


@functools.cache
def fine_tuned(kind: str, steps: int = 300) -> tuple[float, DynamicFreezer | None]:
    """Accuracy on digits after pretraining, a new last layer, and training again."""
    from optcpu.data import digits

    data = digits()
    x, y = data.train
    torch.manual_seed(0)
    head = nn.Linear(64, 10)
    hidden = [part for _ in range(3) for part in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(nn.Flatten(), *hidden, head)

    def fit(called: nn.Module, freezing: bool) -> DynamicFreezer | None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        freezer = DynamicFreezer(called, optimizer, window=20) if freezing else None
        for _ in range(steps):
            chosen = torch.randint(len(x), (128,))
            F.cross_entropy(called(x[chosen]), y[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if freezer is not None:
                freezer.step()
        return freezer

    fit(model, False)
    head.reset_parameters()
    called: Any = model
    if kind == "optimize":
        called = without_codegen(optcpu.optimize(model, precision="fp32"))
    elif kind == "torch.compile":
        called = torch.compile(model, backend="aot_eager")
    freezer = fit(called, kind != "unfrozen")
    right = model(data.test[0]).argmax(1) == data.test[1]
    return right.float().mean().item(), freezer


@pytest.mark.parametrize("kind", ["eager", "optimize", "torch.compile"])
def test_fine_tuning_freezes_what_is_good_and_stays_accurate(kind: str) -> None:
    pytest.importorskip("sklearn")
    usual, _ = fine_tuned("unfrozen")
    accuracy, freezer = fine_tuned(kind)
    assert freezer is not None
    assert freezer.frozen_fraction > 0.3
    for block in freezer.frozen_blocks:
        assert all(p.grad is None for p in block.parameters)
    assert usual > 0.93
    assert accuracy > usual - 0.02


@pytest.mark.parametrize("inner", [torch.optim.AdamW, AdamW])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_states_are_loaded_in_any_order_beside_lookahead(
    inner: Callable[..., Optimizer], order: tuple[int, ...]
) -> None:
    """What is frozen is not moved to what it was when the optimizer's state came."""

    def parts(seed: int) -> tuple[nn.Module, Lookahead, DynamicFreezer]:
        model = network(seed)
        optimizer = Lookahead(inner(model.parameters(), lr=0.01), k=3)
        return model, optimizer, DynamicFreezer(model, optimizer, window=50)

    whole = parts(0)
    train(*whole, range(4))
    whole[2].freeze(1)
    train(*whole, range(4, 5))
    states = [copy.deepcopy(part.state_dict()) for part in whole]
    other = parts(1)
    for number in order:
        other[number].load_state_dict(states[number])
    for run in (whole, other):
        train(*run, range(5, 12))
        run[2].unfreeze()
        train(*run, range(12, 16))
    for p, q in zip(whole[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(p, q)
