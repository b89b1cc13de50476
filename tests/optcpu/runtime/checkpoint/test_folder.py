"""A folder of checkpoints: what is kept, what is loaded, and what is said when that cannot be done."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from optcpu.errors import OptcpuError
from optcpu.runtime.checkpoint import format as checkpoint_format
from optcpu.runtime.checkpoint.folder import CheckpointFolder


def state(count: int) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((10,), float(count))},
        "rest": {"m": torch.ones(3)},
        "count": count,
    }


def steps(folder: CheckpointFolder) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in folder.list()]


def loaded(folder: CheckpointFolder) -> int:
    """The count that was saved; warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint = folder.load()
    assert checkpoint is not None
    count = checkpoint.state["count"]
    assert torch.equal(checkpoint.state["model"]["w"], torch.full((10,), float(count)))
    assert isinstance(count, int)
    return count


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "runs" / "checkpoints")


def test_nothing_there(folder: CheckpointFolder) -> None:
    assert folder.load() is None
    assert folder.list() == []
    assert folder.best() is None
    assert not folder.path.exists()


def test_save_and_load(folder: CheckpointFolder) -> None:
    path = folder.save(state(1), 1200)
    assert path == folder.path / "step-00001200"
    assert sorted(os.listdir(folder.path)) == [".lock", "step-00001200"]
    checkpoint = folder.load()
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.path) == (1200, path)
    torch.testing.assert_close(checkpoint.state, state(1))


def test_the_last_are_kept(folder: CheckpointFolder) -> None:
    for step in range(0, 60, 10):
        folder.save(state(step), step)
    assert steps(folder) == [30, 40, 50]
    assert loaded(folder) == 50
    assert folder.load(folder.list()[0]).state["count"] == 30


def test_all_are_kept_if_asked(folder: CheckpointFolder) -> None:
    folder.keep_last = None
    for step in range(5):
        folder.save(state(step), step)
    assert steps(folder) == [0, 1, 2, 3, 4]


def test_the_best_is_kept_besides_the_last(folder: CheckpointFolder) -> None:
    folder.keep_last = 1
    folder.save(state(0), 0, best=True)
    folder.save(state(1), 1)
    folder.save(state(2), 2)
    assert steps(folder) == [0, 2]
    best = folder.best()
    assert best is not None
    assert folder.load(best).state["count"] == 0
    folder.save(state(3), 3, best=True)
    folder.save(state(4), 4)
    assert steps(folder) == [3, 4]
    assert folder.best() == folder.path / "step-00000003"


def test_one_that_is_to_be_kept_counts_for_nothing(folder: CheckpointFolder) -> None:
    folder.keep_last = 1
    folder.save(state(1), 1)
    for step in (2, 3):
        folder.save(state(step), step, keep=1)
        assert steps(folder) == [1, step]
    folder.save(state(4), 4, keep=4)
    assert steps(folder) == [4]


def test_the_newest_is_the_one_saved_last(folder: CheckpointFolder) -> None:
    """A run that was taken back to an earlier step goes on from there, not from where it had failed."""
    folder.keep_last = 2
    for step in (100, 200, 300):
        folder.save(state(step), step)
    folder.save(state(250), 250)
    assert steps(folder) == [300, 250]
    assert loaded(folder) == 250
    folder.keep_last = 1
    folder.save(state(50), 50)
    assert steps(folder) == [50]


def test_the_same_step_is_replaced(folder: CheckpointFolder) -> None:
    folder.save(state(1), 7, best=True)
    folder.save(state(2), 7)
    assert loaded(folder) == 2
    assert steps(folder) == [7]
    assert sorted(os.listdir(folder.path)) == [".lock", "best.json", "step-00000007"]


def test_a_long_run(folder: CheckpointFolder) -> None:
    folder.save(state(1), 99_999_999)
    folder.save(state(2), 100_000_000)
    assert steps(folder) == [99_999_999, 100_000_000]


