"""A file that is replaced as a whole."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a new file beside ``path``. On leaving, sync it to the disk and give it the name ``path``.

    At every moment a reader finds the whole old file or the whole new one, also after a kill or a power cut. If the
    body raises, the old file stays. A killed process leaves the folder ``<name>.<random>.unfinished``. Processes that
    write one path at once do not disturb each other: one file stays whole. A symbolic link stays one.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that exists, got {str(path)!r}: make the folder first")
    # A folder, since the writer may have an unfinished file of its own, as safetensors has.
    folder = path.with_name(f"{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        folder.mkdir()
        unfinished = folder / path.name
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(mode)  # of the user's other files; safetensors makes a file that nobody else can read
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
