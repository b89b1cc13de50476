"""Packed weights change no result, and nobody sees them: whatever writes to a weight, and however long."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from copies import Copies
from torch import Tensor, nn

import optcpu
from optcpu import layout as layouts_module
from optcpu.errors import OptcpuError
from optcpu.layout import native
from optcpu.optim.weights import StoredWeight
from passes import gemm, packed


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.GELU(), nn.Linear(16, 5)
    )


@pytest.fixture(scope="module")
def compiled_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of these tests alone: elsewhere small products are written out, in the same graphs."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def copies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiled_code: Path
) -> Iterator[list[Copies]]:
    """Every product large enough to be kept packed, by a packing that this processor can do."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled_code))
    monkeypatch.setattr(packed, "_KEPT", {})  # those of other tests' models may be there yet
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for dtype in gemm._SMALL:
        monkeypatch.setitem(gemm._SMALL, dtype, 0)
    monkeypatch.setattr(gemm, "kernels", lambda _: {"aten": gemm._aten})
    monkeypatch.setattr(packed._Kept, "pays_from", lambda *_: 2)
    made: list[Copies] = []

    def packing() -> Copies:
        made.append(Copies())
        made[-1].name = "native"
        return made[-1]

    monkeypatch.setattr(native, "NativePacking", packing)
    monkeypatch.setattr(native, "why_impossible", lambda: None)
    yield made
    torch._dynamo.reset()
    gc.collect()  # an optimized model and what it is called through refer to each other
    assert not packed._KEPT


@pytest.fixture(autouse=True)
def without_the_warning_of_emulation() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this processor has no BF16")
        yield


def optimized(layout: str, **options: Any) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return optcpu.optimize(model, optimizer, precision="bf16", layout=layout, **options)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    accumulation: int = 3,
    after: Callable[[nn.Module], object] = lambda model: None,
) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        for _ in range(accumulation):
            x = torch.randn(8, 12, generator=generator)
            target = torch.randint(5, (8,), generator=generator)
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()
            losses.append(loss.item())
            after(model)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("weights", [pytest.param("split", marks=pytest.mark.slow), "bf16"])
def test_training_has_the_same_bits_with_and_without(copies: list[Copies], weights: str) -> None:
    runs = {}
    for layout in ("none", "native"):
        model, optimizer = optimized(layout, weights=weights)
        runs[layout] = train(model, optimizer, 4), bits_of(model)
    assert runs["native"][0] == runs["none"][0]
    torch.testing.assert_close(runs["native"][1], runs["none"][1], rtol=0, atol=0)
    # Forward of three layers and the input's gradient of two, in each of the four steps.
    assert [packing.packings for packing in copies] == [4 * 5]


