"""Real data that is on every machine: nothing here is downloaded.

- :func:`digits`: the 8x8 handwritten digits that come with scikit-learn.
- :func:`code_corpus`: the source of the Python standard library as a stream of tokens.
- :func:`source_windows`: pieces of that source, labelled with the file they come from.

The standard library is the one of the running interpreter, so its text (and every loss measured on
it) differs between Python versions; within one installation it is the same in every run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from optcpu.errors import OptcpuError

GPT2_VOCAB_SIZE = 50257
_BYTE_VALUES = 256
_INSTALLED_PACKAGES = {"site-packages", "dist-packages"}
_TESTS = {"test", "tests", "idle_test"}


Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Digits:
    """Pairs of images ``[n, 1, 8, 8]`` float32 in [0, 1] and labels ``[n]`` int64 in 0..9."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Corpus:
    """A text as token ids.

    Attributes:
        tokens: ``[n]`` int32, in 0..vocab_size - 1.
        vocab_size: Number of different ids that the tokenizer can give.
        tokenizer: ``"bytes"`` or ``"bpe"``.
    """

    tokens: Tensor
    vocab_size: int
    tokenizer: str


def digits(side: int = 8) -> Digits:
    """The 1797 images of ``sklearn.datasets.load_digits``; every fifth one is for testing.

    Args:
        side: of an image in pixels; other sides than 8 are interpolated, 28 gives MNIST's format.

    Raises:
        OptcpuError: scikit-learn is not installed.
        ValueError: ``side`` is not positive.
    """
    if side < 1:
        raise ValueError(f"the side of an image must be positive, got {side}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise OptcpuError(
            "the digits come with scikit-learn, which is not installed; "
            "remedy: pip install scikit-learn"
        ) from error
    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().div_(16).view(-1, 1, 8, 8)
    if side != 8:
        images = functional.interpolate(images, size=(side, side), mode="bilinear")
    labels = torch.from_numpy(classes).long()
    test = torch.arange(len(labels)) % 5 == 4
    return Digits((images[~test], labels[~test]), (images[test], labels[test]))


def code_corpus(
    tokenizer: Literal["auto", "bytes", "bpe"] = "auto", *, vocab_size: int = GPT2_VOCAB_SIZE
) -> Corpus:
    """The standard library's own source (about 11 MB without its tests) as one stream of tokens.

    Args:
        tokenizer: ``"bytes"`` takes every byte as a token. ``"bpe"`` learns a byte-level
            byte-pair encoding of this very text, as GPT-2's was learnt of its own; it takes a few
            seconds once, then comes from the user's cache directory. ``"auto"`` is ``"bpe"`` where
            the ``tokenizers`` library is installed, else ``"bytes"``.
        vocab_size: Number of entries that the byte-pair encoding may have; ``"bytes"`` has 256.

    Raises:
        OptcpuError: The standard library's source or the ``tokenizers`` library is missing.
        ValueError: The tokenizer is unknown or the vocabulary smaller than 256.
    """
    if tokenizer not in ("auto", "bytes", "bpe"):
        raise ValueError(f'tokenizer must be "auto", "bytes" or "bpe", got {tokenizer!r}')
    if vocab_size < _BYTE_VALUES:
        raise ValueError(
            f"a byte-level vocabulary has at least {_BYTE_VALUES} entries, got {vocab_size}"
        )
    if tokenizer == "auto":
        tokenizer = "bpe" if importlib.util.find_spec("tokenizers") else "bytes"

    files = [path.read_bytes() for path in _standard_library(skip=_TESTS)]
    if tokenizer == "bytes":
        ids = np.frombuffer(b"\n".join(files), dtype=np.uint8).astype(np.int32)
        return Corpus(torch.from_numpy(ids), _BYTE_VALUES, "bytes")
    digest = hashlib.sha256(b"\0".join(files)).hexdigest()[:16]
    ids = _cached(
        f"stdlib-bpe-{vocab_size}-{digest}.npy",
        lambda: _byte_pair_ids([text.decode("utf-8", "replace") for text in files], vocab_size),
        valid=lambda array: (
            array.dtype == np.int32
            and array.ndim == 1
            and array.size > 0
            and 0 <= int(array.min()) <= int(array.max()) < vocab_size
        ),
    )
    return Corpus(torch.from_numpy(ids), vocab_size, "bpe")


