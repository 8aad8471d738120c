"""Whether an output may stand at its place, and has the space for it. Both are checked before anything is written."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from .checkpoints import RECORD
from .progress import size_text


def check_place(out: Path, form: str, force: bool) -> None:
    """Check that the output may stand at its place, before anything is read."""
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"out must be in a folder that exists, got {str(out)!r}: make the folder first")
    if not out.exists():
        return
    is_folder = form in ("folder", "distributed")
    if is_folder != out.is_dir():
        kind = "a folder" if out.is_dir() else "a file"
        raise FileExistsError(f"out must not be {kind} that exists, got {str(out)!r}: choose another name")
    if is_folder and not any(out.iterdir()):
        return
    if not force:
        raise FileExistsError(f"out must not exist, got {str(out)!r}: force=True (--force) replaces it")
    if is_folder and not (out / f"{RECORD}.json").is_file():
        raise FileExistsError(f"out must be a folder that an average was written to, got {str(out)!r}: remove it first")


def check_space(out: Path, nbytes: int) -> None:
    free = shutil.disk_usage(out.absolute().parent).free
    if free < nbytes:
        raise OSError(errno.ENOSPC, f"out needs {size_text(nbytes)}, and {size_text(free)} are free", str(out))
