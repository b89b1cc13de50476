"""Whatever goes through JSON and tensors comes back the same, bit for bit and type for type."""

from __future__ import annotations

import json
import struct
import types
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from optcpu.optim.formats import Format
from optcpu.optim.weights import StoredWeight
from optcpu.runtime.checkpoint.state import Decoder, Encoder
from optcpu.runtime.checkpoint.tensors import DTYPES

ALL_DTYPES = sorted(
    {
        dtype
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype)
        and not str(dtype).startswith(("torch.q", "torch.bits"))
        # Those of less than a byte have no numbers that could be compared.
        and not (str(dtype)[-1] in "1234567" and "int" in str(dtype) and "16" not in str(dtype))
    },
    key=str,
)


def through(state: Any) -> Any:
    encoder = Encoder()
    text = json.dumps(encoder.encode(state), allow_nan=False)
    assert all(tensor.dtype in DTYPES for tensor in encoder.tensors.values())
    stored = {name: tensor.contiguous().clone() for name, tensor in encoder.tensors.items()}
    return Decoder(stored).decode(json.loads(text))


def bits(value: Any) -> Any:
    """Something that is equal only for what is the same in type, order and bits."""
    kind = type(value)
    if isinstance(value, dict):
        return kind, [(bits(key), bits(entry)) for key, entry in value.items()]
    if kind is deque:
        return kind, value.maxlen, bits(list(value))
    if kind in (list, tuple):
        return kind, [bits(item) for item in value]
    if kind is float:
        return kind, struct.pack(">d", value)
    if kind is Tensor:
        raw = value.contiguous().reshape(-1).view(torch.uint8)
        return kind, value.dtype, value.shape, raw.numpy().tobytes()
    if isinstance(value, (np.ndarray, np.generic)):
        return kind, value.dtype, value.shape, value.tobytes()
    return kind, value


def tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    def random(*shape: int) -> Tensor:
        if dtype == torch.bool:
            return torch.rand(shape) < 0.5
        raw = torch.randint(256, (*shape, dtype.itemsize), dtype=torch.uint8)
        return raw.view(dtype).reshape(shape)

    matrix = random(6, 8)
    return {
        "scalar": random(),
        "empty": random(0, 3),
        "matrix": matrix,
        "transposed": random(4, 5).t(),
        "slice": matrix[1:5:2, 3:],
        "row": matrix[2],
        "expanded": random(1, 3).expand(4, 3),
        "channels_last": random(2, 3, 4, 5).permute(0, 3, 1, 2),
    }


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_tensors_of_any_dtype_and_layout(dtype: torch.dtype) -> None:
    try:
        torch.empty(2, 2, dtype=dtype).t().contiguous()
    except NotImplementedError:
        pytest.skip("this PyTorch cannot copy such tensors")
    state = tensors(dtype)
    back = through(state)
    assert bits(back) == bits(state)
    for name in ("transposed", "channels_last"):
        assert back[name].stride() == state[name].stride()
    assert back["slice"].is_contiguous()


KEYS = st.recursive(
    st.text() | st.integers(), lambda keys: st.lists(keys, max_size=3).map(tuple), max_leaves=4
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**300), max_value=2**300)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(st.characters(codec=None, exclude_categories=()))
    | st.sampled_from(["$dict", "$tensor", "\ud83d\ude00", "\x00"])
    | st.binary()
    | hnp.arrays(
        hnp.scalar_dtypes() | hnp.array_dtypes(),
        hnp.array_shapes(min_dims=0, min_side=0, max_side=3),
    )
    | hnp.from_dtype(np.dtype("float32"))
)


@given(
    st.recursive(
        LEAVES,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.lists(inner, max_size=4).map(tuple)
            | st.dictionaries(KEYS, inner, max_size=4)
            | st.dictionaries(st.sampled_from(["a", "$b", "a.b", "__metadata__"]), inner)
            | st.dictionaries(KEYS, inner, max_size=4).map(OrderedDict)
        ),
        max_leaves=12,
    )
)
def test_nested_state(state: Any) -> None:
    assert bits(through(state)) == bits(state)


@pytest.mark.parametrize(
    "value",
    [
        -0.0,
        5e-324,
        float("-inf"),
        struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0],  # a NaN with a payload
        2**63,
        [-(2**20000)],  # Python refuses to write it in decimals
        True,
        np.float64(0.1),
        np.bool_(True),
        np.str_("x"),
        np.longdouble(1) / 3,
        np.datetime64("2026-01-01T12:00"),
        np.arange(6, dtype=">i2").reshape(2, 3).T,
        np.array(["a", "bcd"]),
        np.zeros(2, [("a", "<i4"), ("b", "<f8", (2,))]),
        np.zeros((0, 3)),
        Counter({3: 1, 7: 2}),  # MultiStepLR keeps its milestones so
        {(0, 1): {0: "a", -1: "b"}, ((1, 2), "x"): None},
        {1: "int", "1": "str", 1.5: "float", float("inf"): "infinity"},
        deque([1.0, torch.ones(2)], maxlen=3),
        deque(),
        {"kept in": torch.bfloat16},
        "a\ud800b",
        {"\udcff": torch.ones(2)},
    ],
)
def test_values_that_are_easily_lost(value: Any) -> None:
    assert bits(through({"value": value})) == bits({"value": value})


def test_the_order_of_an_array_in_memory() -> None:
    back = through(np.arange(6).reshape(2, 3).T)
    assert back.flags.f_contiguous
    assert not back.flags.c_contiguous


