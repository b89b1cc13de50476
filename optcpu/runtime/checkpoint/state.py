"""Nested state as JSON and named tensors, and back: bit for bit, type for type, without pickle.

What JSON has stays as it is. Everything else is an object of one entry whose name begins with ``$``:

======================================  ==================================================
``{"$tuple": [...]}``                   a tuple
``{"$dict": [[key, value], ...]}``      a dict with keys that are not plain strings; likewise
                                        ``$OrderedDict`` and ``$Counter``
``{"$deque": [...], "maxlen": ...}``    a deque
``{"$dtype": "bfloat16"}``              a dtype of PyTorch
``{"$int": "0x..."}``                   an int beyond 63 bits
``{"$float": "7ff8000000000000"}``      NaN or infinity: the bits of the double
``{"$str": ...}``, ``{"$bytes": ...}``  base64: text that is no valid Unicode, and bytes
``{"$tensor": name}``                   a tensor; with ``stride`` if its memory order is not the usual
                                        one, with ``dtype`` and ``shape`` if stored as raw bytes
``{"$array": name, ...}``               a NumPy array: its ``dtype``, ``shape`` and ``order``
``{"$scalar": base64, "dtype": ...}``   a NumPy scalar
======================================  ==================================================
"""

from __future__ import annotations

import base64
import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from optcpu.optim.weights import StoredWeight
from optcpu.runtime.checkpoint.tensors import DTYPES, RESERVED_NAME

Json = Any
Path = tuple[object, ...]  # the keys and indices that lead to a value

_MAPPINGS: dict[str, type[dict[Any, Any]]] = {
    "$dict": dict,
    "$OrderedDict": OrderedDict,
    "$Counter": Counter,
}
_TAG_OF = {kind: tag for tag, kind in _MAPPINGS.items()}
_MAX_DEPTH = 100
# What decoding raises, besides ValueError, where the structure is not what it should be.
_MALFORMED = (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, struct.error)


