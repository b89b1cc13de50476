"""Text as memory-mapped tokens: written once, read from any place by any number of processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from optcpu.errors import OptcpuError
from optcpu.files import path_for
from optcpu.runtime.data.datasets import resolved_indices

AnyPath = str | PathLike[str]
Encode = Callable[[str], Sequence[int]]

_DTYPES = tuple(np.dtype(name) for name in ("uint8", "uint16", "int32", "uint32", "int64"))
_PIECE = 1 << 20  # characters, or bytes


class TokenDataset(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a stream of tokens, for next-token prediction.

    A file is memory-mapped when the first window is read, in each process by itself: what is read is
    shared by all, nothing is held, and copies that go to worker processes carry the path alone.

    Args:
        source: a ``.npy`` file with one dimension, a file of bare numbers, or a tensor ``[n]``.
        length: tokens in a window.
        stride: distance between the beginnings of windows; None is ``length``: no overlap.
        dtype: of a file of bare numbers, as in ``"uint16"`` (the default); a ``.npy`` file tells its own.
        vocab_size: where given, a token beyond it is an error where it is read.

    Raises:
        OptcpuError: the file is missing, damaged, of another kind, or too short for one window.
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        source: AnyPath | Tensor,
        length: int,
        *,
        stride: int | None = None,
        dtype: npt.DTypeLike | None = None,
        vocab_size: int | None = None,
    ) -> None:
        stride = length if stride is None else stride
        for name, value in {"length": length, "stride": stride, "vocab_size": vocab_size}.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        self.length = length
        self.stride = stride
        self.vocab_size = vocab_size
        self._tokens: npt.NDArray[Any] | Tensor | None = None
        self._dtype = dtype
        if isinstance(source, Tensor):
            if source.ndim != 1 or source.is_floating_point() or source.is_complex():
                raise TypeError(
                    f"tokens must be integers in one dimension, got {source.dtype} in {source.ndim}"
                )
            if dtype is not None:
                raise TypeError("dtype is for files: a tensor has its own")
            self.source: Path | Tensor = source
        else:
            self.source = Path(source).absolute()  # workers may change directory
        self.token_count = len(self._open())
        self.size = (self.token_count - 1 - length) // stride + 1
        if self.token_count <= length:
            raise OptcpuError(
                f"{self._name()} has {self.token_count} tokens, but a window takes {length + 1} (length "
                f"{length} and the token after it); remedy: more text or a smaller length"
            )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each ``[length]`` int64; the targets are the inputs one token later.

        Raises:
            IndexError: there is no such window.
            OptcpuError: a token is beyond the vocabulary.
        """
        inputs, targets = self.batch([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The windows of a batch, read together."""
        inputs, targets = self.batch(indices)
        return list(zip(inputs.unbind(), targets.unbind(), strict=True))

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of ``n`` windows, each ``[n, length]`` int64.

        Raises:
            IndexError: there is no such window.
            OptcpuError: a token is beyond the vocabulary.
        """
        starts = resolved_indices(indices, self.size) * self.stride
        places = starts[:, None] + np.arange(self.length + 1)
        tokens = self._open()
        if isinstance(tokens, Tensor):
            windows = tokens[torch.from_numpy(places)].long()
        else:
            windows = torch.from_numpy(tokens[places].astype(np.int64))
        if self.vocab_size is not None and len(windows):
            self._check_vocabulary(windows, places, self.vocab_size)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokens": None}

    def _open(self) -> npt.NDArray[Any] | Tensor:
        if self._tokens is None:
            self._tokens = (
                self.source
                if isinstance(self.source, Tensor)
                else np.asarray(_mapped(self.source, self._dtype))
            )
        return self._tokens

    def _name(self) -> str:
        return "the tensor" if isinstance(self.source, Tensor) else str(self.source)

    def _check_vocabulary(
        self, windows: Tensor, places: npt.NDArray[np.int64], vocab_size: int
    ) -> None:
        wrong = (windows < 0) | (windows >= vocab_size)
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise OptcpuError(
                f"token {int(windows[row, column])} at position {places[row, column]} of {self._name()} is "
                f"not in 0..{vocab_size - 1}; remedy: the vocabulary size of the tokenizer that wrote it"
            )


def tokenize_files(
    paths: AnyPath | Iterable[AnyPath],
    output: AnyPath,
    tokenizer: Any = "bytes",
    *,
    vocab_size: int | None = None,
    separator: int | None = None,
) -> Path:
    """Write text files, one after the other, as tokens to a ``.npy`` file for :class:`TokenDataset`.

    Text goes through in pieces of a million characters that end at the end of a line where there is one,
    so that memory stays small. ``output`` appears only once it is complete.

    Args:
        paths: one text file, or several; UTF-8 (bytes that are not become U+FFFD) unless the tokens are
            bytes.
        output: the file to write.
        tokenizer: ``"bytes"``; an object with ``encode(text)`` as in the ``tokenizers`` library; or a
            function from text to token ids.
        vocab_size: number of different tokens; None asks the tokenizer, else allows any. The file is
            uint8, uint16 or uint32, the first that has room for them.
        separator: a token to put behind each file.

    Returns:
        The path written to.

    Raises:
        OptcpuError: a file cannot be read, there is no text, a token is not in the vocabulary, or
            ``output`` cannot be written.
        TypeError: the tokenizer is of a wrong type.
        ValueError: ``output`` has another suffix than ``.npy``, or ``separator`` is not in the vocabulary.
    """
    target = path_for(output, "tokenize_files", "an array of tokens", ".npy").with_suffix(".npy")
    sources = [Path(paths)] if isinstance(paths, (str, PathLike)) else [Path(p) for p in paths]
    encode, vocab_size = _encoder(tokenizer, vocab_size)
    if separator is not None and not 0 <= separator < vocab_size:
        raise ValueError(f"separator must be in 0..{vocab_size - 1}, got {separator}")
    dtype = next(d for d in map(np.dtype, ("u1", "u2", "u4")) if vocab_size <= np.iinfo(d).max + 1)
    pieces = _token_pieces(sources, encode, vocab_size, separator)
    # In the same folder, so that it can be moved into place; nobody ever finds half a file.
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            count = _write_array(file, pieces, dtype)
            if count:
                file.flush()
                os.fsync(file.fileno())
                os.replace(draft, target)
    except OSError as error:
        raise OptcpuError(
            f"cannot write {target}: {error.strerror}; remedy: another output, with room for the tokens"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # in place already, or never made
            draft.unlink()
    if not count:
        raise OptcpuError(f"there is no text in {', '.join(map(str, sources)) or 'no files'}")
    return target


def _write_array(file: BinaryIO, pieces: Iterable[npt.NDArray[Any]], dtype: np.dtype[Any]) -> int:
    """Write an array in NumPy's format piece by piece; returns its length."""
    count = 0
    _write_header(file, count, dtype)
    begin = file.tell()
    for piece in pieces:
        file.write(piece.astype(dtype).data)
        count += len(piece)
    file.seek(0)
    _write_header(file, count, dtype)  # NumPy leaves room for the length to grow
    assert file.tell() == begin, "the header has grown into the data"
    return count


def _write_header(file: BinaryIO, count: int, dtype: np.dtype[Any]) -> None:
    header = {"descr": dtype.newbyteorder("<").str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)


def _encoder(tokenizer: Any, vocab_size: int | None) -> tuple[Encode | None, int]:
    """From text to ids (None for bytes), and the number of different ids."""
    largest = 1 << 32
    if vocab_size is not None and not 1 <= vocab_size <= largest:
        raise ValueError(f"vocab_size must be in 1..2**32, got {vocab_size}")
    if isinstance(tokenizer, str):
        if tokenizer != "bytes":
            raise ValueError(
                f'tokenizer must be "bytes", a function or an object with encode(), got {tokenizer!r}'
            )
        return None, vocab_size or 256
    if hasattr(tokenizer, "get_vocab_size"):
        vocab_size = vocab_size or tokenizer.get_vocab_size()
    encode = getattr(tokenizer, "encode", tokenizer)
    if not callable(encode):
        raise TypeError(
            'tokenizer must be "bytes", a function from text to ids or an object with encode(), not '
            f"{type(tokenizer).__name__}"
        )

    def ids(text: str) -> Sequence[int]:
        result = encode(text)
        found: Sequence[int] = getattr(result, "ids", result)
        return found

    return ids, vocab_size or largest


def _token_pieces(
    sources: Sequence[Path], encode: Encode | None, vocab_size: int, separator: int | None
) -> Iterator[npt.NDArray[Any]]:
    for source in sources:
        written = 0
        for piece in _bytes_of(source) if encode is None else _encoded(source, encode):
            if len(piece) and not 0 <= int(piece.min()) <= int(piece.max()) < vocab_size:
                wrong = piece[(piece < 0) | (piece >= vocab_size)][0]
                raise OptcpuError(
                    f"the tokenizer made token {wrong} of {source}, which is not in 0..{vocab_size - 1}; "
                    "remedy: the vocab_size of that tokenizer"
                )
            written += len(piece)
            yield piece
        if separator is not None and written:
            yield np.array([separator])


def _bytes_of(source: Path) -> Iterator[npt.NDArray[Any]]:
    with _opened(source) as file:
        while piece := file.read(_PIECE):
            yield np.frombuffer(piece, dtype=np.uint8)


def _encoded(source: Path, encode: Encode) -> Iterator[npt.NDArray[Any]]:
    with _opened(source, encoding="utf-8", errors="replace", newline="") as file:
        while piece := file.read(_PIECE):
            piece += file.readline(_PIECE)
            ids = np.asarray(encode(piece))
            if ids.ndim != 1 or (len(ids) and not np.issubdtype(ids.dtype, np.integer)):
                raise TypeError(
                    "the tokenizer must give a list of integers, "
                    f"not {ids.dtype} in {ids.ndim} dimensions"
                )
            yield ids


@contextlib.contextmanager
def _opened(source: Path, **text: Any) -> Iterator[Any]:
    try:
        with open(source, "r" if text else "rb", **text) as file:
            yield file
    except OSError as error:
        raise OptcpuError(f"cannot read {source}: {error.strerror}") from error


def _mapped(path: Path, dtype: npt.DTypeLike | None) -> npt.NDArray[Any]:
    try:
        if path.suffix.lower() == ".npy":
            tokens: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            tokens = np.memmap(path, dtype=dtype or np.uint16, mode="r")
    except FileNotFoundError as error:
        raise OptcpuError(
            f"there is no file {path}; remedy: write one with tokenize_files()"
        ) from error
    except (OSError, ValueError, EOFError) as error:
        raise OptcpuError(
            f"cannot read tokens from {path}: {error}. Remedy: write the file anew with tokenize_files(), "
            "or give one that is complete"
        ) from error
    if path.suffix.lower() == ".npy" and dtype is not None and tokens.dtype != np.dtype(dtype):
        raise OptcpuError(f"{path} holds {tokens.dtype}, not {np.dtype(dtype)}: leave dtype out")
    if tokens.ndim != 1 or tokens.dtype not in _DTYPES:
        names = ", ".join(map(str, _DTYPES))
        raise OptcpuError(
            f"{path} holds {tokens.dtype} in {tokens.ndim} dimensions; tokens are one of {names}, in one"
        )
    return tokens
