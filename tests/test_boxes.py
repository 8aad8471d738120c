"""Cuts of a flat order and the boxes of a run, against sets of indices that are written out one by one."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest

from swafast.sharded.parts import all_gather, flat_order
from swafast.sharded.parts.all_gather import pieces_of
from swafast.sharded.parts.flat_order import BORDER_NUMEL, FlatOrder, Run
from swafast.terms import boxes
from swafast.terms.boxes import Box, boxes_of_run

# Boxes


def memory_order(sizes: Sequence[int], offsets: Sequence[int], order: Sequence[int]) -> list[tuple[int, ...]]:
    """Return each element's index in the whole param, in the order of memory."""
    found = []
    for at in itertools.product(*(range(sizes[dim]) for dim in order)):
        index = list(offsets)
        for dim, i in zip(order, at, strict=True):
            index[dim] += i
        found.append(tuple(index))
    return found


def indices_of(box: Box) -> list[tuple[int, ...]]:
    return memory_order(box.sizes, box.offsets, box.order)


def check_boxes(sizes: Sequence[int], start: int, stop: int, offsets: Sequence[int], order: Sequence[int]) -> None:
    expected = memory_order(sizes, offsets, order)[start:stop]
    found = boxes.boxes_of_run(sizes, start, stop, offsets, order)
    assert len(found) <= max(1, 2 * len(sizes) - 1), (sizes, start, stop, order)
    assert [index for box in found for index in indices_of(box)] == expected, (sizes, start, stop, order)
    place = 0
    for box in found:
        assert box.start == place
        assert box.numel == math.prod(box.sizes) > 0
        place += box.numel
    assert place == stop - start


SHAPES = [shape for ndim in range(4) for shape in itertools.product(range(4), repeat=ndim) if math.prod(shape) <= 18]


@pytest.mark.parametrize("ndim", range(4))
def test_every_run_of_every_small_shape(ndim: int) -> None:
    for sizes in (shape for shape in SHAPES if len(shape) == ndim):
        numel = math.prod(sizes)
        for start in range(numel + 1):
            for stop in range(start, numel + 1):
                check_boxes(sizes, start, stop, (0,) * ndim, range(ndim))


def test_random_boxes_of_any_layout_anywhere() -> None:
    source = random.Random(20)
    reached = set()
    for _ in range(1500):
        ndim = source.randint(1, 5)
        sizes = [source.choice((1, 2, 3, 4, 7)) for _ in range(ndim)]
        numel = math.prod(sizes)
        start, stop = sorted(source.randint(0, numel) for _ in range(2))
        order = source.sample(range(ndim), ndim)
        check_boxes(sizes, start, stop, [source.randint(0, 9) for _ in range(ndim)], order)
        reached.add((ndim, len(boxes_of_run(sizes, start, stop))))
    assert {(1, 1), (2, 3), (3, 5), (4, 7)} <= reached  # the bound is tight


def test_a_large_run_is_worked_out_without_its_elements() -> None:
    sizes = (128256, 16384)
    start, stop = 7, math.prod(sizes) - 7
    found = boxes_of_run(sizes, start, stop)
    assert [box.sizes for box in found] == [(1, 16377), (128254, 16384), (1, 16377)]
    assert [box.offsets for box in found] == [(0, 7), (1, 0), (128255, 0)]


# Cuts


def check_cuts(numels: Sequence[int], parts: int, whole: Sequence[bool] | None = None) -> None:
    order = flat_order.FlatOrder(numels, parts, whole)
    assert order.numel == sum(numels)
    seen: list[tuple[int, int, int]] = []
    for part in range(parts):
        start, stop = order.bounds(part)
        runs = order.runs(start, stop)
        assert sum(run.numel for run in runs) == stop - start >= 0
        assert all(run.numel > 0 for run in runs)
        largest_whole = max((numel for numel, kept in zip(numels, whole or (), strict=False) if kept), default=0)
        assert stop - start <= -(-sum(numels) // parts) + BORDER_NUMEL + largest_whole, (numels, parts, part)
        seen.extend((run.index, run.start, run.stop) for run in runs)
    # All parts together are every element of every tensor, in order, and once.
    for index, numel in enumerate(numels):
        runs_here = [(start, stop) for i, start, stop in seen if i == index]
        assert [start for start, _ in runs_here] == [0, *(stop for _, stop in runs_here)][: len(runs_here)]
        assert (runs_here[-1][1] if runs_here else 0) == numel
        cuts = [start for start, _ in runs_here[1:]]
        assert not (whole and whole[index] and cuts), f"{index} was cut"
        assert all(cut % BORDER_NUMEL == 0 for cut in cuts)
    assert [index for index, _, _ in seen] == sorted(index for index, _, _ in seen)


@pytest.mark.parametrize("numels", [[], [0], [1], [0, 0, 5, 0], [64], [65], [1, 63, 64, 65, 0, 1000], [1000] * 7])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7, 64])
def test_cuts_cover_every_element_once(numels: list[int], parts: int) -> None:
    check_cuts(numels, parts)
    for index in range(len(numels)):
        check_cuts(numels, parts, [i == index for i in range(len(numels))])
    check_cuts(numels, parts, [True] * len(numels))


