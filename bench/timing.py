"""Timing in interleaved rounds: every contestant in turn, in a new order each round, until the budget is spent.

A noisy machine slows whole stretches of time, not one contestant: what runs interleaved can be divided. Ratios are of
medians within one run, and figures of different runs are never mixed.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

# Short updates are repeated until a sample is this long: the clock and the loop then cost under 0.1 %.
SAMPLE_S = 2e-3
# Enough for a median that one disturbed sample cannot move far, and a bound for the JSON.
MIN_ROUNDS, MAX_ROUNDS = 5, 200
WARM_UPS = 2
# A contestant with samples shorter than a third of the longest takes more turns in a round: they cost little there.
MAX_TURNS = 3
# A shorter sample follows an untimed call, or it would depend on who ran before it: of 3000 small tensors, ours took
# 1.3 ms after itself and 5 ms after seven others. Cold caches are what the training part measures.
LEAD_IN_BELOW_S = 0.05


@dataclass(frozen=True)
class Timing:
    """The samples of one contestant, in seconds per call."""

    calls_per_sample: int
    samples: list[float] = field(default_factory=list)


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what it was given; a CPU has, when the call returns."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep Python's garbage collector from running inside a sample, as ``timeit`` does."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def sample(call: Callable[[], None], calls: int, device: torch.device) -> float:
    """Give the seconds of one of ``calls`` calls, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def interleave(
    contestants: Mapping[str, Callable[[], None]],
    budget_s: float,
    device: torch.device,
    *,
    min_rounds: int = MIN_ROUNDS,
) -> dict[str, Timing]:
    """Time all contestants side by side for about ``budget_s`` seconds, and at least ``min_rounds`` rounds.

    The order of a round is drawn anew (by a fixed seed): nobody always runs in the caches that the same other left.
    """
    timings, lasting = {}, {}
    for name, call in contestants.items():
        # The fastest of the warm-ups: a disturbed one would leave samples too short for the whole run.
        fastest = min(sample(call, 1, device) for _ in range(WARM_UPS))
        timings[name] = Timing(math.ceil(SAMPLE_S / fastest))
        lasting[name] = timings[name].calls_per_sample * fastest
    order = random.Random(0)
    longest = max(lasting.values())
    turns = {name: min(MAX_TURNS, max(1, int(longest / (3 * seconds)))) for name, seconds in lasting.items()}
    names = [name for name, count in turns.items() for _ in range(count)]
    end = time.perf_counter() + budget_s
    with collector_paused():
        for done in range(MAX_ROUNDS):
            if done >= min_rounds and time.perf_counter() > end:
                break
            order.shuffle(names)
            for name in names:
                timing = timings[name]
                if lasting[name] < LEAD_IN_BELOW_S:
                    contestants[name]()
                timing.samples.append(sample(contestants[name], timing.calls_per_sample, device))
    return timings
