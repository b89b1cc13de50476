"""Blocks in the order of the forward pass, whose parameters are each frozen with one of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from optcpu.runtime.freezing.blocks import Blocks, find_blocks
from tests.families import BY_NAME, FAMILIES


def blocks_of(model: nn.Module, chosen: list[str | nn.Module] | None = None) -> Blocks:
    return find_blocks(model, list(model.parameters()), chosen)


def names(blocks: Blocks) -> list[str]:
    return [block.name for block in blocks.blocks]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("mlp", [f"layers.{place}" for place in range(0, 13, 2)]),
        ("cnn-batchnorm", ["features.0", "features.4", "classifier"]),
        ("gpt2-block", ["tokens", "positions", "blocks.0", "blocks.1", "head"]),
        ("lstm", ["tokens", "lstm", "head"]),
        ("autoencoder", ["encoder.0", "encoder.2", "decoder.0", "decoder.2"]),
        ("hf-gpt2", ["transformer.wpe", "transformer.h.0", "transformer.h.1", "lm_head"]),
        (
            "hf-bert",
            [
                *("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"),
                *("bert.pooler", "classifier"),
            ],
        ),
    ],
)
def test_the_blocks_of_known_models(family: str, expected: list[str]) -> None:
    if family.startswith("hf-"):
        pytest.importorskip("transformers")
    assert names(blocks_of(BY_NAME[family].build())) == expected


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_parameter_belongs_to_one_block(family: object) -> None:
    name = family.name  # type: ignore[attr-defined]
    if name.startswith("hf-"):
        pytest.importorskip("transformers")
    model = BY_NAME[name].build()
    blocks = blocks_of(model)
    held = [id(p) for block in blocks.blocks for p in block.parameters]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert blocks.outside == ()


def test_a_large_element_of_a_list_is_taken_apart() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(layer, 3), nn.Linear(16, 2))
    assert names(blocks_of(model)) == ["0", "1.layers.0", "1.layers.1", "1.layers.2", "2"]


def test_what_has_no_matrix_belongs_to_the_block_in_front() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Dropout(0.1), nn.Linear(4, 2)
    )
    blocks = blocks_of(model)
    assert names(blocks) == ["1", "4"]
    assert list(blocks.blocks[0].modules) == list(model)[:4]


def test_parametrized_weights_stay_one_block() -> None:
    layers = [parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(3)]
    assert names(blocks_of(nn.Sequential(*layers))) == ["0", "1", "2"]


class Tied(nn.Module):
    """An embedding and layers; any of the weights may be shared with others."""

    def __init__(self, sharing: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in sharing)
        self.biases = nn.ModuleList(nn.Linear(4, 4) for _ in sharing)
        for layer, other in zip(self.layers, sharing, strict=True):
            layer.weight = self.layers[other].weight  # type: ignore[union-attr, assignment]


@given(st.data())
def test_tied_weights_belong_to_the_last_block_that_uses_them(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 6))
    sharing = [data.draw(st.integers(0, place)) for place in range(count)]
    model = Tied(sharing)
    pairs = [model.layers, model.biases]
    blocks = find_blocks(model, list(model.parameters()))
    order = [module for part in pairs for module in part]
    for frozen in range(len(blocks.blocks)):
        off = {id(p) for block in blocks.blocks[:frozen] for p in block.parameters}
        active = [m for block in blocks.blocks[frozen:] for m in block.modules]
        for module in active:
            assert not off & {id(p) for p in module.parameters()}
        last = blocks.blocks[frozen - 1].modules[-1]
        below = order[: order.index(last) + 1] if frozen else []
        goes_on = any(id(p) not in off for module in below for p in module.parameters())
        assert blocks.backward_ends(frozen) is not goes_on


def test_tied_embeddings_let_the_backward_pass_go_on() -> None:
    model = BY_NAME["tied-embeddings"].build()
    blocks = blocks_of(model)
    assert model.tokens.weight not in set(blocks.blocks[0].parameters)
    assert [blocks.backward_ends(count) for count in range(3)] == [True, False, False]


def test_the_work_of_a_step() -> None:
    model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 10), nn.Linear(10, 10))
    blocks = blocks_of(model)
    assert [block.work for block in blocks.blocks] == [0, 40, 100]
    assert [blocks.step_work(count) for count in range(3)] == [420, 420, 340]


def test_work_goes_on_below_parameters_of_no_block() -> None:
    model = nn.Sequential(*(nn.Linear(10, 10) for _ in range(4)))
    blocks = blocks_of(model, [model[1], model[2], "3"])
    assert sum(p.numel() for p in blocks.outside) == 110
    assert blocks.step_work(2) == 300 + 2 * 200 + 300


def test_what_was_frozen_from_the_start_is_nobodys() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    blocks = blocks_of(model)
    assert names(blocks) == ["1", "2", "3"]
    assert list(blocks.blocks[1].parameters) == [model[2].bias]
    assert blocks.outside == ()
    assert blocks.fixed_work == 16


def test_what_the_optimizer_does_not_train_is_not_frozen() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    blocks = find_blocks(model, [*model[0].parameters(), *model[2].parameters()])
    assert names(blocks) == ["0", "2"]
    assert {id(p) for p in blocks.outside} == {id(p) for p in model[1].parameters()}


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        (["layers.0", "layers.40"], ValueError, "'layers.40'; did you mean 'layers.4'"),
        (["0"], ValueError, r"named_modules\(\) lists them"),
        (["layers", "layers.2"], ValueError, "'layers.2' and 'layers' overlap"),
        ([nn.Linear(2, 2)], ValueError, "this Linear is no module of the model"),
        ([3], TypeError, "modules or their names, not 3"),
        ("layers.0", TypeError, "not the string 'layers.0'"),
        (["layers.0"], ValueError, r"has 1 block\(s\).*needs two"),
        (["layers.1", "layers.2"], ValueError, r"has 1 block\(s\)"),
    ],
)
def test_wrong_blocks_are_refused(chosen: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        blocks_of(BY_NAME["mlp"].build(), chosen)  # type: ignore[arg-type]


def test_one_layer_cannot_be_frozen() -> None:
    with pytest.raises(ValueError, match=r"Linear has 1 block\(s\)"):
        blocks_of(nn.Linear(2, 2))
