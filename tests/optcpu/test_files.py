from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from optcpu.errors import OptcpuError
from optcpu.files import path_for, write


@pytest.mark.parametrize("name", ["page.html", "page.HTM", "folder.v1/page", "page"])
def test_a_right_suffix_or_none_is_taken_as_it_is(name: str) -> None:
    assert path_for(name, "save", "a web page", ".html", ".htm") == Path(name)


def test_another_suffix_is_refused_with_what_to_call_instead() -> None:
    with pytest.raises(
        ValueError,
        match=r"^'a/x\.weird' ends in '\.weird', but save\(\) writes a web page, whose name must "
        r"end in '\.html' or '\.htm', as in 'a/x\.html'$",
    ):
        path_for("a/x.weird", "save", "a web page", ".html", ".htm")


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write(target, b"one", "to_json")
    write(target, b"two", "to_json")
    assert target.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to("real.json")
    write(tmp_path / "link.json", b"one", "to_json")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_bytes() == b"one"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write(pipe, b"one", "to_json")
    reader.join()
    assert read == [b"one"]
    assert pipe.is_fifo()


@pytest.mark.parametrize("name", ["nowhere/a.json", "file/a.json", "folder", "n" * 300])
def test_what_cannot_be_written_is_one_error_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OptcpuError, match=r"^cannot write .*: .+; nothing is lost: call save\(\)"):
        write(tmp_path / name, b"one", "save")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert os.listdir(tmp_path / "folder") == []
