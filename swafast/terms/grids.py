"""Grids: how many blocks a launch on a GPU has, and how wide they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """The grid of a launch, whatever the GPU."""

    num_threads: int = 256  # of a block: a multiple of 256, at most 1024
    share: float = 1.0  # of the blocks of this width that are on the device at once
    chunk_numel: int | None = None  # of tables that are made meanwhile; None: as the number of elements asks

    def num_blocks(self, most: int) -> int:
        """Return the number of blocks where ``most`` are on the device at once."""
        return max(1, round(most * self.share))


#: 4 blocks of 256 threads with 64 registers each take all registers of a multiprocessor: nothing runs beside them.
WHOLE = Grid()

#: Beside other work: 24 of an H200's 132 multiprocessors. A block of 1024 threads takes a whole one, so the others stay
#: free for kernels that need theirs whole, as matrix products do. Narrower blocks would be spread over all of them.
SIDE = Grid(num_threads=1024, share=24 / 132)

_current: ContextVar[Grid] = ContextVar("grid", default=WHOLE)


def current_grid() -> Grid:
    return _current.get()


@contextmanager
def use_grid(grid: Grid) -> Iterator[None]:
    """Launch in this grid, in this thread."""
    token = _current.set(grid)
    try:
        yield
    finally:
        _current.reset(token)
