"""Bugs in the PTX of the kernels, as nvcc and as Triton made it: ``tests/plants/cuda_ptx.txt`` and ``triton_ptx.txt``.

The translated kernels have all of them, to be switched on one by one. ``tests/test_ptx.py`` is about the translator.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swafast.backends import cuda
from swafast.backends.triton import launch as triton_launch
from swafast.terms.formats import FLOAT32
from swafast.terms.rules import EqualAverage
from tests.kernels import (
    DTYPES,
    EXCHANGED,
    FORMATS,
    Prepare,
    by_weights,
    check_bad_count,
    check_exchange,
    check_long_runs,
    check_paces,
    check_updates,
    make_pair,
    update,
)
from tests.planting import Plant, read_plants
from tests.spreads import check_draws, drawing_of_each_path, pairs_of_each_path

# With one thread, so that a fork of this process may go on.
pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_thread")]


def see_updates(prepare: Prepare) -> None:
    pairs = [
        make_pair(n, dtype, fmt, offset) for dtype in DTYPES for fmt in FORMATS for n, offset in ((33, 1), (5000, 0))
    ]
    check_updates(prepare, pairs, by_weights(0.3, 0.5, 1.0), (1,))


def see_paces(prepare: Prepare) -> None:
    check_paces(prepare, 3, (9,))


def see_counts(prepare: Prepare) -> None:
    check_bad_count(prepare, 3, 2, -1)


def see_exchange(prepare: Prepare) -> None:
    # More chunks than blocks, so that blocks take a second one.
    pairs = [make_pair(33, dtype, fmt) for dtype, fmt in EXCHANGED * 3]
    check_exchange(prepare(pairs), pairs)


def see_nonfinite(prepare: Prepare) -> None:
    pairs = [make_pair(9, torch.float32, FLOAT32) for _ in range(20)]
    for pair in pairs:
        pair.param.normal_()
    launch, counter = prepare(pairs), torch.tensor(3)
    for first in (13, 1):  # a chunk that a block goes on to, and one that it begins with
        for pair in pairs[first:]:
            pair.param[4] = math.nan
        found = launch.first_nonfinite([pair.param for pair in pairs])
        assert found == first, f"another tensor is named: {found}"
    update(launch, pairs, [EqualAverage()], [counter], skip_nonfinite=True)
    assert counter == 3, "an update was not skipped"


def see_spreads(prepare: Prepare) -> None:
    check_updates(prepare, pairs_of_each_path(5000), by_weights(0.3), (7,))


def see_draws(prepare: Prepare) -> None:
    check_draws(prepare, drawing_of_each_path(5000))


def see_long_runs(prepare: Prepare) -> None:
    check_long_runs(prepare)


CHECKS = {
    "updates": see_updates,
    "paces": see_paces,
    "counts": see_counts,
    "exchange": see_exchange,
    "nonfinite": see_nonfinite,
    "spreads": see_spreads,
    "draws": see_draws,
    "long runs": see_long_runs,
}
BUGS = [(backend, bug) for backend in ("cuda", "triton") for bug in read_plants(f"{backend}_ptx")]


@pytest.fixture
def on_ptx(request: pytest.FixtureRequest) -> Callable[[str], tuple[ctypes.CDLL, Prepare]]:
    """Return a backend's library and what prepares its launches."""
    prepare = {"cuda": cuda.prepare, "triton": triton_launch.prepare}
    return lambda backend: (request.getfixturevalue(f"{backend}_on_ptx"), prepare[backend])


def run_in_each_order(library: ctypes.CDLL, check: Callable[[Prepare], None], prepare: Prepare) -> None:
    """Run a check with the threads of a block forward and in reverse: a missing barrier shows in one of the two."""
    order = ctypes.c_int.in_dll(library, "shim_reverse_threads")
    try:
        for order.value in (0, 1):
            check(prepare)
    finally:
        order.value = 0


def complaint_of(check: Callable[[], None], said: Path) -> str:
    """Return what a check says that fails, or the shim, or which signal ends it, in a process of its own."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        signal.alarm(60)
        try:
            check()
        except AssertionError as error:
            os.write(2, str(error).encode())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status != 0, "nothing was seen"
    ended = f"ended by {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else ""
    return said.read_text() + ended


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("check", CHECKS)
def test_nothing_is_seen_where_no_bug_is_on(on_ptx: Any, backend: str, check: str) -> None:
    library, prepare = on_ptx(backend)
    run_in_each_order(library, CHECKS[check], prepare)


@pytest.mark.parametrize(("backend", "bug"), BUGS, ids=lambda value: getattr(value, "name", value))
def test_a_bug_is_seen(on_ptx: Any, tmp_path: Path, backend: str, bug: Plant) -> None:
    library, prepare = on_ptx(backend)
    number = 1 + [each for of, each in BUGS if of == backend].index(bug)

    def check() -> None:
        ctypes.c_int.in_dll(library, "shim_bug").value = number
        run_in_each_order(library, CHECKS[bug.option], prepare)

    assert bug.expected in complaint_of(check, tmp_path / "said")
