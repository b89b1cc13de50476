"""Named tensors as a safetensors file.

The file is what :func:`safetensors.torch.save_file` writes: the length of a JSON header (8 bytes, little
endian), the header, the numbers. It is written here since tensors then go out one after the other,
hashed on their way and copied only if they are not contiguous, and since a full disk is then told as
such. It is read by the library, which checks the header.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# Those that every release of safetensors can read.
DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
RESERVED_NAME = "__metadata__"

_MAX_HEADER_BYTES = 100_000_000  # the library refuses to read more
_ALIGNMENT = 8  # bytes; of the first number, as the library has it


def file_content(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """What the file consists of, in pieces: the header, then each tensor.

    Args:
        tensors: of the dtypes in :data:`DTYPES`, on the CPU, of any strides. They must not change
            before the last piece was taken.
        metadata: what else the header says.

    Raises:
        ValueError: there are too many for one file.
    """
    # Larger items first, so that each tensor lies at a multiple of its item's size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, object] = {RESERVED_NAME: dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > _MAX_HEADER_BYTES:
        raise ValueError(f"{len(tensors)} tensors are more than one safetensors file can hold")
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, each in memory of its own.

    Raises:
        ValueError: this is no safetensors file, or not a complete one.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # What the library gives lies in the mapped file, wherever that puts it. Copies are
            # aligned as any tensor, so that kernels do with them what they did before.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"no complete safetensors file ({error})") from error
