"""One checkpoint: a folder of plain files, each with its checksum.

=======================  ==========================================================================
``model.safetensors``    the tensors of ``state["model"]`` under their own names, for anyone to load
``tensors.safetensors``  all other tensors, named by their path in the state
``state.json``           everything else, and which tensor belongs where (:mod:`.state`)
``manifest.json``        format, step, and size and SHA-256 of each of the others, and of itself
=======================  ==========================================================================

Nothing in them is executed. Of tied weights ``model.safetensors`` holds one and names the others in its
metadata, as :func:`safetensors.torch.save_model` does, so that :func:`safetensors.torch.load_model` takes
it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError, field_validator
from torch import Tensor

from optcpu.errors import OptcpuError
from optcpu.runtime.checkpoint.state import Decoder, Encoder
from optcpu.runtime.checkpoint.tensors import RESERVED_NAME, file_content, read_file

FORMAT = 1

_MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 2**16
_HASHED_AT_ONCE = 2**20  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """What was loaded.

    Attributes:
        step: the step it was saved at.
        state: as it was saved.
        path: the folder it came from.
    """

    step: int
    state: dict[str, Any]
    path: Path


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class FileEntry(_Strict):
    """Size and SHA-256 of a file."""

    bytes: NonNegativeInt
    sha256: str


class Manifest(_Strict):
    """What a checkpoint consists of.

    Attributes:
        format: the version of the format.
        step: of the training run.
        number: larger for what was saved later in the same place.
        time: when it was saved, ISO 8601, UTC; for people.
        files: by name. Other names than these are refused, so that none leads out of the folder.
    """

    format: Literal[1]
    step: NonNegativeInt
    number: NonNegativeInt
    time: str
    files: dict[Literal["model.safetensors", "tensors.safetensors", "state.json"], FileEntry]

    @field_validator("files")
    @classmethod
    def _complete(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        if len(files) < 3:
            raise ValueError(f"it names {', '.join(files) or 'no file'} only")
        return files


class Contents:
    """State, taken apart into what goes into which file; shares the memory of its tensors.

    Raises:
        TypeError: it holds something that a checkpoint cannot hold; the message names where.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        encoder = Encoder()
        model = state.get("model")
        # First, so that what is tied to a weight refers to it, not the other way round.
        names = {
            key: encoder.encode(value, ("model", key))["$tensor"]
            for key, value in (model.items() if isinstance(model, dict) else ())
            if isinstance(key, str) and isinstance(value, Tensor)
        }
        self.structure = encoder.encode(state)
        self.tensors = encoder.tensors
        own = {f"model.{key}" for key in names if key != RESERVED_NAME}.intersection(names.values())
        self.weights = {name.removeprefix("model."): self.tensors.pop(name) for name in sorted(own)}
        self.tied = {
            key: name.removeprefix("model.")
            for key, name in names.items()
            if name in own and name != f"model.{key}"
        }

    @property
    def size(self) -> int:
        """Of all tensors, in bytes."""
        tensors = (*self.weights.values(), *self.tensors.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def write(self, folder: Path, step: int, number: int) -> None:
        """Write all files of a checkpoint into an empty folder, and wait until they are on the disk.

        Raises:
            OSError: they cannot be written.
        """
        text = json.dumps(self.structure, allow_nan=False).encode()
        files = {"state.json": write_file(folder / "state.json", [text])}
        for name, tensors, metadata in (
            ("model.safetensors", self.weights, {**self.tied, "format": "pt"}),
            ("tensors.safetensors", self.tensors, {"format": "pt"}),
        ):
            files[name] = write_file(folder / name, file_content(tensors, metadata))
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        manifest = Manifest.model_validate(
            {"format": FORMAT, "step": step, "number": number, "time": time, "files": files}
        )
        write_file(folder / _MANIFEST, [_sealed(manifest)])
        sync_folder(folder)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check a checkpoint's files against its manifest, and load them.

    Raises:
        OptcpuError: it is damaged; the message says what is wrong, without naming the folder.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        _verify(folder / name, entry)
    try:
        structure = json.loads((folder / "state.json").read_bytes())
        tensors = read_file(folder / "tensors.safetensors")
        weights = read_file(folder / "model.safetensors")
        tensors |= {f"model.{name}": weight for name, weight in weights.items()}
        state = Decoder(tensors).decode(structure)
    except (OSError, ValueError, RecursionError) as error:
        raise OptcpuError(f"its files do not fit together: {error}") from error
    if not isinstance(state, dict):
        raise OptcpuError("state.json holds no state")
    return Checkpoint(manifest.step, state, folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        OptcpuError: there is none, or it is damaged or of another format.
    """
    path = folder / _MANIFEST
    try:
        if not path.is_file():  # opening a pipe would block
            raise OptcpuError(f"{_MANIFEST} is missing")
        with path.open("rb") as file:
            found = json.loads(file.read(_MAX_MANIFEST_BYTES))
    except OSError as error:
        raise OptcpuError(f"{_MANIFEST} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise OptcpuError(f"{_MANIFEST} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise OptcpuError(f"{_MANIFEST} is no manifest")
    if found.get("format") != FORMAT:
        raise OptcpuError(
            f"{_MANIFEST} is of format {found.get('format')!r}, and this version of optcpu reads "
            f"format {FORMAT}"
        )
    digest = found.pop("sha256", None)
    try:
        manifest = Manifest.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise OptcpuError(f"{_MANIFEST} is malformed ({place}: {first['msg']})") from error
    if digest != _digest(manifest):
        raise OptcpuError(f"{_MANIFEST} does not match its own checksum")
    return manifest


def write_file(path: Path, content: Iterable[bytes | memoryview]) -> FileEntry:
    """Write a new file and wait until it is on the disk.

    Raises:
        OSError: it cannot be written.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for piece in content:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(bytes=size, sha256=digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


def _verify(path: Path, entry: FileEntry) -> None:
    """Raise :class:`OptcpuError` unless a file is what the manifest says it is."""
    try:
        if not path.is_file():
            raise OptcpuError(f"{path.name} is missing")
        digest, size = hashlib.sha256(), path.stat().st_size
        if size != entry.bytes:
            raise OptcpuError(f"{path.name} has {size} bytes, not {entry.bytes}")
        with path.open("rb") as file:
            while piece := file.read(_HASHED_AT_ONCE):
                digest.update(piece)
    except OSError as error:
        raise OptcpuError(f"{path.name} cannot be read ({error.strerror})") from error
    if digest.hexdigest() != entry.sha256:
        raise OptcpuError(f"{path.name} does not match its checksum")


def _sealed(manifest: Manifest) -> bytes:
    content = {**manifest.model_dump(), "sha256": _digest(manifest)}
    return json.dumps(content, indent=2).encode()


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(json.dumps(manifest.model_dump(), sort_keys=True).encode()).hexdigest()