class Encoder:
    """Turns state into a structure for JSON, and collects its tensors.

    A tensor or array that is met again, as the same object or as the same memory looked at in the same
    way (tied weights), is stored once, and comes back as one. Tensors come back as plain ones without
    gradient, on the CPU, with the strides they had if they are dense. Those of dtypes that safetensors
    lacks are stored as bytes. A :class:`StoredWeight` is stored, and comes back, as plain FP32.

    Attributes:
        tensors: by name, which is the path to where each was met first, as ``optimizer.state[3].exp_avg``.
            They share memory with the state.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[object, Json] = {}  # by identity, and by place in memory
        self._alive: list[Tensor] = []  # so that no place is used twice

    def encode(self, value: Any, path: Path = ()) -> Json:
        """``value`` as what :func:`json.dumps` takes.

        Args:
            value: dicts with keys that are strings, numbers or tuples of such; lists, tuples, deques,
                None, bools, ints, floats, strings, bytes, dtypes, tensors, NumPy arrays and scalars,
                nested at will.
            path: the keys that lead to it, for names and messages.

        Raises:
            TypeError: it holds something else; the message names where.
        """
        if len(path) > _MAX_DEPTH:
            raise TypeError(
                f"{joined(path[:8])}... is nested more than {_MAX_DEPTH} deep; does it contain itself?"
            )
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is int:
            return value if value.bit_length() < 64 else {"$int": hex(value)}
        if kind is float:
            return value if np.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
        if kind is str:
            return _text(value)
        if kind is bytes:
            return {"$bytes": _base64(value)}
        if kind is list:
            return [self.encode(item, (*path, index)) for index, item in enumerate(value)]
        if kind is tuple:
            return {"$tuple": self.encode(list(value), path)}
        if kind is deque:
            return {"$deque": self.encode(list(value), path), "maxlen": value.maxlen}
        if kind is torch.dtype:
            return {"$dtype": str(value).removeprefix("torch.")}
        if kind in _TAG_OF:
            return self._mapping(value, path)
        if id(value) in self._known:
            return self._known[id(value)]
        if isinstance(value, Tensor):
            self._known[id(value)] = self._tensor(value, path)
        elif kind is np.ndarray:
            self._known[id(value)] = self._array(value, path)
        elif isinstance(value, np.generic):
            return self._scalar(value, path)
        else:
            _refuse(value, path)
        return self._known[id(value)]

    def _mapping(self, mapping: dict[Any, Any], path: Path) -> Json:
        tag = _TAG_OF[type(mapping)]
        if tag == "$dict" and all(_is_plain_key(key) for key in mapping):
            return {key: self.encode(value, (*path, key)) for key, value in mapping.items()}
        return {
            tag: [
                [self._key(key, path), self.encode(value, (*path, key))]
                for key, value in mapping.items()
            ]
        }

    def _key(self, key: object, path: Path) -> Json:
        if not _is_key(key):
            raise TypeError(
                f"{joined(path)} has the key {key!r}, {_a(key)}; a checkpoint holds dicts whose keys are "
                "strings, numbers or tuples of them"
            )
        return self.encode(key, path)

    def _tensor(self, tensor: Tensor, path: Path) -> Json:
        if isinstance(tensor, StoredWeight):
            tensor = tensor.full()
        if type(tensor) not in (Tensor, nn.Parameter):
            _refuse(tensor, path)
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            kind = "quantized" if tensor.is_quantized else str(tensor.layout)
            raise TypeError(
                f"{joined(path)} is a tensor on {tensor.device} ({kind}); a checkpoint holds dense "
                "tensors on the CPU: call .cpu(), .to_dense() or .dequantize() first"
            )
        tensor = tensor.detach().resolve_conj().resolve_neg()
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in self._known:
            return self._known[place]
        self._alive.append(tensor)
        entry: dict[str, Json] = {}
        stride = _own_stride(tensor)
        if stride is not None:
            entry["stride"] = list(stride)
        if tensor.dtype not in DTYPES:
            entry |= {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
            }
            tensor = tensor.contiguous().reshape(-1).view(torch.uint8)
        self._known[place] = {"$tensor": self._keep(tensor, path), **entry}
        return self._known[place]

    def _array(self, array: np.ndarray[Any, Any], path: Path) -> Json:
        dtype = self._dtype(array.dtype, array, path)
        order: Literal["F", "C"] = "F" if array.flags.fnc else "C"
        content = bytearray(array.tobytes(order))
        raw = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0).byte()
        name = self._keep(raw, path)
        return {"$array": name, "dtype": dtype, "shape": list(array.shape), "order": order}

    def _scalar(self, scalar: np.generic, path: Path) -> Json:
        array = np.asarray(scalar)
        if array.dtype.type is not type(scalar):
            _refuse(scalar, path)
        dtype = self._dtype(array.dtype, scalar, path)
        return {"$scalar": _base64(array.tobytes()), "dtype": dtype}

    def _dtype(self, dtype: np.dtype[Any], value: object, path: Path) -> Json:
        if dtype.hasobject:
            _refuse(value, path, f"{_a(value)} of dtype {dtype}")
        return self.encode(np.lib.format.dtype_to_descr(dtype), path)

    def _keep(self, tensor: Tensor, path: Path) -> str:
        name = joined(path).encode("utf-8", "replace").decode()
        while name in self.tensors or name == RESERVED_NAME:
            name += "'"
        self.tensors[name] = tensor
        return name


class Decoder:
    """Undoes :class:`Encoder`.

    Args:
        tensors: by name. They become part of the state as they are.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._made: dict[str, Any] = {}

    def decode(self, structure: Json) -> Any:
        """The state.

        Raises:
            ValueError: the structure was not made by :class:`Encoder`, or does not fit the tensors.
        """
        if isinstance(structure, list):
            return [self.decode(item) for item in structure]
        if not isinstance(structure, dict):
            return structure
        tag = next(iter(structure), "")
        if not tag.startswith("$"):
            return {key: self.decode(value) for key, value in structure.items()}
        try:
            return self._tagged(tag, structure[tag], structure)
        except _MALFORMED as error:
            raise ValueError(f"{tag} {str(structure[tag])[:80]!r}: {error}") from error

    def _tagged(self, tag: str, content: Json, structure: dict[str, Json]) -> Any:
        if tag == "$tuple":
            return tuple(self.decode(content))
        if tag == "$deque":
            return deque(self.decode(content), structure["maxlen"])
        if tag == "$dtype":
            return _dtype_of_torch(content)
        if tag in _MAPPINGS:
            return _MAPPINGS[tag]({self.decode(key): self.decode(value) for key, value in content})
        if tag == "$int":
            return int(content, 16)
        if tag == "$float":
            return struct.unpack(">d", bytes.fromhex(content))[0]
        if tag == "$str":
            return _bytes(content).decode("utf-8", "surrogatepass")
        if tag == "$bytes":
            return _bytes(content)
        if tag == "$scalar":
            return np.ndarray((), self._dtype(structure), _bytes(content)).copy()[()]
        if tag not in ("$tensor", "$array"):
            raise TypeError("unknown to this version of optcpu")
        if content not in self._made:
            make = self._tensor if tag == "$tensor" else self._array
            self._made[content] = make(self._tensors[content], structure)
        return self._made[content]

    def _tensor(self, tensor: Tensor, structure: dict[str, Json]) -> Tensor:
        if "dtype" in structure:
            dtype = _dtype_of_torch(structure["dtype"])
            tensor = tensor.view(dtype).reshape(structure["shape"])
        return _with_stride(tensor, structure["stride"]) if "stride" in structure else tensor

    def _array(self, raw: Tensor, structure: dict[str, Json]) -> np.ndarray[Any, Any]:
        array: np.ndarray[Any, Any] = np.ndarray(
            structure["shape"], self._dtype(structure), raw.numpy(), order=structure["order"]
        )
        own: np.ndarray[Any, Any] = array.copy("K")
        return own

    def _dtype(self, structure: dict[str, Json]) -> np.dtype[Any]:
        dtype: np.dtype[Any] = np.lib.format.descr_to_dtype(self.decode(structure["dtype"]))
        if dtype.hasobject:  # its bytes would be taken for addresses
            raise TypeError(f"dtype {dtype} holds objects")
        return dtype


