"""A folder of checkpoints: saved completely or not at all, checked when loaded, the old ones removed.

    path/
        step-00001200/   a complete checkpoint; see :mod:`optcpu.runtime.checkpoint.format`
        step-00001300/
        best.json        the step of the best one, if one was said to be
        .lock            held while one process saves
        .run             held while a run is at work, with the number of its process in it
        .step-*.new      being written; of no use if its writer has died
        .step-*.old      set aside while a checkpoint of the same step takes its place
        .step-*.removed  being deleted

A checkpoint is written into a hidden folder, brought to the disk and renamed, so that whatever happens
in between, even ``kill -9``, there is always a complete one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import IO, Any, overload

import psutil

from optcpu.errors import OptcpuError, warn
from optcpu.files import remedy_for_folder
from optcpu.runtime.checkpoint.format import (
    Checkpoint,
    Contents,
    read_checkpoint,
    read_manifest,
    sync_folder,
    write_file,
)

_NAME = re.compile(r"step-(\d{8,})")
_HIDDEN = re.compile(r"\.(step-\d{8,})\.(new|old|removed)")
_BEST = "best.json"
_BEST_DRAFT = ".best.json.new"
_UNKNOWN = -1  # number of a checkpoint whose manifest is damaged
_PATIENCE = 60.0  # seconds to wait for another process that saves

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class CheckpointFolder:
    """The checkpoints of one training run.

    The newest is the one that was saved last, whatever its step: a run that was taken back to an earlier
    step goes on from there.

    Args:
        path: where; made by the first :meth:`save`.
        keep_last: how many of the newest to keep, besides the best; None keeps all.
    """

    def __init__(self, path: str | PathLike[str], keep_last: int | None = 3) -> None:
        if keep_last is not None and (type(keep_last) is not int or keep_last < 1):
            raise ValueError(
                f"keep_last must be a positive integer, or None for all, not {keep_last!r}"
            )
        self.path = Path(path).absolute()  # whatever the working directory may become
        self.keep_last = keep_last
        self._held: IO[bytes] | None = None  # while this run keeps others out

    def save(
        self, state: dict[str, Any], step: int, best: bool = False, keep: int | None = None
    ) -> Path:
        """Save a checkpoint; when this returns, it is on the disk.

        One of the same step is replaced. Afterwards those beyond ``keep_last`` are removed. If another
        process is saving in the same folder, this waits for it.

        Args:
            state: see :class:`optcpu.runtime.checkpoint.state.Encoder` for what it may hold. The tensors
                of a dict under ``"model"`` are stored in a file of their own, ``model.safetensors``, under
                their own names. No second copy of contiguous tensors is made.
            step: of the training run.
            best: whether this is the best so far, to be kept until another is.
            keep: the step of one that is not removed this time, however many are newer.

        Returns:
            The checkpoint's folder.

        Raises:
            TypeError: ``state`` is no dict, or holds what a checkpoint cannot; the message names where.
            ValueError: ``step`` is no step.
            OptcpuError: it cannot be written. The earlier checkpoints are as they were.
        """
        if type(step) is not int or step < 0:
            raise ValueError(f"step must be an integer, 0 or more, not {step!r}")
        if not isinstance(state, dict):
            raise TypeError(f"state must be a dict, not {type(state).__name__}")
        contents = Contents(state)
        try:
            if not self.path.is_dir():
                self.path.mkdir(parents=True, exist_ok=True)
                sync_folder(self.path.parent)
                self._hold_again()
            with _locked(self.path / ".lock"), self._tidied():
                target = self._publish(contents, step)
                if best:
                    self._mark_best(step)
                self._remove_old(target, *([] if keep is None else [self.path_of(keep)]))
        except OSError as error:
            raise OptcpuError(
                f"cannot save step {step} in {self.path}: {error.strerror}{self._what_is_left()}. "
                f"{remedy_for_folder(error, _room(contents.size))}"
            ) from error
        return target

    def check(self, state: dict[str, Any]) -> None:
        """Raise TypeError if ``state`` holds what a checkpoint cannot; nothing is written."""
        Contents(state)

    @overload
    def load(self, path: None = None) -> Checkpoint | None: ...

    @overload
    def load(self, path: str | PathLike[str]) -> Checkpoint: ...

    def load(self, path: str | PathLike[str] | None = None) -> Checkpoint | None:
        """Load the newest checkpoint that is not damaged, or a certain one.

        Damaged ones are passed over; one warning says which, and what is wrong with each.

        Args:
            path: a checkpoint's folder, say one of :meth:`list` or :meth:`best`; None is the newest.

        Returns:
            The checkpoint; None if there is none at all.

        Raises:
            OptcpuError: all are damaged, or the one at ``path`` is; the message says what is wrong.
        """
        if path is not None:
            try:
                return read_checkpoint(Path(path))
            except OptcpuError as error:
                raise OptcpuError(f"{path} is no valid checkpoint: {error}") from error
        damaged = []
        for folder in _newest_first(self.path):
            try:
                checkpoint = read_checkpoint(folder)
            except OptcpuError as error:
                damaged.append(f"  {folder}: {error}")
                continue
            if damaged:
                warn(
                    f"loaded {folder}, since newer checkpoints are damaged (delete them if they are "
                    "of no use to you):\n" + "\n".join(damaged)
                )
            return checkpoint
        if damaged:
            raise OptcpuError(
                f"all checkpoints in {self.path} are damaged; start anew with another folder, or "
                "restore one from a backup:\n" + "\n".join(damaged)
            )
        return None

    def list(self) -> Sequence[Path]:
        """The folders of all checkpoints, the newest last; whether they are damaged is not looked at.

        Raises:
            OptcpuError: ``path`` is no folder, or cannot be read.
        """
        return [path for _, path in _numbered(self.path)]

    def best(self) -> Path | None:
        """The folder of the checkpoint that was last saved with ``best=True``; None if there is none.

        Raises:
            OptcpuError: ``best.json`` is damaged.
        """
        try:
            step = json.loads((self.path / _BEST).read_bytes())["step"]
            path = self.path_of(step)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise OptcpuError(
                f"{self.path / _BEST} is damaged ({type(error).__name__}: {error}), and which checkpoint "
                "is the best is not known: delete this file, or save one with best=True"
            ) from error
        return path if path.is_dir() else None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep other runs out of the folder meanwhile. What a killed run has left keeps nobody out.

        Raises:
            OptcpuError: another run is at work in it, or it cannot be made.
        """
        self._held = self._hold()
        try:
            yield
        finally:
            self._let_go()

    def _hold(self) -> IO[bytes]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".run").open("a+b", buffering=0)
        except OSError as error:
            raise self._cannot_keep(error) from error
        # A worker process that outlives a killed run for a while has inherited its lock.
        if not _lock(file) and (holder := _process_in(file)) is not None:
            file.close()
            raise OptcpuError(
                f"process {holder} is training into {self.path} already: give each run a folder of "
                "its own, or end that one"
            )
        try:
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        except OSError as error:
            file.close()
            raise self._cannot_keep(error) from error
        return file

    def _hold_again(self) -> None:
        """Keep others out of a folder that was removed while a run was at work, and is there again."""
        if self._held is not None:
            self._let_go()
            self._held = self._hold()

    def _let_go(self) -> None:
        if self._held is None:
            return
        with self._held as file, suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
        self._held = None

    def _what_is_left(self) -> str:
        return "; the checkpoints that were there are intact" if self.path.is_dir() else ""

    def _cannot_keep(self, error: OSError) -> OptcpuError:
        return OptcpuError(
            f"cannot keep checkpoints in {self.path}: {error.strerror}. {remedy_for_folder(error)}"
        )

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.path / f"step-{step:08d}"

    @contextmanager
    def _tidied(self) -> Iterator[None]:
        self._tidy()
        try:
            yield
        except BaseException:
            with suppress(OSError):
                self._tidy()
            raise

    def _tidy(self) -> None:
        """Clear up what is hidden, our own or left by writers that died: nobody else has the lock."""
        for name in os.listdir(self.path):
            hidden = _HIDDEN.fullmatch(name)
            if hidden and hidden[2] == "old" and not (self.path / hidden[1]).exists():
                (self.path / name).rename(self.path / hidden[1])
            elif hidden or name == _BEST_DRAFT:
                _delete(self.path / name)

    def _publish(self, contents: Contents, step: int) -> Path:
        target = self.path_of(step)
        new, old = _hidden(target, "new"), _hidden(target, "old")
        # The time tells the order even if a manifest cannot be read; the numbers, if the clock is put back.
        number = max(time.time_ns(), 1 + max((n for n, _ in _numbered(self.path)), default=0))
        new.mkdir()
        contents.write(new, step, number)
        if target.exists():
            target.rename(old)
        new.rename(target)
        sync_folder(self.path)
        return target

    def _mark_best(self, step: int) -> None:
        draft = self.path / _BEST_DRAFT
        write_file(draft, [json.dumps({"step": step}).encode()])
        draft.replace(self.path / _BEST)
        sync_folder(self.path)

    def _remove_old(self, *but: Path) -> None:
        """Remove what is not to be kept. If this fails, the checkpoint is saved all the same."""
        try:
            best = self.best()
            for path in self.list()[: -self.keep_last] if self.keep_last else ():
                if path not in (best, *but):
                    path.rename(_hidden(path, "removed"))
            self._tidy()
        except (OSError, OptcpuError) as error:
            warn(f"the checkpoint is saved, but old ones cannot be removed: {error}")


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """All checkpoints with their numbers, in order; first those whose number cannot be read.

    Raises:
        OptcpuError: the folder cannot be read.
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OptcpuError(
            f"cannot look for checkpoints in {folder}: {error.strerror}; give a folder that can be read"
        ) from error
    found = [folder / name for name in names if _NAME.fullmatch(name)]
    # Set aside for another that did not come: its writer died.
    found += [
        folder / name
        for name in names
        if (hidden := _HIDDEN.fullmatch(name)) and hidden[2] == "old" and hidden[1] not in names
    ]
    return sorted((_number(path), path) for path in found if path.is_dir())


def _newest_first(folder: Path) -> Iterator[Path]:
    """For loading. Those whose number cannot be read may be the newest, and are to be named."""
    numbered = _numbered(folder)
    yield from (path for number, path in numbered if number == _UNKNOWN)
    yield from (path for number, path in reversed(numbered) if number != _UNKNOWN)


def _number(path: Path) -> int:
    try:
        return read_manifest(path).number
    except OptcpuError:
        return _UNKNOWN


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock, and hold it. It goes when its holder dies.

    Raises:
        OptcpuError: another has held it for too long.
    """
    with path.open("ab") as file:
        deadline = time.monotonic() + _PATIENCE
        while not _lock(file):
            if time.monotonic() > deadline:
                raise OptcpuError(
                    f"something else has been saving in {path.parent} for {_PATIENCE:.0f} seconds: give "
                    "each run a folder of its own, and do not save from a signal handler"
                )
            time.sleep(0.05)
        try:
            yield
        finally:
            # Not left to closing, as a child process may have inherited the open file.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


def _process_in(file: IO[bytes]) -> int | None:
    """The process whose number is in ``file``, if it lives."""
    file.seek(0)
    number = file.read().strip()
    return int(number) if number.isdigit() and psutil.pid_exists(int(number)) else None


def _lock(file: IO[Any]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        return error.errno in _NO_LOCKS  # then it has to do without
    return True


def _room(size: int) -> str:
    """How much a checkpoint of ``size`` bytes needs, as a remark."""
    large = size >= 2**20
    amount = f"{size / 2**20:,.0f} MiB" if large else f"{max(1, size // 2**10)} KiB"
    return f" (a checkpoint takes {amount} and is complete before an older one is removed)"
