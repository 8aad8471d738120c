"""Reads and writes of files at an offset, and outputs that are given up."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack, suppress
from pathlib import Path


def open_regular(path: str | Path) -> int:
    """Return a descriptor of a file for reading.

    Raises:
        OSError: it cannot be read, or is a folder, a device or a pipe.
    """
    # A pipe without a writer would block.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no file, but a folder, a device or a pipe")
    return descriptor


def read_fully(descriptor: int, offset: int, into: memoryview) -> bool:
    """Fill memory with the bytes of a file; return whether the file has them all."""
    while into:
        count = os.preadv(descriptor, [into], offset)
        if count == 0:
            return False
        into, offset = into[count:], offset + count
    return True


def write_fully(descriptor: int, offset: int, data: bytes | memoryview) -> None:
    """Write bytes at an offset."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


class _GivenUp(Exception):
    """Has what is being replaced stay as it is."""


def give_up(stack: ExitStack) -> None:
    """Leave contexts, `replacing` among them, so that nothing is replaced."""
    with suppress(_GivenUp), stack:
        raise _GivenUp