def _dtype_of_torch(name: str) -> torch.dtype:
    dtype = vars(torch).get(name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is no dtype")
    return dtype


def joined(path: Path) -> str:
    """A path as one would write it: ``optimizer.state[3].exp_avg``."""
    if not path:
        return "the state"
    parts = (f".{key}" if isinstance(key, str) else f"[{key!r}]" for key in path)
    return "".join(parts).removeprefix(".")


def _refuse(value: object, path: Path, what: str | None = None) -> NoReturn:
    raise TypeError(
        f"{joined(path)} is {what or _a(value)}, which a checkpoint cannot hold: it takes None, bools, "
        "numbers, strings, bytes, dtypes, dense tensors on the CPU, NumPy arrays, and dicts, lists, tuples "
        "and deques of them"
    )


def _a(value: object) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def _is_key(key: object) -> bool:
    if type(key) is tuple:
        return all(_is_key(part) for part in key)
    return type(key) in (str, int, float)


def _is_plain_key(key: object) -> bool:
    return type(key) is str and not key.startswith("$") and isinstance(_text(key), str)


def _text(text: str) -> Json:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates, as in file names that are not UTF-8
        return {"$str": _base64(text.encode("utf-8", "surrogatepass"))}
    return text


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _own_stride(tensor: Tensor) -> tuple[int, ...] | None:
    """The strides of a dense tensor that is not in row-major order, say channels last; else None.

    They are worth keeping, since in which order a kernel sums may depend on them.
    """
    if tensor.stride() == torch.empty(tensor.shape, device="meta").stride():
        return None
    dense = tensor.permute(_slowest_first(tensor.stride())).is_contiguous()
    return tensor.stride() if dense and tensor.numel() else None


def _with_stride(tensor: Tensor, stride: list[int]) -> Tensor:
    """The same numbers in another order in memory; fails if they are not as many there."""
    return tensor.permute(_slowest_first(stride)).contiguous().as_strided(tensor.shape, stride)


def _slowest_first(stride: list[int] | tuple[int, ...]) -> list[int]:
    return sorted(range(len(stride)), key=lambda dim: -stride[dim])
