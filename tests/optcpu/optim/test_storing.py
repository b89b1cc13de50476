"""What a module with stored weights says of its state, and which weights it stores."""

from __future__ import annotations

import gc
from collections import OrderedDict

import torch
from torch import Tensor, nn

from optcpu.optim.formats import Format
from optcpu.optim.storing import _export, store_weights
from optcpu.optim.weights import StoredWeight


def tied() -> nn.Sequential:
    """An embedding and a layer with one weight, and a layer of its own."""
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False))
    model[2].weight = model[0].weight
    store_weights(model, model.parameters(), Format.SPLIT)
    return model


def address(state: dict[str, Tensor], name: str) -> int:
    return state[name].untyped_storage().data_ptr()


def test_a_shared_weight_is_one_tensor_in_the_state() -> None:
    model = tied()
    state = model.state_dict()
    assert address(state, "0.weight") == address(state, "2.weight")
    assert address(state, "0.weight") != address(state, "1.weight")


def test_a_later_state_has_tensors_of_its_own() -> None:
    model = tied()
    first, second = model.state_dict(), model.state_dict()
    assert address(first, "0.weight") != address(second, "0.weight")


def test_a_state_that_is_filled_again_has_the_numbers_of_the_moment() -> None:
    model = tied()
    state: OrderedDict[str, Tensor] = OrderedDict()
    before = model.state_dict(destination=state)["0.weight"]
    with torch.no_grad():
        model[0].weight.mul_(2)
    after = model.state_dict(destination=state)["0.weight"]
    assert torch.equal(after, 2 * before)
    assert address(state, "0.weight") == address(state, "2.weight")


def test_a_dictionary_of_the_users_is_filled_too() -> None:
    state = tied().state_dict(destination={})  # type: ignore[call-overload]
    assert torch.equal(state["0.weight"], state["2.weight"])
    assert type(state["0.weight"]) is Tensor


def test_nothing_is_kept_of_a_state_that_is_gone() -> None:
    model = tied()
    gc.collect()
    before = len(_export._made)
    state = model.state_dict()
    assert len(_export._made) == before + 1
    del state
    gc.collect()
    assert len(_export._made) == before


def test_weights_that_their_layer_writes_to_stay_plain() -> None:
    model = nn.Sequential(nn.Embedding(6, 4, max_norm=1.0), nn.Linear(4, 6, bias=False))
    assert store_weights(model, model.parameters(), Format.SPLIT) == []
    assert type(model[0].weight) is nn.Parameter
    assert isinstance(model[1].weight, StoredWeight)
    model[1].weight = model[0].weight  # written to by one of the two
    store_weights(model, model.parameters(), Format.SPLIT)
    assert type(model[1].weight) is nn.Parameter