def test_the_same_tensor_is_stored_once_and_comes_back_as_one() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    encoder = Encoder()
    state = {"a": weight, "b": [weight.data, weight.view(3, 4)], "part": weight[0]}
    structure = encoder.encode(state)
    assert list(encoder.tensors) == ["a", "part"]
    back = Decoder(encoder.tensors).decode(structure)
    assert back["a"] is back["b"][0] is back["b"][1]


def test_different_views_of_the_same_memory_are_different_tensors() -> None:
    weight = torch.arange(12.0)
    state = {
        "all": weight,
        "first": weight[:6],
        "matrix": weight.view(3, 4),
        "bits": weight.view(torch.int32),
        "none": [torch.empty(0), torch.empty(0, 2)],
        "conjugate": (torch.ones(2) * 1j).conj(),
        "negative": (torch.ones(2) * 1j).conj().imag,
    }
    assert bits(through(state)) == bits(
        {
            key: v.resolve_conj().resolve_neg() if isinstance(v, Tensor) else v
            for key, v in state.items()
        }
    )


def test_parameters_become_plain_tensors() -> None:
    back = through({"w": nn.Parameter(torch.ones(2))})["w"]
    assert type(back) is Tensor
    assert not back.requires_grad


@pytest.mark.parametrize("format", [Format.SPLIT, Format.STOCHASTIC])
def test_stored_weights_become_plain_fp32(format: Format) -> None:
    numbers = torch.randn(4, 5)
    weight = StoredWeight.of(numbers, format)
    state = {"w": nn.Parameter(weight), "again": weight}
    expected = numbers if format == Format.SPLIT else numbers.bfloat16().float()
    assert bits(through(state)) == bits({"w": expected, "again": expected})


def test_tensors_are_named_by_their_path() -> None:
    encoder = Encoder()
    one = torch.ones
    encoder.encode(
        {
            "optimizer": {"state": {3: {"exp_avg": one(1)}}},
            "list": [one(2), (one(3),)],
            "a": {"b": one(4)},
            "a.b": one(5),
            "__metadata__": one(6),
            "\ud800": one(7),
        }
    )
    assert {name: len(tensor) for name, tensor in encoder.tensors.items()} == {
        "optimizer.state[3].exp_avg": 1,
        "list[0]": 2,
        "list[1][0]": 3,
        "a.b": 4,
        "a.b'": 5,
        "__metadata__'": 6,
        "?": 7,
    }


class Tagged(Tensor):
    pass


ITSELF: list[Any] = []
ITSELF.append(ITSELF)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"optimizer": {"state": {3: {"foo": print}}}},
            r"^optimizer\.state\[3\]\.foo is a builtin_",
        ),
        ({"a": [1, {2}]}, r"^a\[1\] is a set, which a checkpoint cannot hold: it takes None"),
        ({"a": (types, 1)}, r"^a\[0\] is a module"),
        (print, r"^the state is a builtin_function"),
        ({"a": defaultdict(int)}, r"^a is a defaultdict"),
        ({"a": namedtuple("Point", "x")(1)}, r"^a is a Point"),
        ({"a": torch.Size([1])}, r"^a is a Size"),
        ({"a": 1j}, r"^a is a complex"),
        ({"a": np.array([None])}, r"^a is a ndarray of dtype object"),
        ({"a": np.ma.masked_array([1])}, r"^a is a MaskedArray"),
        ({"a": torch.ones(2).as_subclass(Tagged)}, r"^a is a Tagged"),
        ({"a": torch.ones(2, 2).to_sparse()}, r"^a is a tensor on cpu \(torch\.sparse_coo\)"),
        ({"a": torch.ones(2, device="meta")}, r"^a is a tensor on meta"),
        ({"a": {b"1": 0}}, r"^a has the key b'1', a bytes; a checkpoint holds dicts whose keys"),
        ({"a": {True: 0}}, r"^a has the key True, a bool"),
        ({"a": {(1, None): 0}}, r"^a has the key \(1, None\), a tuple"),
        (
            {"a": ITSELF},
            r"^a(\[0\]){7}\.\.\. is nested more than 100 deep; does it contain itself\?",
        ),
    ],
)
def test_what_cannot_be_stored_is_named_with_its_place(state: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Encoder().encode(state)


@pytest.mark.parametrize(
    "structure",
    [
        {"$tensor": "missing"},
        {"$tensor": ["t"]},
        {"$tensor": "t", "dtype": "save", "shape": [1]},
        {"$tensor": "t", "dtype": "complex128", "shape": [10**15]},
        {"$tensor": "t", "stride": [10**15]},
        {"$tensor": "t", "stride": [1, 1]},
        {"$array": "t", "dtype": "<f8", "shape": [10**15], "order": "C"},
        {"$array": "t", "dtype": "|O", "shape": [1], "order": "C"},
        {"$array": "t", "dtype": "rubbish", "shape": [1], "order": "C"},
        {"$scalar": "", "dtype": "<f8"},
        {"$scalar": "AAAAAAAAAAA=", "dtype": "|O"},
        {"$array": "t", "dtype": [{"$tuple": ["a", "|O"]}], "shape": [1], "order": "C"},
        {"$tensor": "t", "stride": [10**30]},
        {"$int": 5},
        {"$float": "00"},
        {"$bytes": "%"},
        {"$dict": [[{"$dict": []}, 1]]},
        {"$dict": [[1]]},
        {"$tuple": 3},
        {"$pickle": "gASVAAAA"},
    ],
    ids=str,
)
def test_a_structure_that_was_not_made_here_is_refused(structure: Any) -> None:
    raw = torch.zeros(16, dtype=torch.uint8)
    with pytest.raises(ValueError):  # noqa: PT011
        Decoder({"t": raw}).decode([structure])