def test_random_cuts() -> None:
    source = random.Random(20)
    for _ in range(400):
        numels = [source.choice((0, 1, 3, 64, 100, source.randint(0, 5000))) for _ in range(source.randint(1, 12))]
        check_cuts(numels, source.choice((*range(1, 10), 1000)))
        check_cuts(numels, source.randint(1, 9), [source.random() < 0.3 for _ in numels])


# Windows


def check_windows(runs: Sequence[Run], itemsizes: Sequence[int], nbytes: int) -> None:
    seen = []
    for window in all_gather.pieces_of(runs, itemsizes, nbytes):
        assert window
        aligned = [-(-run.numel * itemsizes[run.index] // 16) * 16 for run in window]
        # What lies last in a window need not be followed by anything.
        assert sum(aligned[:-1]) + window[-1].numel * itemsizes[window[-1].index] <= nbytes
        seen.extend(window)
    wanted = [(run.index, i) for run in runs for i in range(run.start, run.stop)]
    assert [(run.index, i) for run in seen for i in range(run.start, run.stop)] == wanted


@pytest.mark.parametrize("nbytes", [16, 32, 48, 208, 4096])
def test_windows_hold_every_element_once(nbytes: int) -> None:
    source = random.Random(nbytes)
    for _ in range(100):
        itemsizes = [source.choice((2, 4, 8, 16)) for _ in range(6)]
        runs = [Run(index, start, start + source.randint(0, 90)) for index, start in enumerate([0, 64, 0, 7, 128, 1])]
        check_windows(runs, itemsizes, nbytes)
    assert list(pieces_of([], [], nbytes)) == []


# Each gate kills a bug


def merge_boxes(patch: pytest.MonkeyPatch) -> None:
    # As if a run were always whole rows.
    of_run = boxes.boxes_of_run

    def rows(sizes, start, stop, offsets=None, order=None):
        row = math.prod(sizes[1:]) or 1
        return of_run(sizes, start // row * row, stop, offsets, order)

    patch.setattr(boxes, "boxes_of_run", rows)


def forget_the_order(patch: pytest.MonkeyPatch) -> None:
    of_run = boxes.boxes_of_run
    patch.setattr(boxes, "boxes_of_run", lambda sizes, a, b, offsets=None, order=None: of_run(sizes, a, b, offsets))


def cut_anywhere(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flat_order, "BORDER_NUMEL", 1)


def cut_coarsely(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flat_order, "BORDER_NUMEL", 4096)


def cut_what_is_whole(patch: pytest.MonkeyPatch) -> None:
    init = FlatOrder.__init__
    patch.setattr(FlatOrder, "__init__", lambda self, numels, parts, whole=None: init(self, numels, parts))


def drop_the_last_window(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(all_gather, "pieces_of", lambda *args: list(pieces_of(*args))[:-1])


GATES: list[tuple[Callable[[pytest.MonkeyPatch], None], Callable[[], None]]] = [
    (merge_boxes, lambda: test_every_run_of_every_small_shape(2)),
    (forget_the_order, test_random_boxes_of_any_layout_anywhere),
    (cut_anywhere, lambda: test_cuts_cover_every_element_once([1000] * 7, 3)),
    (cut_coarsely, test_random_cuts),
    (cut_what_is_whole, lambda: test_cuts_cover_every_element_once([1000] * 7, 3)),
    (drop_the_last_window, lambda: test_windows_hold_every_element_once(208)),
]


@pytest.mark.parametrize(("plant", "gate"), GATES, ids=[plant.__name__ for plant, _ in GATES])
def test_the_gate_kills_the_bug(
    plant: Callable[[pytest.MonkeyPatch], None], gate: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        gate()
