"""Split a run of a param's elements in memory into boxes of the param."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what reads files imports no torch
    from torch import Tensor


def are_sizes(value: object) -> bool:
    """Return whether a value of a file may be the sizes of a tensor: as many and as large as torch can have."""
    return (
        isinstance(value, tuple | list)
        and len(value) <= 64
        and all(type(size) is int and size >= 0 for size in value)
        and math.prod(max(size, 1) for size in value) < 1 << 60
    )


@dataclass(frozen=True)
class Box:
    """A box of a param, with the place of its elements in a run of memory."""

    offsets: tuple[int, ...]  # of the box in the whole param
    sizes: tuple[int, ...]
    start: int  # index of its first element in the run
    order: tuple[int, ...]  # dimensions, the slowest in memory first

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def of_run(self, run: Tensor) -> Tensor:
        """Return a view of the box, in its own shape, into the run's elements (1-D)."""
        flat = run[self.start : self.start + self.numel]
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return flat.view([self.sizes[dim] for dim in self.order]).permute(inverse)

    def of_whole(self, whole: Tensor) -> Tensor:
        """Return a view of the box into the whole param."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            whole = whole.narrow(dim, offset, size)
        return whole

    def overlap(self, other: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """Return where the elements that two boxes share are in this box and in the other; None if there are none."""
        starts = [max(ours, theirs) for ours, theirs in zip(self.offsets, other.offsets, strict=True)]
        ends = [
            min(ours + size, theirs + width)
            for ours, size, theirs, width in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        ]
        if any(start >= end for start, end in zip(starts, ends, strict=True)):
            return None
        ours, theirs = (
            tuple(slice(start - at, end - at) for start, end, at in zip(starts, ends, box.offsets, strict=True))
            for box in (self, other)
        )
        return ours, theirs


def boxes_of_run(
    sizes: Sequence[int],
    start: int,
    stop: int,
    offsets: Sequence[int] | None = None,
    order: Sequence[int] | None = None,
) -> tuple[Box, ...]:
    """Split elements ``start`` to ``stop`` of a dense box into at most ``2 * ndim - 1`` boxes.

    Args:
        sizes: the sizes of the dense box.
        start, stop: indices of elements, counted in the order of memory.
        offsets: the offsets of the dense box in the whole param; default: zeros.
        order: the dimensions of the dense box, the slowest in memory first; default: row-major.
    """
    dims = tuple(range(len(sizes))) if order is None else tuple(order)
    origin = (0,) * len(sizes) if offsets is None else tuple(offsets)
    boxes = []
    for corner, extents, at in _boxes([sizes[dim] for dim in dims], start, stop):
        corner_in_whole, size = list(origin), [0] * len(sizes)
        for dim, first, extent in zip(dims, corner, extents, strict=True):
            corner_in_whole[dim] += first
            size[dim] = extent
        boxes.append(Box(tuple(corner_in_whole), tuple(size), at - start, dims))
    return tuple(boxes)


def _boxes(sizes: list[int], start: int, stop: int) -> list[tuple[list[int], list[int], int]]:
    """Return (corner, sizes, index of the first element) for each box of a row-major run, in order."""
    if start >= stop:
        return []
    if not sizes:
        return [([], [], start)]
    row = math.prod(sizes[1:])
    first, last = start // row, stop // row
    found = []

    def within(index: int, begin: int, end: int) -> None:
        for corner, extents, at in _boxes(sizes[1:], begin, end):
            found.append(([index, *corner], [1, *extents], index * row + at))

    if first == last:
        within(first, start - first * row, stop - first * row)
        return found
    if start > first * row:
        within(first, start - first * row, row)
        first += 1
    if last > first:
        found.append(([first, *(0 for _ in sizes[1:])], [last - first, *sizes[1:]], first * row))
    within(last, 0, stop - last * row)
    return found
