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
#: Elements that lie closer than this are read together with what is between them: a read costs as much as 4 KB.
_CLOSE = 16

#: Fills memory with the bytes of a file from an offset on.
ReadAt = Callable[[int, memoryview], None]


def are_sizes(value: object) -> bool:
    """Return whether a value of a file may be the sizes of a tensor: as many and as large as torch can have."""
    return (
        isinstance(value, tuple | list)
        and len(value) <= 64
        and all(type(size) is int and size >= 0 for size in value)
        and math.prod(max(size, 1) for size in value) < 1 << 60
    )


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
        # The innermost loop goes along neighbours in the file.
        dims.sort(key=lambda dim: dim[1] == 1)
        *outer, (count, step, into_step) = dims or [(1, 1, 1)]
        words = into.cast(_WORDS[self.itemsize])
        for index in itertools.product(*(range(size) for size, _, _ in outer)):
            at = first + sum(i * stride for i, (_, stride, _) in zip(index, outer, strict=True))
            begin = sum(i * stride for i, (_, _, stride) in zip(index, outer, strict=True))
            self._read_line(at, count, step, words[begin : begin + (count - 1) * into_step + 1], into_step)

    def _read_line(self, at: int, count: int, step: int, into: memoryview, into_step: int) -> None:
        offset = self.offset + at * self.itemsize
        if step == into_step == 1:
            self.read_at(offset, into.cast("B"))
        elif step <= _CLOSE:
            buffer = memoryview(bytearray((max(step * (count - 1), 0) + 1) * self.itemsize))
            self.read_at(offset, buffer)
            words = buffer.cast(_WORDS[self.itemsize])
            into[::into_step] = words[::step] if step else memoryview(bytes(buffer) * count).cast(_WORDS[self.itemsize])
        else:
            for index in range(count):
                word = into[index * into_step : index * into_step + 1]
                self.read_at(offset + index * step * self.itemsize, word.cast("B"))


def _joined(dims: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Join neighbouring dimensions (size, stride, stride) that are as one in both memories."""
    joined: list[tuple[int, int, int]] = []
    for size, stride, into_stride in dims:
        if joined and joined[-1][1:] == (stride * size, into_stride * size):
            joined[-1] = (joined[-1][0] * size, stride, into_stride)
        else:
            joined.append((size, stride, into_stride))
    return joined


def extent_of(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Return the number of elements from the first to the last of a tensor."""
    if math.prod(sizes) == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
