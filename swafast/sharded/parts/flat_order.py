"""A flat order of params, cut evenly into parts; ints in, ints out."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

#: Borders inside a param are multiples of this many elements: whole cache lines and vectors for every dtype. No rank
#: gets more than this above an even part.
BORDER_NUMEL = 64


@dataclass(frozen=True)
class Run:
    """Consecutive elements of one tensor in a list."""

    index: int  # of the tensor
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


class FlatOrder:
    """Tensors one after the other, cut evenly into parts.

    Args:
        numels: number of elements of each tensor.
        parts: number of parts.
        whole: for each tensor, whether it must not be cut; default: all may be cut.
    """

    def __init__(self, numels: Sequence[int], parts: int, whole: Sequence[bool] | None = None) -> None:
        self._ends = list(itertools.accumulate(numels))
        self.numel = self._ends[-1] if self._ends else 0
        self._whole = whole
        self._borders = [self._border(self.numel * part // parts) for part in range(parts)] + [self.numel]

    def _border(self, ideal: int) -> int:
        """Return the allowed border that is used for an ideal one."""
        index = bisect_right(self._ends, ideal)
        if index == len(self._ends):
            return self.numel
        begin, end = self._ends[index - 1] if index else 0, self._ends[index]
        if self._whole is not None and self._whole[index]:
            return begin if ideal - begin < end - ideal else end
        return begin + (ideal - begin) // BORDER_NUMEL * BORDER_NUMEL

    def bounds(self, part: int) -> tuple[int, int]:
        """Return where a part begins and ends in the flat order."""
        return self._borders[part], self._borders[part + 1]

    def runs(self, start: int, stop: int) -> list[Run]:
        """Return the runs of tensors between ``start`` and ``stop`` in the flat order."""
        runs = []
        index = bisect_right(self._ends, start)
        while start < stop:
            begin = self._ends[index - 1] if index else 0
            until = min(stop, self._ends[index])
            if until > start:
                runs.append(Run(index, start - begin, until - begin))
            start, index = max(start, until), index + 1
        return runs
