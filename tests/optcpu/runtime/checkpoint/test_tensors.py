from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from optcpu.runtime.checkpoint.tensors import DTYPES, file_content, read_file


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.write_bytes(b"".join(file_content(tensors, metadata or {})))
    return path


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(6).view(2, 3).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3, dtype=torch.int8), "empty": torch.empty(0, 4)}
    tensors |= {
        "transposed": torch.randn(3, 4).t(),
        "sliced": torch.randn(9)[1::2],
        "ä\n": torch.ones(1),
    }
    path = write(tmp_path / "a.safetensors", tensors, {"format": "pt", "\ud800": "x"})
    for read in (load_file, read_file):
        back = read(path)
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert back[name].dtype == tensor.dtype
            assert torch.equal(back[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "?": "x"}


def test_tensors_lie_aligned_in_the_file(tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(3, dtype=torch.int8),
        "b": torch.ones(3),
        "c": torch.ones(1).double(),
    }
    back = load_file(write(tmp_path / "a.safetensors", tensors))  # a view of the mapped file
    assert all(
        back[name].data_ptr() % tensor.element_size() == 0 for name, tensor in tensors.items()
    )


def test_no_tensors_at_all(tmp_path: Path) -> None:
    assert read_file(write(tmp_path / "a.safetensors", {})) == {}


def test_what_is_read_stays_when_the_file_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a": torch.ones(1000)})
    back = read_file(path)
    with path.open("r+b") as file:
        file.seek(-4000, 2)
        file.write(bytes(4000))
    assert torch.equal(back["a"], torch.ones(1000))
    assert back["a"].untyped_storage().nbytes() == 4000


def test_contiguous_tensors_are_not_copied() -> None:
    tensor = torch.ones(1000)
    pieces = file_content({"a": tensor}, {})
    next(pieces)
    data = next(pieces)
    tensor.zero_()
    assert bytes(data) == bytes(4000)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x02",
        (2**60).to_bytes(8, "little") + b"{}",
        (3).to_bytes(8, "little") + b"{}}",
        b'\x3a\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[9999999],"data_offsets":[0,4]}}',
    ],
)
def test_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"^no complete safetensors file \(.+\)"):
        read_file(tmp_path / "a.safetensors")


def test_too_many_tensors_for_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optcpu.runtime.checkpoint.tensors._MAX_HEADER_BYTES", 1000)
    with pytest.raises(
        ValueError, match=r"^100 tensors are more than one safetensors file can hold"
    ):
        next(file_content({str(index): torch.ones(1) for index in range(100)}, {}))
