"""Elements of a file that lie with a stride, read into memory in row-major order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..terms.boxes import boxes_of_run

#: memoryview's format of words, by their bytes.
_WORDS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
#: What one read costs, in bytes: so many that are not needed are read, rather than to read twice.
_READ_NBYTES = 4096
#: What is read at once if not all of it is needed.
_BLOCK_NBYTES = 1 << 20

#: A dimension of elements that are read: its size, its stride in the file, and its stride in memory.
_Dim = tuple[int, int, int]

#: Fills memory with the bytes of a file from an offset on.
ReadAt = Callable[[int, memoryview], None]


def row_major(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a dense row-major tensor."""
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if sizes else ()


@dataclass(frozen=True)
class Region:
    """A tensor's elements in a file."""

    read_at: ReadAt
    offset: int  # of the first element, in bytes
    itemsize: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # in elements

    def read_run(self, start: int, stop: int, into: memoryview) -> None:
        """Read elements ``start`` to ``stop``, counted in row-major order."""
        if self.strides == row_major(self.sizes):
            self.read_at(self.offset + start * self.itemsize, into)
            return
        for box in boxes_of_run(self.sizes, start, stop):
            self.read_box(box.offsets, box.sizes, into[box.start * self.itemsize :], row_major(box.sizes))

    def read_box(
        self,
        offsets: Sequence[int],  # of the box in the tensor
        sizes: Sequence[int],
        into: memoryview,  # begins with the box's first element
        strides: Sequence[int],  # of the box's elements in `into`
    ) -> None:
        """Read a box of the tensor, into elements that lie with other strides."""
        first = sum(offset * stride for offset, stride in zip(offsets, self.strides, strict=True))
        dims = _joined([dim for dim in zip(sizes, self.strides, strides, strict=True) if dim[0] != 1])
        dims.sort(key=lambda dim: -dim[1])
        self._read_dims(first, dims, into.cast(_WORDS[self.itemsize]))

    def _read_dims(self, at: int, dims: Sequence[_Dim], into: memoryview) -> None:
        """Read elements from ``at`` on, the dimensions with the largest strides in the file first."""
        if all(stride == into_stride == 1 for _, stride, into_stride in dims):
            self.read_at(self.offset + at * self.itemsize, into[: _extent(dims)].cast("B"))
            return
        (size, stride, into_stride), *inner = dims
        room, width = _BLOCK_NBYTES // self.itemsize, _extent(inner)
        if not self._is_one_read(inner):
            for index in range(size):
                self._read_dims(at + index * stride, inner, into[index * into_stride :])
            return
        # Many lines go into one buffer: with what is between them, or one behind another.
        is_close = stride <= width or self._is_one_read([(2, stride, 0), *inner])
        step = stride if is_close else width
        count = max(1 + (room - width) // max(step, 1), 1)
        for start in range(0, size, count):
            some = min(count, size - start)
            buffer = memoryview(bytearray(((some - 1) * step + width) * self.itemsize))
            offset, line = self.offset + (at + start * stride) * self.itemsize, width * self.itemsize
            if is_close:
                self.read_at(offset, buffer)
            else:
                for index in range(some):
                    self.read_at(offset + index * stride * self.itemsize, buffer[index * line : (index + 1) * line])
            words = buffer.cast(_WORDS[self.itemsize])
            _copy(words, into[start * into_stride :], [(some, step, into_stride), *inner])

    def _is_one_read(self, dims: Sequence[_Dim]) -> bool:
        """Return whether it is cheaper to read all from the first to the last element at once."""
        nbytes, runs = _extent(dims) * self.itemsize, math.prod(size for size, stride, _ in dims if stride > 1)
        return nbytes <= min(_BLOCK_NBYTES, runs * _READ_NBYTES)


def _copy(words: memoryview, into: memoryview, dims: Sequence[_Dim]) -> None:
    """Copy elements of ``words`` into others."""
    # The longest one is the innermost: each of its lines is one call.
    *outer, (count, step, into_step) = sorted(dims, key=lambda dim: dim[0])
    for index in itertools.product(*(range(size) for size, _, _ in outer)):
        at = sum(i * stride for i, (_, stride, _) in zip(index, outer, strict=True))
        begin = sum(i * stride for i, (_, _, stride) in zip(index, outer, strict=True))
        line = into[begin : begin + (count - 1) * into_step + 1 : into_step]
        if step:
            line[:] = words[at : at + (count - 1) * step + 1 : step]
        else:
            line[:] = memoryview(bytes(words[at : at + 1]) * count).cast(_WORDS[words.itemsize])


def _joined(dims: list[_Dim]) -> list[_Dim]:
    """Join neighbouring dimensions (size, stride, stride) that are as one in both memories."""
    joined: list[_Dim] = []
    for size, stride, into_stride in dims:
        if joined and joined[-1][1:] == (stride * size, into_stride * size):
            joined[-1] = (joined[-1][0] * size, stride, into_stride)
        else:
            joined.append((size, stride, into_stride))
    return joined


def _extent(dims: Sequence[_Dim]) -> int:
    return extent_of([size for size, _, _ in dims], [stride for _, stride, _ in dims])


def extent_of(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Return the number of elements from the first to the last of a tensor."""
    if math.prod(sizes) == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