def test_saved_state_is_not_what_is_trained_on(folder: CheckpointFolder) -> None:
    before = state(1)
    folder.save(before, 1)
    before["model"]["w"].zero_()
    checkpoint = folder.load()
    assert checkpoint is not None
    checkpoint.state["model"]["w"].add_(1)
    assert loaded(folder) == 1


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    folder: CheckpointFolder, name: str
) -> None:
    for step in (1, 2, 3):
        folder.save(state(step), step)
    flip(folder.path / "step-00000003" / name)
    (folder.path / "step-00000002" / "tensors.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"^loaded ") as caught:
        checkpoint = folder.load()
    assert checkpoint is not None
    assert checkpoint.state["count"] == 1
    (warning,) = caught
    first, *damaged = str(warning.message).splitlines()
    assert first.startswith(
        f"loaded {folder.path / 'step-00000001'}, since newer checkpoints are damaged"
    )
    assert damaged[0].startswith(f"  {folder.path / 'step-00000003'}: {name} ")
    assert damaged[1] == f"  {folder.path / 'step-00000002'}: tensors.safetensors is missing"
    assert len(damaged) == 2
    assert warning.filename == __file__


def test_a_damaged_old_one_is_nobodys_concern(folder: CheckpointFolder) -> None:
    folder.save(state(1), 1)
    folder.save(state(2), 2)
    flip(folder.path / "step-00000001" / "model.safetensors")
    assert loaded(folder) == 2


def test_all_damaged(folder: CheckpointFolder) -> None:
    for step in (1, 2):
        flip(folder.save(state(step), step) / "state.json")
    with pytest.raises(OptcpuError) as caught:
        folder.load()
    assert str(caught.value) == (
        f"all checkpoints in {folder.path} are damaged; start anew with another folder, or restore one "
        f"from a backup:\n  {folder.path}/step-00000002: state.json does not match its checksum\n"
        f"  {folder.path}/step-00000001: state.json does not match its checksum"
    )


def test_a_run_goes_on_after_damage(folder: CheckpointFolder) -> None:
    """Damaged ones never push out a valid one, and go in the end."""
    folder.keep_last = 2
    folder.save(state(1), 1)
    for name, step in (("state.json", 2), ("manifest.json", 3)):
        folder.keep_last = None
        flip(folder.save(state(step), step) / name)
    folder.keep_last = 1
    folder.save(state(4), 4)
    assert steps(folder) == [4]
    assert loaded(folder) == 4


def test_what_was_just_saved_is_never_removed(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.keep_last = 1
    folder.save(state(1), 1)

    def unreadable(path: Path) -> checkpoint_format.Manifest:
        raise OptcpuError("manifest.json cannot be read (Stale file handle)")

    with monkeypatch.context() as patch:
        patch.setattr("optcpu.runtime.checkpoint.folder.read_manifest", unreadable)
        path = folder.save(state(2), 0)
    assert folder.load(path).state["count"] == 2
    assert loaded(folder) == 2


def test_one_checkpoint_by_its_path(folder: CheckpointFolder, tmp_path: Path) -> None:
    path = folder.save(state(5), 5)
    elsewhere = tmp_path / "my favourite"
    shutil.copytree(path, elsewhere)
    assert folder.load(str(elsewhere)).step == 5
    flip(elsewhere / "model.safetensors")
    with pytest.raises(
        OptcpuError, match=r"favourite is no valid checkpoint: model\.safetensors does"
    ):
        folder.load(elsewhere)
    with pytest.raises(
        OptcpuError, match=r"nowhere is no valid checkpoint: manifest\.json is missing"
    ):
        folder.load(tmp_path / "nowhere")


def test_what_else_lies_in_the_folder_stays(folder: CheckpointFolder) -> None:
    folder.keep_last = 1
    folder.save(state(1), 1)
    others = ["metrics.csv", "step-7", "step-00000abc", ".hidden", "step-00000009"]
    for name in others:
        (folder.path / name).write_text("mine")
    folder.save(state(2), 2)
    assert set(others) < set(os.listdir(folder.path))
    assert steps(folder) == [2]


def test_leftovers_of_dead_writers_are_removed(folder: CheckpointFolder) -> None:
    folder.save(state(1), 1)
    for name in (".step-00000001.new", ".step-00000009.new", ".step-00000002.removed"):
        shutil.copytree(folder.path / "step-00000001", folder.path / name)
        (folder.path / name / "manifest.json").unlink()
    shutil.copytree(folder.path / "step-00000001", folder.path / ".step-00000001.old")
    assert steps(folder) == [1]
    assert loaded(folder) == 1
    folder.save(state(2), 2)
    assert sorted(os.listdir(folder.path)) == [".lock", "step-00000001", "step-00000002"]


def test_one_that_was_set_aside_by_a_dead_writer_counts(folder: CheckpointFolder) -> None:
    folder.save(state(1), 1)
    (folder.path / "step-00000001").rename(folder.path / ".step-00000001.old")
    assert loaded(folder) == 1
    folder.save(state(2), 2)
    assert steps(folder) == [1, 2]


def test_a_linked_checkpoint_is_unlinked_and_not_emptied(
    folder: CheckpointFolder, tmp_path: Path
) -> None:
    folder.keep_last = 1
    path = folder.save(state(1), 1)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    folder.save(state(2), 2)
    assert steps(folder) == [2]
    assert folder.load(tmp_path / "elsewhere").step == 1


@pytest.mark.parametrize("content", ["", "{}", '{"step": "../.."}', "[1]", '{"step": 1.5}'])
def test_a_damaged_mark_of_the_best_deletes_nothing(folder: CheckpointFolder, content: str) -> None:
    folder.keep_last = 1
    folder.save(state(1), 1, best=True)
    (folder.path / "best.json").write_text(content)
    with pytest.raises(
        OptcpuError, match=r"best\.json is damaged .+: delete this file, or save one"
    ):
        folder.best()
    with pytest.warns(
        UserWarning, match=r"the checkpoint is saved, but old ones cannot be removed: "
    ):
        folder.save(state(2), 2)
    assert steps(folder) == [1, 2]
    folder.save(state(3), 3, best=True)
    assert steps(folder) == [3]


def test_two_who_save_at_once_take_turns(folder: CheckpointFolder) -> None:
    folder.keep_last = None

    def save(first: int) -> None:
        for step in range(first, 20, 2):
            CheckpointFolder(folder.path, keep_last=None).save(state(step), step)

    threads = [threading.Thread(target=save, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(steps(folder)) == list(range(20))
    assert all(folder.load(path).state["count"] >= 0 for path in folder.list())


def test_a_folder_that_is_taken_for_too_long(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optcpu.runtime.checkpoint.folder._PATIENCE", 0.1)
    folder.save(state(1), 1)
    with (folder.path / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(
            OptcpuError, match=r"^something else has been saving in .+: give each run"
        ):
            folder.save(state(2), 2)
    folder.save(state(2), 2)


@pytest.mark.parametrize("step", [-1, 1.0, True, "1", None])
def test_no_step(folder: CheckpointFolder, step: Any) -> None:
    with pytest.raises(ValueError, match=r"^step must be an integer, 0 or more, not "):
        folder.save(state(1), step)


@pytest.mark.parametrize("keep_last", [0, -1, 1.5, True])
def test_keep_last_must_be_a_number(keep_last: Any) -> None:
    with pytest.raises(ValueError, match=r"^keep_last must be a positive integer, or None for all"):
        CheckpointFolder("x", keep_last=keep_last)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [([], r"^state must be a dict, not list$"), ({"a": {3: print}}, r"^a\[3\] is a builtin")],
)
def test_state_that_cannot_be_stored_touches_nothing(
    folder: CheckpointFolder, wrong: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        folder.save(wrong, 1)
    assert not folder.path.exists()


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "checkpoints"):
        with pytest.raises(
            OptcpuError, match=r"^cannot save step 1 in .+/file.*: .+ must be a folder"
        ):
            CheckpointFolder(path).save(state(1), 1)
        with pytest.raises(
            OptcpuError, match=r"^cannot look for checkpoints in .+: Not a directory"
        ):
            CheckpointFolder(path).load()
    assert (tmp_path / "file").read_text() == "mine"


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user to whom permissions apply."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def public() -> Iterator[Path]:
    """A temporary folder that other users may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_no_permission(public: Path) -> None:
    folder = CheckpointFolder(public / "checkpoints")
    folder.save(state(1), 1)
    folder.path.chmod(0o555)
    with unprivileged():
        kept = "; the checkpoints that were there are intact"
        for path, left in ((folder.path, kept), (folder.path / "new", "")):
            with pytest.raises(
                OptcpuError,
                match=rf"^cannot save step 2 in .+/checkpoints.*: Permission denied{left}\. Give a folder "
                r"that you may write to$",
            ):
                CheckpointFolder(path).save(state(2), 2)
        assert loaded(folder) == 1
    folder.path.chmod(0o000)
    with (
        unprivileged(),
        pytest.raises(OptcpuError, match=r"^cannot look for .+: Permission denied"),
    ):
        folder.load()
    folder.path.chmod(0o755)
    assert sorted(os.listdir(folder.path)) == [".lock", "step-00000001"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs procfs")
def test_a_file_system_that_takes_no_folders() -> None:
    with pytest.raises(
        OptcpuError, match=r"^cannot save step 1 in /proc/checkpoints: .+Give another"
    ):
        CheckpointFolder("/proc/checkpoints").save(state(1), 1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    folder.save(state(1), 1)

    def fsync(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_format.os, "fsync", fsync)
        with pytest.raises(
            OptcpuError, match=rf"^cannot save step 1 in .+: {os.strerror(code)}; the"
        ) as e:
            folder.save(state(2), 1)
    assert ("Free some space there (a checkpoint takes 1 KiB" in str(e.value)) == (
        code != errno.EIO
    )
    assert sorted(os.listdir(folder.path)) == [".lock", "step-00000001"]
    assert loaded(folder) == 1


def test_a_full_disk_at_the_start(tmp_path: Path) -> None:
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, most[1]))
    try:
        with (
            pytest.raises(OptcpuError, match=r"^cannot keep checkpoints in .+: File too large"),
            CheckpointFolder(tmp_path).in_use(),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_a_checkpoint_that_may_not_be_read_is_passed_over(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for step in (1, 2):
        folder.save(state(step), step)
    is_file = Path.is_file

    def refused(path: Path) -> bool:
        if path == folder.path_of(2) / name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.warns(UserWarning, match=rf"{name} cannot be read \(Permission denied\)"):
        checkpoint = folder.load()
    assert checkpoint is not None
    assert checkpoint.step == 1


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "new")
    with folder.in_use():
        told = rf"process {os.getpid()} is training into .*new already: give each run a folder"
        with pytest.raises(OptcpuError, match=told), folder.in_use():
            pass
        folder.save({"a": 1}, 1)  # which has a lock of its own
    with folder.in_use():
        assert folder.load() is not None


def test_a_folder_that_was_removed_during_a_run_is_kept_from_others_again(tmp_path: Path) -> None:
    folder, other = CheckpointFolder(tmp_path / "runs"), CheckpointFolder(tmp_path / "runs")
    with folder.in_use():
        folder.save({"a": 1}, 1)
        shutil.rmtree(folder.path)
        folder.save({"a": 2}, 2)
        with pytest.raises(OptcpuError, match="is training into"), other.in_use():
            pass
    with other.in_use():
        pass
    shutil.rmtree(folder.path)
    folder.save({"a": 3}, 3)  # without a run nobody is kept out
    assert not (folder.path / ".run").exists()


def test_nothing_is_said_of_checkpoints_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(OptcpuError, match=r"^cannot save step 1 in .*runs: File exists\. "):
        CheckpointFolder(tmp_path / "runs").save({"a": 1}, 1)


def test_what_a_killed_run_has_left_keeps_nobody_out(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with (tmp_path / ".run").open("w") as left:  # as a worker process of it does
        left.write(str(ended.pid))
        left.flush()
        fcntl.flock(left, fcntl.LOCK_EX)
        with CheckpointFolder(tmp_path).in_use():
            assert (tmp_path / ".run").read_text() == str(os.getpid())


def test_a_folder_that_cannot_be_used_is_told_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OptcpuError, match=r"cannot keep checkpoints in .*file: "),
        CheckpointFolder(tmp_path / "file").in_use(),
    ):
        pass


def test_a_relative_folder_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = CheckpointFolder("checkpoints")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    folder.save({"model": {}}, step=1)
    assert list((tmp_path / "checkpoints").glob("step-*"))
    assert not list((tmp_path / "elsewhere").iterdir())
