"""Reads and writes of files at an offset, files that are open while there is room, and outputs that are given up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import ClassVar

from ..strict.regular_files import open_regular as open_regular

#: Inputs that are open at once. Systems allow a process 256 files or more, and large models have hundreds.
MOST_OPEN = 100


class InputFile:
    """A file that several threads read. It is open while it is read and, as long as there is room, afterwards."""

    #: All that are open, the one that was read last at the end.
    _open: ClassVar[dict[InputFile, None]] = {}
    _lock = threading.Lock()

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._descriptor, self._users = -1, 0
        self._identity: tuple[int, int, int, int] | None = None
        with self.opened():
            pass

    @property
    def nbytes(self) -> int:
        """Of the file when it was opened first."""
        assert self._identity is not None
        return self._identity[2]

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Yield a descriptor.

        Raises:
            ValueError: the file is another one now, or is no file.
            OSError: it cannot be read.
        """
        with self._lock:
            if self._descriptor < 0:
                self._reopen()
            self._open.pop(self, None)
            self._open[self] = None
            self._users += 1
        try:
            yield self._descriptor
        finally:
            with self._lock:
                self._users -= 1

    def read_fully(self, offset: int, into: memoryview) -> bool:
        """Fill memory with the bytes at an offset; return whether the file has them all.

        Raises:
            ValueError: it has not, and it had more when it was opened first.
        """
        with self.opened() as descriptor:
            if read_fully(descriptor, offset, into):
                return True
        self.require_unchanged()
        return False

    def require_unchanged(self) -> None:
        """Check that what was read is still what is there.

        Raises:
            ValueError: the file has changed since it was opened first.
        """
        with self._lock:
            try:
                found = os.stat(self.path) if self._descriptor < 0 else os.fstat(self._descriptor)
            except OSError:
                raise ValueError(self._changed()) from None
            if _identity(found) != self._identity:
                raise ValueError(self._changed())

    def close(self) -> None:
        with self._lock:
            if self._descriptor >= 0:
                self._close()

    def _reopen(self) -> None:
        while len(self._open) >= MOST_OPEN and (idle := next((it for it in self._open if not it._users), None)):
            idle._close()
        descriptor = open_regular(self.path)
        found = _identity(os.fstat(descriptor))
        if self._identity not in (None, found):
            os.close(descriptor)
            raise ValueError(self._changed())
        self._descriptor, self._identity = descriptor, found

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1
        del self._open[self]

    def _changed(self) -> str:
        return f"{self.path} has changed since its header was read: average when nothing writes it"


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


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


@contextmanager
def interrupted_once() -> Iterator[None]:
    """Let the first Ctrl-C raise KeyboardInterrupt, and none after it, so that a second one stops no clean-up."""
    handler = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not handler:
        yield  # no Ctrl-C comes here, or whoever called handles it
        return
    seen = False

    def once(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if not seen:
            seen = True
            handler(number, frame)

    signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
