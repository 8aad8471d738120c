"""A file that is replaced as a whole."""

from __future__ import annotations

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
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a new file beside ``path``. On leaving, sync it to the disk and give it the name ``path``.

    At every moment a reader finds the whole old file or the whole new one, also after a kill or a power cut. If the
    body raises, the old file stays. A killed process leaves the folder ``<name>.<random>.unfinished``. Processes that
    write one path at once do not disturb each other: one file stays whole. A symbolic link stays one, and a file keeps
    its permissions.

    Raises:
        OSError: ``path`` is a device, a pipe or a folder; its folder does not exist; or a file cannot be written.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that exists, got {str(path)!r}: make the folder first")
    before = path.stat().st_mode if path.exists() else None
    if before is not None and not stat.S_ISREG(before):
        raise OSError(f"path must be that of a file, got {str(path)!r}, which is a device, a pipe or a folder")
    # A folder, since the writer may have an unfinished file of its own, as safetensors has.
    folder = path.with_name(f"{path.name[:_MOST]}.{secrets.token_hex(4)}.unfinished")
    try:
        folder.mkdir()
        unfinished = folder / path.name
        unfinished.touch()
        mode = before or unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(stat.S_IMODE(mode))  # else nobody else can read what safetensors makes
        _sync(unfinished)
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # some file systems cannot sync a folder
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
