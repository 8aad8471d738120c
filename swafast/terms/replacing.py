"""A file or a folder that is replaced as a whole."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Characters of a name that are part of that of its unfinished folder. Systems have names of at most 255 bytes.
_MOST = 50


@contextmanager
def replacing(path: str | os.PathLike[str], *, new: bool = False) -> Iterator[Path]:
    """Yield the path of a new file beside ``path``. On leaving, sync it to the disk and give it the name ``path``.

    With ``new``, what appears at ``path`` meanwhile is kept: the new file gives way.

    At every moment a reader finds the whole old file or the whole new one, also after a kill or a power cut. If the
    body raises, the old file stays. A killed process leaves the folder ``<name>.<random>.unfinished``. Processes that
    write one path at once do not disturb each other: one file stays whole. A symbolic link stays one, and a file keeps
    its permissions.

    Raises:
        FileExistsError: something is at ``path``, with ``new``.
        OSError: ``path`` is a device, a pipe or a folder; its folder does not exist; or a file cannot be written.
    """
    path = _in_a_folder(path)
    before = path.stat().st_mode if path.exists() else None
    if before is not None and not stat.S_ISREG(before):
        raise OSError(f"path must be that of a file, got {str(path)!r}, which is a device, a pipe or a folder")
    # A folder, since the writer may have an unfinished file of its own, as safetensors has.
    folder = _beside(path, "unfinished")
    try:
        folder.mkdir()
        unfinished = folder / path.name
        unfinished.touch()
        mode = before or unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(stat.S_IMODE(mode))  # else nobody else can read what safetensors makes
        _sync(unfinished)
        if not new:
            os.replace(unfinished, path)
        elif not _linked(unfinished, path):
            raise FileExistsError(_appeared(path))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # some file systems cannot sync a folder
        _sync(path.parent)


@contextmanager
def replacing_folder(path: str | os.PathLike[str], *, new: bool = False) -> Iterator[Path]:
    """Yield the path of a new folder beside ``path``. On leaving, sync its files and give it the name ``path``.

    A folder that stands there is replaced as a whole, with all that is in it: ask first whether it may be. With
    ``new``, only an empty one is. Where the system cannot exchange two folders at once, a kill between two renames
    leaves the old one as ``*.replaced``, and nothing at ``path``. Otherwise as :func:`replacing`.

    Raises:
        FileExistsError: ``path`` is a folder with something in it, with ``new``.
        OSError: ``path`` is no folder; its own folder does not exist; or a file cannot be written.
    """
    path = _in_a_folder(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"path must be that of a folder, got {str(path)!r}, which is a file")
    unfinished = _beside(path, "unfinished")
    try:
        unfinished.mkdir()
        yield unfinished
        for file in unfinished.rglob("*"):
            _sync(file)
        with suppress(OSError):
            _sync(unfinished)
        _put_in_place(unfinished, path, new)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # or the old one, after an exchange
    with suppress(OSError):
        _sync(path.parent)


def _linked(file: Path, path: Path) -> bool:
    """Return whether a name was free, which a file has got then."""
    try:
        os.link(file, path)
    except FileExistsError:
        return False
    except OSError:  # the file system has no links
        if path.exists():
            return False
        os.replace(file, path)
    return True


def _appeared(path: Path) -> str:
    return f"path must stay free until the end, got {str(path)!r}, which somebody else has made meanwhile"


def _put_in_place(folder: Path, path: Path, new: bool) -> None:
    if new or not path.exists():
        try:
            os.rename(folder, path)  # over an empty folder too
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise FileExistsError(_appeared(path)) from None
    elif not _exchanged(folder, path):
        replaced = _beside(path, "replaced")
        os.rename(path, replaced)
        os.rename(folder, path)
        shutil.rmtree(replaced, ignore_errors=True)


def _exchanged(first: Path, second: Path) -> bool:
    """Exchange two folders at once. Return whether the system could."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # of glibc 2.28 on
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, bytes(first), here, bytes(second), exchange) == 0


def _in_a_folder(path: str | os.PathLike[str]) -> Path:
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that exists, got {str(path)!r}: make the folder first")
    return path


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name[:_MOST]}.{secrets.token_hex(4)}.{what}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
