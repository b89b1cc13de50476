from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from optcpu import data
from optcpu.errors import OptcpuError


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library in place of the real one, and a cache directory of its own."""
    root = tmp_path / "lib"
    for name, text in {
        "beta.py": "def beta():\n    return 2\n" * 40,
        "alpha/one.py": "alpha = 1\n" * 30,
        "test/test_beta.py": "assert True\n" * 50,
        "site-packages/other.py": "installed = True\n" * 100,
        "notes.txt": "not source\n",
        "empty.py": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(root))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return root


class TestDigits:
    def test_shapes_ranges_and_split(self) -> None:
        digits = data.digits()
        (train_images, train_labels), (test_images, test_labels) = digits.train, digits.test
        assert train_images.shape == (1438, 1, 8, 8)
        assert test_images.shape == (359, 1, 8, 8)
        assert train_images.dtype == torch.float32
        assert train_images.min() == 0
        assert train_images.max() == 1
        assert train_labels.dtype == torch.int64
        assert len(train_labels) == 1438
        assert set(test_labels.tolist()) == set(range(10))

    def test_is_the_same_in_every_call(self) -> None:
        assert torch.equal(data.digits().test[0], data.digits().test[0])

    def test_another_size(self) -> None:
        small, large = data.digits(), data.digits(side=28)
        assert large.train[0].shape == (1438, 1, 28, 28)
        assert torch.equal(large.train[1], small.train[1])
        means = [images.mean((1, 2, 3)) for images in (large.test[0], small.test[0])]
        torch.testing.assert_close(*means, atol=0.02, rtol=0)

    def test_a_side_that_is_none(self) -> None:
        with pytest.raises(ValueError, match="must be positive, got 0"):
            data.digits(side=0)

    def test_missing_scikit_learn_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sklearn", None)
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(OptcpuError, match="pip install scikit-learn"):
            data.digits()


class TestCodeCorpus:
    def test_bytes_are_the_sources_without_tests_and_packages(self, library: Path) -> None:
        corpus = data.code_corpus("bytes")
        text = bytes(corpus.tokens.tolist())
        expected = [library / "alpha/one.py", library / "beta.py", library / "empty.py"]
        assert text == b"\n".join(path.read_bytes() for path in expected)
        assert corpus.vocab_size == 256
        assert corpus.tokens.dtype == torch.int32

    def test_byte_pairs_stand_for_the_whole_text(self, library: Path) -> None:
        pytest.importorskip("tokenizers")
        corpus = data.code_corpus("bpe", vocab_size=300)
        letters = data.code_corpus("bytes")
        assert corpus.tokenizer == "bpe"
        assert corpus.tokens.min() >= 0
        assert corpus.tokens.max() < 300
        assert len(corpus.tokens) < len(letters.tokens) / 2

    def test_byte_pairs_are_learnt_once(
        self, library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("tokenizers")
        first = data.code_corpus("bpe", vocab_size=300)
        monkeypatch.setattr(data, "_byte_pair_ids", _must_not_run)
        assert torch.equal(data.code_corpus("bpe", vocab_size=300).tokens, first.tokens)

    def test_changed_text_is_learnt_anew(
        self, library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(data, "_byte_pair_ids", lambda texts, size: np.int32([1, 2, 3]))
        data.code_corpus("bpe")
        (library / "beta.py").write_text("changed = True\n")
        monkeypatch.setattr(data, "_byte_pair_ids", lambda texts, size: np.int32([4, 5]))
        assert data.code_corpus("bpe").tokens.tolist() == [4, 5]

    @pytest.mark.parametrize(
        "damage",
        [
            lambda path: path.write_bytes(b""),
            lambda path: path.write_bytes(path.read_bytes()[:-4]),
            lambda path: np.save(path, np.int32([1, 2, 10**6])),
            lambda path: np.save(path, np.float64([1, 2])),
        ],
        ids=["empty", "cut", "out of range", "wrong dtype"],
    )
    def test_damaged_cache_is_replaced(
        self, library: Path, monkeypatch: pytest.MonkeyPatch, damage: object
    ) -> None:
        monkeypatch.setattr(data, "_byte_pair_ids", lambda texts, size: np.int32([7, 8]))
        data.code_corpus("bpe")
        (stored,) = (library.parent / "cache/optcpu").iterdir()
        damage(stored)
        assert data.code_corpus("bpe").tokens.tolist() == [7, 8]
        assert np.load(stored).tolist() == [7, 8]

    def test_unwritable_cache_costs_time_only(
        self, library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        # A file where the folder should be: not even root can write there.
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        monkeypatch.setattr(data, "_byte_pair_ids", lambda texts, size: np.int32([7, 8]))
        assert data.code_corpus("bpe").tokens.tolist() == [7, 8]

    def test_user_without_a_home(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", _no_home)
        monkeypatch.setattr(data, "_byte_pair_ids", lambda texts, size: np.int32([7, 8]))
        assert data.code_corpus("bpe").tokens.tolist() == [7, 8]

    def test_auto_is_bytes_without_the_library(
        self, library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
        assert data.code_corpus().tokenizer == "bytes"

    def test_missing_library_is_told(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(OptcpuError, match="pip install tokenizers"):
            data.code_corpus("bpe")

    def test_missing_source_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
        with pytest.raises(OptcpuError, match="no Python source under"):
            data.code_corpus("bytes")

    def test_wrong_arguments_are_named(self) -> None:
        with pytest.raises(ValueError, match="'words'"):
            data.code_corpus("words")
        with pytest.raises(ValueError, match="at least 256 entries, got 100"):
            data.code_corpus(vocab_size=100)

    def test_real_library_is_there(self) -> None:
        corpus = data.code_corpus("bytes")
        assert len(corpus.tokens) > 5_000_000
        assert b"def dataclass(" in bytes(corpus.tokens.to(torch.uint8).numpy())


class TestSourceWindows:
    def test_pieces_are_labelled_with_their_file(self, library: Path) -> None:
        pieces, labels = data.source_windows(width=10, classes=2)
        # The two largest files are beta.py (1000 bytes) and its test (600 bytes).
        assert pieces.shape == (160, 10)
        assert labels.tolist() == [0] * 100 + [1] * 60
        assert bytes(pieces[100].tolist()) == b"assert Tru"

    def test_files_shorter_than_a_piece_are_left_out(self, library: Path) -> None:
        pieces, labels = data.source_windows(width=400, classes=10)
        assert labels.tolist() == [0, 0, 1]
        assert pieces.dtype == torch.uint8

    def test_wrong_arguments_are_named(self) -> None:
        with pytest.raises(ValueError, match="got 0 and 5"):
            data.source_windows(width=0, classes=5)


class TestBatches:
    def test_one_pass_holds_every_sample_once(self) -> None:
        inputs = torch.arange(12)
        made = data.batches(inputs, inputs * 10, 4, count=3)
        assert sorted(torch.cat([x for x, _ in made]).tolist()) == list(range(12))
        assert all(torch.equal(x * 10, y) for x, y in made)

    def test_later_passes_are_shuffled_anew(self) -> None:
        inputs = torch.arange(100)
        made = data.batches(inputs, inputs, 50, count=4)
        first, second = torch.cat([made[0][0], made[1][0]]), torch.cat([made[2][0], made[3][0]])
        assert not torch.equal(first, second)
        assert torch.equal(first.sort().values, second.sort().values)

    def test_seed_decides(self) -> None:
        inputs = torch.arange(100)
        one, same, other = (data.batches(inputs, inputs, 10, count=1, seed=s) for s in (1, 1, 2))
        assert torch.equal(one[0][0], same[0][0])
        assert not torch.equal(one[0][0], other[0][0])

    def test_all_batches_are_full(self) -> None:
        inputs = torch.arange(10)
        assert [len(x) for x, _ in data.batches(inputs, inputs, 4, count=5)] == [4] * 5

    def test_wrong_sizes_are_named(self) -> None:
        inputs = torch.arange(10)
        with pytest.raises(ValueError, match="batch_size 11 is larger than the data set of 10"):
            data.batches(inputs, inputs, 11, count=1)
        with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
            data.batches(inputs, inputs, 0, count=1)
        with pytest.raises(ValueError, match="10 inputs do not fit 9 targets"):
            data.batches(inputs, inputs[:9], 2, count=1)


class TestTokenBatches:
    def test_targets_are_the_next_tokens(self) -> None:
        tokens = torch.arange(1000, dtype=torch.int32)
        made = data.token_batches(tokens, 4, 16, count=3)
        assert len(made) == 3
        for inputs, targets in made:
            assert inputs.shape == targets.shape == (4, 16)
            assert inputs.dtype == torch.int64
            assert torch.equal(targets, inputs + 1)
            assert torch.equal(inputs - inputs[:, :1], torch.arange(16).expand(4, 16))

    def test_shortest_text_that_will_do(self) -> None:
        ((inputs, targets),) = data.token_batches(torch.arange(5), 1, 4, count=1)
        assert inputs.tolist() == [[0, 1, 2, 3]]
        assert targets.tolist() == [[1, 2, 3, 4]]

    def test_too_short_a_text_is_named(self) -> None:
        with pytest.raises(ValueError, match="sequences of 5 need more than the 5 tokens"):
            data.token_batches(torch.arange(5), 1, 5, count=1)


def _must_not_run(*arguments: object) -> None:
    raise AssertionError("the cache was not used")


def _no_home() -> Path:
    raise RuntimeError("no home directory")
