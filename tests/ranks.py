"""Run a function as several ranks: real processes, real gloo.

A server that has torch imported and nothing run forks the processes, so a start takes a fraction of a second. Forking
pytest itself would inherit OpenMP's threads, which do not live through a fork.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any, ParamSpec

import torch
import torch.distributed as dist

#: Starts processes in which torch is imported.
starter = multiprocessing.get_context("forkserver")
starter.set_forkserver_preload(["tests.ranks_preload"])

P = ParamSpec("P")

#: No collective of a test takes longer, unless a peer is missing.
TIMEOUT = timedelta(seconds=60)


class RankFailedError(AssertionError):
    """A rank raised: its traceback."""


def run_ranks(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: timedelta = TIMEOUT,
    expect: int | None = None,
    plant: Callable[[], object] | None = None,
) -> list[Any]:
    """Run ``function(*args)`` on ranks 0 to ``world - 1`` of a gloo group, and return what each returned.

    Args:
        timeout: of the process group.
        expect: how many ranks are to answer; default: all. The rest may die, or stop: they are killed in the end.
        plant: plants a bug in each rank's process, which ends with it; default: that of `planted`.

    Raises:
        RankFailedError: a rank raised.
    """
    expected = world if expect is None else expect
    plant = plant or next(iter(_planted), None)
    with tempfile.TemporaryDirectory() as folder:
        pipes: list[Connection] = []
        processes = []
        for rank in range(world):
            ours, theirs = starter.Pipe(duplex=False)
            process = starter.Process(
                target=_rank,
                args=(
                    *(rank, world, f"{folder}/store", timeout, theirs, expected == world),
                    *(torch.are_deterministic_algorithms_enabled(), plant, function, args),
                ),
                daemon=True,
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            answered, answers = _answers(pipes, expected, deadline=monotonic() + 120.0)
            for rank in answered:
                processes[rank].join(10.0)
            return answers
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()


#: The bugs that `planted` has in every rank's process.
_planted: list[Callable[[], object]] = []


@contextlib.contextmanager
def planted(plant: Callable[[], object]) -> Iterator[None]:
    """Plant a bug in each rank's process that the body starts."""
    _planted.append(plant)
    try:
        yield
    finally:
        _planted.pop()


def on_ranks(world: int, **options: Any) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a test of a function that so many ranks run; ``options`` are those of `run_ranks`."""

    def decorate(body: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(body)
        def test(*args: P.args, **kwargs: P.kwargs) -> None:
            if multiprocessing.parent_process() is not None:  # on a rank, which finds the test by its name
                body(*args, **kwargs)
            else:
                run_ranks(world, functools.partial(test, *args, **kwargs), **options)

        return test

    return decorate


def _answers(pipes: list[Connection], expected: int, deadline: float) -> tuple[list[int], list[Any]]:
    """Return the ranks that have answered, and every rank's answer."""
    answers: list[Any] = [None] * len(pipes)
    answered: list[int] = []
    open_pipes = dict(enumerate(pipes))
    while open_pipes and len(answered) < expected:
        ready = wait(open_pipes.values(), max(0.0, deadline - monotonic()))
        assert ready, f"only {len(answered)} of {expected} ranks came to their end in time"
        for rank in [rank for rank, pipe in open_pipes.items() if pipe in ready]:
            with contextlib.suppress(EOFError):  # it died
                good, value = pickle.loads(open_pipes.pop(rank).recv_bytes())
                if not good:
                    raise RankFailedError(f"rank {rank}: {value}")
                answers[rank] = value
                answered.append(rank)
    assert len(answered) >= expected, f"only {len(answered)} of {expected} ranks answered"
    return answered, answers


def _rank(
    rank: int,
    world: int,
    store: str,
    timeout: timedelta,
    pipe: Connection,
    all_live: bool,
    is_deterministic: bool,
    plant: Callable[[], object] | None,
    function: Callable[..., Any],
    args: tuple,
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(20)
    torch.use_deterministic_algorithms(
        is_deterministic, warn_only=True
    )  # as conftest.py has it: unwritten memory shows
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
        if plant is not None:
            plant()
        answer = (True, function(*args))
        if all_live:  # gloo may abort a rank whose peers leave before it
            with contextlib.suppress(RuntimeError):
                dist.barrier()
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()
    with contextlib.suppress(Exception):
        dist.destroy_process_group()
