"""Where an output may stand: nothing is lost that an average has not written, and the disk has room."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..terms.misfits import few
from .candidates import is_average
from .checkpoints import RECORD_FILE
from .progress import size_text


def check_place(out: Path, form: str, force: bool, inputs: Sequence[str]) -> None:
    """Check that an output may stand at its place.

    Args:
        out: the place.
        form: of the output, as `output_form` returns it.
        force: replace what is there.
        inputs: the paths of the inputs.

    Raises:
        FileExistsError: something is there that must stay.
        FileNotFoundError: the folder of ``out`` does not exist.
    """
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"out must be in a folder that exists, got {str(out)!r}: make the folder first")
    if not out.exists():
        return
    is_folder = form in ("folder", "distributed")
    if is_folder != out.is_dir() or not (is_folder or out.is_file()):
        kind = "a folder" if out.is_dir() else "a file" if out.is_file() else "a device or a pipe"
        raise FileExistsError(f"out must not be {kind} that exists, got {str(out)!r}: choose another name")
    if is_folder and not any(out.iterdir()):
        return
    if not force:
        raise FileExistsError(f"out must not exist, got {str(out)!r}: force=True (--force) replaces it")
    if is_folder:
        _check_folder(out, inputs)


def _check_folder(out: Path, inputs: Sequence[str]) -> None:
    """Check that a folder holds what an average has written, and nothing else."""
    place = out.resolve()
    inside = [path for path in inputs if place in Path(path).resolve().parents]
    if inside:
        raise FileExistsError(f"out must not hold an input, got {str(out)!r} with {inside[0]}: choose another name")
    try:
        own = json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        own = None
    if not isinstance(own, list):
        raise FileExistsError(f"out must be a folder that an average was written to, got {str(out)!r}: remove it first")
    names = os.listdir(out)
    others = sorted({*names} - {name for name in own if isinstance(name, str)})
    # Another program may have saved a model under our names.
    others += sorted(name for name in names if name.endswith(".safetensors") and not is_average(str(out / name)))
    if others:
        raise FileExistsError(
            f"out must hold only what an average has written, got {str(out)!r} with {few(others)}: move that away first"
        )


def check_space(out: Path, nbytes: int) -> None:
    """Check that the disk has room for an output.

    Raises:
        OSError: it has not.
    """
    free = shutil.disk_usage(Path(os.path.realpath(out)).parent).free
    if free < nbytes:
        raise OSError(errno.ENOSPC, f"out needs {size_text(nbytes)}, and {size_text(free)} are free", str(out))