def edit_all(function: Callable[[Tensor], object]) -> Callable[[nn.Module], object]:
    def edit(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                function(parameter)

    return edit


def reload(model: nn.Module) -> None:
    model.load_state_dict({name: 0.9 * tensor for name, tensor in model.state_dict().items()})


WRITES = {
    "in place": edit_all(lambda p: p.mul_(0.9)),
    ".data in place": edit_all(lambda p: p.data.clamp_(-0.05, 0.05)),
    ".data assigned": edit_all(lambda p: setattr(p, "data", 0.9 * p.data)),
    ".data in another order": edit_all(lambda p: setattr(p, "data", (0.9 * p.data.t()).t())),
    "part of the data": edit_all(lambda p: p.data.view(-1)[:3].zero_()),
    "all at once": lambda model: torch._foreach_mul_(list(model.parameters()), 0.9),
    "some rows at once": lambda model: torch._foreach_mul_(
        [p[:2] for p in model.parameters()], 0.5
    ),
    "in inference mode": torch.inference_mode()(edit_all(lambda p: p.mul_(0.9))),
    "as a vector": lambda model: nn.utils.vector_to_parameters(
        0.9 * nn.utils.parameters_to_vector(model.parameters()), model.parameters()
    ),
    "an initialiser": edit_all(lambda p: nn.init.constant_(p, 0.1)),
    "a row": edit_all(lambda p: p[0].zero_()),
    "load_state_dict": reload,
}
WRITES = {name: torch.no_grad()(write) for name, write in WRITES.items()}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_whatever_writes_to_a_weight_is_seen(
    copies: list[Copies], write: Callable[[nn.Module], object]
) -> None:
    runs = []
    for layout in ("none", "native"):
        model, optimizer = optimized(layout)
        # The first steps leave copies behind; then there is a write after every micro-batch.
        losses = train(model, optimizer, 2)
        runs.append(losses + train(model, optimizer, 3, after=write))
    assert runs[0] == runs[1]
    assert copies[0].packings > 0


def test_a_weight_that_is_given_other_memory_stays_packed(copies: list[Copies]) -> None:
    model, optimizer = optimized("native")
    first = model[0]
    first.weight.data = torch.randn(first.weight.shape[::-1]).t()
    train(model, optimizer, 3)
    assert packed.kept(first.weight.high).packed
    optcpu.restore(model)


def test_the_model_is_what_it_was(copies: list[Copies]) -> None:
    model, optimizer = optimized("native")
    train(model, optimizer, 2)
    before = bits_of(model)
    assert all(
        type(tensor) is Tensor and tensor.dtype == torch.float32 for tensor in before.values()
    )
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(optcpu.restore(copy.deepcopy(model)))),
    ):
        torch.testing.assert_close(twin.state_dict(), before, rtol=0, atol=0)
    optcpu.restore(model)
    assert not any(isinstance(parameter, StoredWeight) for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not packed._KEPT, "weights that exist no more"


def test_a_frozen_weight_is_packed_once(copies: list[Copies]) -> None:
    model, optimizer = optimized("native")
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    train(model, optimizer, 3)
    first, second, last = (packed.kept(model[i].weight.high) for i in (0, 2, 4))
    assert first is not None
    assert second is not None
    assert last is not None
    assert (len(first.packed), len(second.packed), len(last.packed)) == (1, 1, 2)
    # Once the first weight, forward alone; each step the second one forward (below it all is frozen)
    # and the last one in both directions.
    assert copies[0].packings == 1 + 3 * (1 + 2)


def test_shared_memory_is_not_kept(copies: list[Copies]) -> None:
    model, optimizer = optimized("native")
    model.share_memory()
    train(model, optimizer, 2)
    assert copies[0].packings == 0


@pytest.mark.slow
def test_the_trainer_knows_how_often_a_weight_is_used(copies: list[Copies]) -> None:
    data = torch.utils.data.TensorDataset(torch.randn(48, 12), torch.randint(5, (48,)))
    for accumulation, packings in ((1, 0), (3, 2 * 5)):
        torch._dynamo.reset()
        trainer = optcpu.Trainer(
            make_model(),
            data,
            steps=2,
            batch_size=8,
            accumulation_steps=accumulation,
            precision="bf16",
            progress=False,
        )
        trainer.train()
        assert copies[-1].packings == packings


def test_inspect_tells_the_layout_of_each_weight(copies: list[Copies], tmp_path: Path) -> None:
    model, optimizer = optimized("native")
    train(model, optimizer, 2)
    seen = optcpu.inspect(model, torch.randn(8, 12))
    reason = "a packed copy is kept until the weight changes"
    assert seen.laid_out() == {("native", reason): ["0.weight", "2.weight", "4.weight"]}
    assert "native 3 weights" in str(seen)
    assert seen.to_json().count('"layout":"native"') == 3
    plain = optcpu.inspect(make_model(), torch.randn(8, 12))
    assert [(entry.layout, entry.name) for entry in plain.layouts] == [
        ("plain", "0.weight"),
        ("plain", "2.weight"),
        ("plain", "4.weight"),
    ]
    plain.save(tmp_path / "page.html")
    assert "which can change unseen" in (tmp_path / "page.html").read_text()


def test_an_unknown_layout_is_refused_before_anything_changes() -> None:
    model = make_model()
    with pytest.raises(
        ValueError, match="layout must be 'auto', 'native', 'ipex' or 'none', not 'x'"
    ):
        optcpu.optimize(model, layout="x")
    assert model._compiled_call_impl is None


def test_another_layout_needs_a_restore(copies: list[Copies]) -> None:
    model, optimizer = optimized("native")
    assert optcpu.optimize(model, optimizer, precision="bf16", layout="native")[0] is model
    with pytest.raises(OptcpuError, match=r"layout is native, not none.*optcpu\.restore"):
        optcpu.optimize(model, optimizer, precision="bf16", layout="none")


def test_a_layout_without_weights_to_pack_is_told() -> None:
    with pytest.warns(UserWarning, match=r"layout='native' has no weights to pack"):
        optcpu.optimize(make_model(), precision="fp32", layout="native")


@pytest.mark.parametrize("layout", ["native", "ipex"])
def test_a_processor_that_cannot_pack_is_told(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    monkeypatch.setattr(native, "why_impossible", lambda: "no AVX-512")
    monkeypatch.setattr(layouts_module.ipex, "load", lambda: None)
    with pytest.warns(UserWarning, match=f"layout='{layout}' packs no weights: no AVX-512"):
        model, optimizer = optimized(layout)
    train(model, optimizer, 1)
    assert {(entry.layout, entry.reason) for entry in layouts_module.layouts(model)} == {
        ("plain", "no AVX-512")
    }


def test_auto_takes_what_was_measured_to_be_faster(
    copies: list[Copies], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def ipex_wins(shapes: list[tuple[int, ...]]) -> bool:
        asked.append(shapes)
        return True

    monkeypatch.setattr(layouts_module.choice, "ipex_wins", ipex_wins)
    other = Copies()
    monkeypatch.setattr(layouts_module.ipex, "IpexPacking", lambda: other)
    model, optimizer = optimized("auto")
    train(model, optimizer, 2)
    assert asked == [[(20, 12), (16, 20), (5, 16)]]
    assert other.packings == 2 * 5


def test_an_extension_that_wins_but_cannot_be_imported_is_told(
    copies: list[Copies], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Copies:
        raise OptcpuError("importing it ended in SystemExit")

    monkeypatch.setattr(layouts_module.choice, "ipex_wins", lambda _: True)
    monkeypatch.setattr(layouts_module.ipex, "IpexPacking", fails)
    with pytest.warns(UserWarning, match="SystemExit. The native layout is used"):
        model, optimizer = optimized("auto")
    train(model, optimizer, 2)
    assert copies[0].packings == 2 * 5