def source_windows(width: int = 784, classes: int = 1000) -> tuple[Tensor, Tensor]:
    """Which file does this piece of source come from? A classification task on real bytes.

    The ``classes`` largest files of the standard library (its tests included) are cut into pieces
    of ``width`` bytes that do not overlap; the label is the file's rank by size. An installation
    with fewer files uses fewer labels.

    Returns:
        Bytes ``[n, width]`` uint8 and labels ``[n]`` int64 in 0..classes - 1, file by file. With
        the defaults and CPython 3.11, n is 38 thousand.

    Raises:
        OptcpuError: The standard library's source is missing.
        ValueError: An argument is not positive.
    """
    if width < 1 or classes < 1:
        raise ValueError(f"width and classes must be positive, got {width} and {classes}")
    files = [path.read_bytes() for path in _standard_library(skip=set())]
    large_enough = [text for text in files if len(text) >= width]
    largest = sorted(large_enough, key=lambda text: (-len(text), text))[:classes]
    pieces = [
        np.frombuffer(text, dtype=np.uint8, count=len(text) // width * width).reshape(-1, width)
        for text in largest
    ]
    labels = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    return torch.from_numpy(np.concatenate(pieces)), torch.from_numpy(labels)


def batches(
    inputs: Tensor, targets: Tensor, batch_size: int, *, count: int, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """``count`` batches ``(inputs, targets)``, shuffled anew in each pass over the data.

    Raises:
        ValueError: A size is not positive, or there are fewer samples than one batch holds.
    """
    _check_sizes(batch_size=batch_size, count=count)
    if len(inputs) != len(targets):
        raise ValueError(f"{len(inputs)} inputs do not fit {len(targets)} targets")
    per_pass = len(inputs) // batch_size
    if per_pass == 0:
        raise ValueError(
            f"batch_size {batch_size} is larger than the data set of {len(inputs)} samples"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen: list[Tensor] = []
    while len(chosen) < count:
        order = torch.randperm(len(inputs), generator=generator)
        chosen += order[: per_pass * batch_size].view(per_pass, batch_size).unbind()
    return [(inputs[rows], targets[rows]) for rows in chosen[:count]]


def token_batches(
    tokens: Tensor, batch_size: int, length: int, *, count: int, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """``count`` batches for next-token prediction, cut from random places of ``tokens``.

    Returns:
        Pairs of inputs and targets, each ``[batch_size, length]`` int64; the targets are the
        inputs one token later.

    Raises:
        ValueError: A size is not positive, or the text has no ``length + 1`` tokens.
    """
    _check_sizes(batch_size=batch_size, length=length, count=count)
    if len(tokens) <= length:
        raise ValueError(f"sequences of {length} need more than the {len(tokens)} tokens given")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length, (count, batch_size, 1), generator=generator)
    sequences = tokens[starts + torch.arange(length + 1)].long()
    return [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in sequences]


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")


def _standard_library(skip: set[str]) -> list[Path]:
    """All ``.py`` files, sorted, but those of installed packages and of folders named in skip."""
    root = Path(sysconfig.get_path("stdlib"))
    unwanted = _INSTALLED_PACKAGES | skip
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if unwanted.isdisjoint(path.relative_to(root).parts[:-1])
    ]
    if not files:
        raise OptcpuError(
            f"no Python source under {root}; this interpreter came without its library's source. "
            "Remedy: use a Python from python.org, your distribution or conda"
        )
    return files


def _byte_pair_ids(texts: Sequence[str], vocab_size: int) -> Ids:
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise OptcpuError(
            "byte-pair encoding needs the tokenizers library, which is not installed; "
            'remedy: pip install tokenizers, or tokenizer="bytes"'
        ) from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    encodings = tokenizer.encode_batch(list(texts))
    return np.concatenate([np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings])


def _cached(name: str, compute: Callable[[], Ids], *, valid: Callable[[Ids], bool]) -> Ids:
    """The array stored under this name, or a new one, which is stored where that is possible."""
    folder = _cache_folder()
    if folder is None:
        return compute()
    try:
        stored: Ids = np.load(folder / name, allow_pickle=False)
        if valid(stored):
            return stored
    except (OSError, ValueError, EOFError):
        pass  # not there yet, or damaged
    array = compute()
    _store(folder / name, array)
    return array


def _store(path: Path, array: Ids) -> None:
    # Written aside and moved: another process never reads half a file. A read-only or full disk
    # costs the time to compute anew, nothing else.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            np.save(unfinished, array)
            unfinished.replace(path)


def _cache_folder() -> Path | None:
    chosen = os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(chosen) / "optcpu"
    try:
        return Path.home() / ".cache" / "optcpu"
    except RuntimeError:
        return None  # a user without a home directory
