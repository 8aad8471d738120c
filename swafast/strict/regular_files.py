"""Files that are opened to be read: no pipe, which would block, and no device."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def open_regular(path: str | Path) -> int:
    """Return a descriptor of a file for reading.

    Raises:
        ValueError: it is a folder, a device or a pipe.
        OSError: it cannot be read.
    """
    # A pipe without a writer would block.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} must be a file, got a folder, a device or a pipe")
    return descriptor
