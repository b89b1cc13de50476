"""Files that a user asks for: what their name says they are, and complete or not there at all."""

from __future__ import annotations

import contextlib
import errno
import os
from os import PathLike
from pathlib import Path

from optcpu.errors import OptcpuError

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_FOLDER = (errno.EEXIST, errno.ENOTDIR)


def remedy_for_folder(error: OSError, needs: str = "") -> str:
    """What to do about a folder that cannot be written to.

    Args:
        error: of the system.
        needs: a remark on the room that is needed, behind "Free some space there".
    """
    if error.errno in _DISK_IS_FULL:
        return f"Free some space there{needs}, or give another folder"
    if error.errno in _NOT_ALLOWED:
        return "Give a folder that you may write to"
    if error.errno in _NO_FOLDER:
        return "It must be a folder; move the file of that name away, or give another path"
    return "Give another folder"


def path_for(path: str | PathLike[str], writer: str, content: str, *suffixes: str) -> Path:
    """``path``, whose name must end in one of ``suffixes`` or have no suffix at all.

    Args:
        path: where the user wants the file.
        writer: the method that writes it, as in ``"save"``.
        content: what it writes, as in ``"a web page"``.
        *suffixes: the usual one first.

    Raises:
        ValueError: the name ends in another suffix.
    """
    target = Path(path)
    if target.suffix and target.suffix.lower() not in suffixes:
        better = target.with_suffix(suffixes[0])
        raise ValueError(
            f"{str(target)!r} ends in {target.suffix!r}, but {writer}() writes {content}, whose "
            f"name must end in {' or '.join(map(repr, suffixes))}, as in {str(better)!r}"
        )
    return target


def write(target: Path, content: bytes, writer: str) -> None:
    """Write a file; one that is there already is replaced only once the new one is complete.

    Args:
        target: the file.
        content: all of it.
        writer: the method that the user called, for the message.

    Raises:
        OptcpuError: it cannot be written.
    """
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(content)  # a pipe or a device must not be replaced by a file
        else:
            replace(Path(os.path.realpath(target)), content)
    except OSError as error:
        raise OptcpuError(
            f"cannot write {target}: {error.strerror}; nothing is lost: call {writer}() with a path "
            "that can be written"
        ) from error


def replace(target: Path, content: bytes) -> None:
    """Make ``content`` the whole of a file, which is there with all of it or as it was.

    Raises:
        OSError: it cannot be written.
    """
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(content)
        draft.replace(target)
    finally:
        with contextlib.suppress(OSError):  # in place already, or never made
            draft.unlink()
