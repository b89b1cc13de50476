"""Text to tokens in a file, and windows of it for any number of processes."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from optcpu.errors import OptcpuError
from optcpu.runtime.data import tokens
from optcpu.runtime.data.tokens import TokenDataset, tokenize_files


class TestWindows:
    @given(
        count=st.integers(2, 200),
        length=st.integers(1, 50),
        stride=st.one_of(st.none(), st.integers(1, 60)),
    )
    def test_targets_are_the_inputs_one_later(
        self, count: int, length: int, stride: int | None
    ) -> None:
        length = min(length, count - 1)
        dataset = TokenDataset(torch.arange(count), length, stride=stride)
        step = stride or length
        for number, (inputs, targets) in enumerate(dataset):
            assert inputs.tolist() == list(range(number * step, number * step + length))
            assert targets.tolist() == [token + 1 for token in inputs.tolist()]
        assert number == len(dataset) - 1
        assert len(dataset) * step + length + 1 > count  # one more would not fit

    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "uint32", "int64"])
    @pytest.mark.parametrize("suffix", [".npy", ".bin"])
    def test_files_give_what_the_tensor_gives(
        self, tmp_path: Path, dtype: str, suffix: str
    ) -> None:
        ids = np.arange(100).astype(dtype)
        path = tmp_path / f"tokens{suffix}"
        np.save(path, ids) if suffix == ".npy" else ids.tofile(path)
        dataset = TokenDataset(path, 7, dtype=None if suffix == ".npy" else dtype)
        expected = TokenDataset(torch.arange(100), 7)
        assert len(dataset) == len(expected) == 14
        inputs, targets = dataset.batch(range(14))
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs, expected.batch(range(14))[0])
        assert torch.equal(targets, expected.batch(range(14))[1])
        assert torch.equal(dataset[-1][0], inputs[13])
        assert torch.equal(dataset.__getitems__([3])[0][1], targets[3])

    def test_bare_numbers_are_uint16_unless_told(self, tmp_path: Path) -> None:
        np.arange(50, dtype=np.uint16).tofile(tmp_path / "a.bin")
        assert TokenDataset(tmp_path / "a.bin", 10)[1][0].tolist() == list(range(10, 20))

    def test_copies_carry_the_path_and_open_the_file_themselves(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        np.save(tmp_path / "a.npy", np.arange(10**6, dtype=np.uint32))
        monkeypatch.chdir(tmp_path)
        dataset = TokenDataset("a.npy", 10)
        stored = pickle.dumps(dataset)
        assert len(stored) < 1000
        monkeypatch.chdir("/")
        copy = pickle.loads(stored)
        assert copy._tokens is None
        assert torch.equal(copy[9][0], dataset[9][0])

    def test_worker_processes_read_it(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.arange(100, dtype=np.uint16))
        loader = DataLoader(TokenDataset(tmp_path / "a.npy", 9), 4, num_workers=2)
        inputs = torch.cat([batch[0] for batch in loader])
        assert inputs.flatten().tolist() == list(range(99))

    @pytest.mark.parametrize("wrong", [40, -1])
    def test_a_token_beyond_the_vocabulary_is_named(self, wrong: int) -> None:
        ids = torch.arange(40)
        ids[25] = wrong
        dataset = TokenDataset(ids, 10, vocab_size=40)
        assert dataset[0][0].tolist() == list(range(10))
        with pytest.raises(OptcpuError, match=rf"token {wrong} at position 25 .* not in 0\.\.39"):
            dataset.batch([0, 2])

    def test_no_such_window(self) -> None:
        with pytest.raises(IndexError, match="index 3 is out of range"):
            TokenDataset(torch.arange(31), 10)[3]

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda path: None, "there is no file .*a.npy; remedy"),
            (lambda path: path.write_bytes(b""), "cannot read tokens from"),
            (lambda path: path.write_bytes(b"nonsense" * 9), "cannot read tokens from"),
            (lambda path: np.save(path, np.zeros(9)), "holds float64 in 1 dimensions"),
            (lambda path: np.save(path, np.zeros((3, 3), np.uint16)), "in 2 dimensions"),
            (lambda path: np.save(path, np.array([{}], object)), "cannot read tokens from"),
            (lambda path: np.save(path, np.zeros(10, np.uint16)), "has 10 tokens, .* takes 11"),
            (lambda path: path.mkdir(), "cannot read tokens from"),
        ],
    )
    def test_a_file_that_cannot_be_used(self, tmp_path: Path, make: Any, message: str) -> None:
        make(tmp_path / "a.npy")
        with pytest.raises(OptcpuError, match=message):
            TokenDataset(tmp_path / "a.npy", 10)

    def test_an_empty_file_of_bare_numbers(self, tmp_path: Path) -> None:
        (tmp_path / "a.bin").touch()
        with pytest.raises(OptcpuError, match="cannot read tokens from"):
            TokenDataset(tmp_path / "a.bin", 10)

    def test_a_dtype_that_the_file_does_not_have(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.arange(100, dtype=np.uint16))
        with pytest.raises(OptcpuError, match="holds uint16, not int32"):
            TokenDataset(tmp_path / "a.npy", 10, dtype="int32")

    @pytest.mark.parametrize("name", ["length", "stride", "vocab_size"])
    def test_numbers_are_positive(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            TokenDataset(torch.arange(30), **{"length": 5, name: 0})
        with pytest.raises(TypeError, match=f"{name} must be an integer, got 2.5"):
            TokenDataset(torch.arange(30), **{"length": 5, name: 2.5})

    @pytest.mark.parametrize("source", [torch.rand(50), torch.zeros(5, 5, dtype=torch.long)])
    def test_tensors_hold_integers_in_one_dimension(self, source: torch.Tensor) -> None:
        with pytest.raises(TypeError, match="integers in one dimension"):
            TokenDataset(source, 3)


def words(text: str) -> list[int]:
    return [len(word) for word in text.split()]


class TestTokenize:
    @pytest.fixture
    def texts(self, tmp_path: Path) -> list[Path]:
        paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
        paths[0].write_bytes("grün\r\nund blau\n".encode() * 50)
        paths[1].write_bytes(b"\xff no UTF-8")
        return paths

    def test_bytes_are_those_of_the_files(self, tmp_path: Path, texts: list[Path]) -> None:
        path = tokenize_files(texts, tmp_path / "tokens")
        assert path == tmp_path / "tokens.npy"
        ids = np.load(path)
        assert ids.dtype == np.uint8
        assert ids.tobytes() == texts[0].read_bytes() + texts[1].read_bytes()
        assert sorted(os.listdir(tmp_path)) == ["one.txt", "tokens.npy", "two.txt"]

    def test_pieces_end_with_lines_and_nothing_is_lost(
        self, tmp_path: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokens, "_PIECE", 20)
        pieces: list[str] = []

        def encode(text: str) -> list[int]:
            pieces.append(text)
            return [ord(letter) for letter in text]

        path = tokenize_files(texts, tmp_path / "tokens.npy", encode, vocab_size=1 << 16)
        whole = "".join(path.read_bytes().decode("utf-8", "replace") for path in texts)
        assert "".join(pieces) == whole
        assert len(pieces) > 10
        assert all(piece.endswith("\n") for piece in pieces[:-1])
        assert np.load(path).tolist() == [ord(letter) for letter in whole]

    def test_a_separator_ends_each_file_that_has_text(
        self, tmp_path: Path, texts: list[Path]
    ) -> None:
        (tmp_path / "empty.txt").touch()
        paths = [texts[1], tmp_path / "empty.txt", texts[1]]
        path = tokenize_files(paths, tmp_path / "t.npy", words, vocab_size=99, separator=98)
        assert np.load(path).tolist() == [1, 2, 5, 98, 1, 2, 5, 98]

    @pytest.mark.parametrize(
        ("vocab_size", "dtype"),
        [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32"), (None, "uint32")],
    )
    def test_the_dtype_has_room_for_the_vocabulary(
        self, tmp_path: Path, texts: list[Path], vocab_size: int | None, dtype: str
    ) -> None:
        path = tokenize_files(texts[0], tmp_path / "t.npy", words, vocab_size=vocab_size)
        assert np.load(path).dtype == dtype

    def test_a_tokenizer_of_the_tokenizers_library(self, tmp_path: Path, texts: list[Path]) -> None:
        library = pytest.importorskip("tokenizers")
        tokenizer = library.Tokenizer(library.models.WordLevel({"und": 0, "?": 1}, unk_token="?"))
        tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
        path = tokenize_files(texts[0], str(tmp_path / "t.npy"), tokenizer)
        assert np.load(path).dtype == np.uint8
        assert np.load(path).tolist() == [1, 0, 1] * 50

    def test_memory_stays_small(self, tmp_path: Path) -> None:
        (tmp_path / "large.txt").write_bytes(b"0123456789abcde\n" * 2_000_000)
        tracemalloc.start()
        path = tokenize_files(tmp_path / "large.txt", tmp_path / "t.npy", "bytes", vocab_size=300)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10 * 2**20
        assert TokenDataset(path, 15, stride=16)[1_999_999][0].tolist() == [*b"0123456789abcde"]

    def test_what_was_there_stays_until_the_new_one_is_complete(
        self, tmp_path: Path, texts: list[Path]
    ) -> None:
        path = tokenize_files(texts, tmp_path / "t.npy")
        before = path.read_bytes()

        def fails(text: str) -> list[int]:
            raise KeyError(text[:4])

        with pytest.raises(KeyError):
            tokenize_files(texts, path, fails)
        with pytest.raises(OptcpuError):
            tokenize_files([texts[0], tmp_path / "missing.txt"], path)
        assert path.read_bytes() == before
        assert sorted(os.listdir(tmp_path)) == ["one.txt", "t.npy", "two.txt"]

    def test_files_that_are_missing_or_empty(self, tmp_path: Path) -> None:
        with pytest.raises(OptcpuError, match=r"cannot read .*no.txt: No such file"):
            tokenize_files(tmp_path / "no.txt", tmp_path / "t.npy")
        (tmp_path / "empty.txt").touch()
        with pytest.raises(OptcpuError, match=r"there is no text in .*empty.txt"):
            tokenize_files(tmp_path / "empty.txt", tmp_path / "t.npy")
        with pytest.raises(OptcpuError, match="there is no text in no files"):
            tokenize_files([], tmp_path / "t.npy")
        assert os.listdir(tmp_path) == ["empty.txt"]

    def test_an_output_that_cannot_be_written(self, tmp_path: Path, texts: list[Path]) -> None:
        with pytest.raises(OptcpuError, match=r"cannot write .*t.npy: No such file"):
            tokenize_files(texts, tmp_path / "no" / "t.npy")
        (tmp_path / "folder.npy").mkdir()
        with pytest.raises(OptcpuError, match=r"cannot write .*folder.npy: Is a directory"):
            tokenize_files(texts, tmp_path / "folder.npy")
        assert sorted(os.listdir(tmp_path)) == ["folder.npy", "one.txt", "two.txt"]
        with pytest.raises(ValueError, match=r"ends in '\.txt'"):
            tokenize_files(texts, tmp_path / "t.txt")

    @pytest.mark.parametrize("ids", [[5, 100], [-1]])
    def test_tokens_beyond_the_vocabulary(
        self, tmp_path: Path, texts: list[Path], ids: list[int]
    ) -> None:
        with pytest.raises(OptcpuError, match=rf"made token {ids[-1]} of .* not in 0\.\.99"):
            tokenize_files(texts, tmp_path / "t.npy", lambda text: ids, vocab_size=100)

    def test_tokenizers_that_are_none(self, tmp_path: Path, texts: list[Path]) -> None:
        with pytest.raises(ValueError, match="got 'words'"):
            tokenize_files(texts, tmp_path / "t.npy", "words")
        with pytest.raises(TypeError, match="not int"):
            tokenize_files(texts, tmp_path / "t.npy", 7)
        with pytest.raises(TypeError, match="a list of integers, not float64"):
            tokenize_files(texts, tmp_path / "t.npy", lambda text: [0.5])
        with pytest.raises(ValueError, match=r"separator must be in 0\.\.255, got 256"):
            tokenize_files(texts, tmp_path / "t.npy", separator=256)
