"""Times on a CPU or a GPU: all contestants in turn, in a new order each round, until the budget is spent.

A noisy machine slows whole stretches of time, not one contestant: what runs interleaved can be divided. Ratios are of
medians within one run, and figures of different runs are never mixed. ``torch.utils.benchmark`` and
``triton.testing.do_bench`` time one contestant after the other, so they do not serve here.

On a GPU each sample finds cold caches: copies of the model and its average are visited in turn, and where these do not
fill the cache several times over, a filler is read and written before the sample, which visits each copy once.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any

import torch

from bench.report import Row, Times

Call = Callable[[], object]

# Short updates are repeated until a sample is this long: the clock and the loop then cost under 0.1 %.
SAMPLE_S, SAMPLE_ON_GPU_S = 2e-3, 5e-3
# Enough for a median that one disturbed sample cannot move far, and a bound for the file of samples.
MIN_ROUNDS, MAX_ROUNDS = 5, 200
WARM_UPS = 2
# A contestant with samples shorter than a third of the longest takes more turns in a round: they cost little there.
MAX_TURNS = 3
# On a CPU a shorter sample follows an untimed call, or it would depend on who ran before it: of 3000 small tensors,
# ours took 1.3 ms after itself and 5 ms after seven others.
LEAD_IN_BELOW_S = 0.05
# What the copies of a rotation touch, as a multiple of the L2 cache; and how many there are where a filler makes up
# for the rest: a copy of 3000 tensors takes half a second to build and plan.
COVER, FILLED_COPIES = 4, 2
# The device sleeps while the host fills its queue, at most this long.
MAX_AHEAD_S = 0.05


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done its work. A CPU has, when the call returns."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def rotation_size(copy_bytes: int, l2_bytes: int) -> tuple[int, int]:
    """Return one copy or two, and the bytes of a filler where they do not exceed the L2 cache :data:`COVER` times."""
    if copy_bytes >= COVER * l2_bytes:
        return 1, 0
    return FILLED_COPIES, 0 if FILLED_COPIES * copy_bytes >= COVER * l2_bytes else COVER * l2_bytes


class Rotation:
    """The same update of several copies: each call updates the next one."""

    def __init__(self, *calls: Call) -> None:
        self.calls = calls
        self._turns = cycle(calls)

    def step(self) -> None:
        next(self._turns)()

    def once(self) -> None:
        for call in self.calls:
            call()


@dataclass
class Taken:
    """The samples of one contestant, in seconds per call, by kind."""

    calls_per_sample: int
    samples: dict[str, list[float]] = field(default_factory=dict)

    def into(self, row: Row) -> Row:
        times: dict[str, Any] = {kind: Times.of(samples) for kind, samples in self.samples.items()}
        return replace(row, calls_per_sample=self.calls_per_sample, **times)


class Clock:
    """The clock of one device.

    Args:
        apart: also time the device alone and the host alone, as a GPU run does. On a CPU the three are one.
    """

    def __init__(self, device: torch.device, *, apart: bool = False, filler_bytes: int = 0) -> None:
        self.device, self.apart, self.on_gpu = device, apart, device.type == "cuda"
        self._filler = torch.zeros(2, filler_bytes // 8, dtype=torch.int32, device=device) if filler_bytes else None
        self._cycles_per_s = self._measure_sleep() if self.on_gpu and apart else 0.0

    def evict(self) -> None:
        """Drive all else out of the cache. Half of what is left in it is to be written back, as after an update."""
        if self._filler is not None:
            self._filler[0].copy_(self._filler[1])

    def wall_s(self, call: Call, calls: int = 1) -> float:
        """Return the seconds of one of ``calls`` calls, with the device's work."""
        self.evict()
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(self.device)
        return (time.perf_counter() - start) / calls

    def device_s(self, call: Call, calls: int, ahead_s: float) -> float:
        """Return the device's seconds for one of ``calls`` calls whose launches wait in its queue already.

        ``ahead_s`` is how long the host takes for all of them. A call that waits for the device ends the head start,
        and what the device then waits for counts.
        """
        if not self.on_gpu:
            return self.wall_s(call, calls)
        synchronize(self.device)
        self.evict()
        self.sleep(min(MAX_AHEAD_S, 1.5 * ahead_s + 2e-4))
        return between_events(lambda: [call() for _ in range(calls)]) / calls

    def host_s(self, call: Call) -> float:
        """Return the seconds until the call returns, on an idle device."""
        synchronize(self.device)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def sleep(self, seconds: float) -> None:
        """Keep the device busy for about so long, without using its memory."""
        if self.on_gpu:
            torch.cuda._sleep(int(seconds * self._cycles_per_s))

    def _measure_sleep(self) -> float:
        cycles = 20_000_000
        torch.cuda._sleep(cycles)  # the clock rises with work
        return cycles / between_events(lambda: torch.cuda._sleep(cycles))

    def calls_per_sample(self, rotation: Rotation, lasting_s: float) -> int:
        """Return a multiple of the copies that lasts long enough; each copy once where a filler keeps them cold."""
        wanted, copies = SAMPLE_ON_GPU_S if self.on_gpu else SAMPLE_S, len(rotation.calls)
        return copies * (1 if self._filler is not None else max(1, math.ceil(wanted / lasting_s)))

    def leads_in(self, lasting_s: float) -> bool:
        """Return whether an untimed call comes before a sample that lasts so long."""
        return not self.on_gpu and self._filler is None and lasting_s < LEAD_IN_BELOW_S

    def take(self, rotation: Rotation, taken: Taken, head_s: float) -> None:
        """Add one sample of each kind."""
        calls, found = taken.calls_per_sample, {}
        if self.apart:
            found["device"] = self.device_s(rotation.step, calls, head_s * calls)
        found["wall"] = self.wall_s(rotation.step, calls)
        if self.apart:
            found["host"] = self.host_s(rotation.step)
        for kind, seconds in found.items():
            taken.samples.setdefault(kind, []).append(seconds)


def between_events(call: Call) -> float:
    """Return the seconds that the current stream takes for ``call``."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def rounds(names: Sequence[str], budget_s: float, *, least: int = MIN_ROUNDS) -> Iterator[str]:
    """Yield all ``names`` round by round, each time in a new order, for about ``budget_s`` seconds.

    The orders are drawn by a fixed seed: nobody always runs in the caches that the same other left.
    """
    order, shuffled, end = random.Random(0), list(names), time.perf_counter() + budget_s
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()  # no collection inside a sample, as ``timeit`` has it
    try:
        for done in range(MAX_ROUNDS):
            if done >= least and time.perf_counter() > end:
                break
            order.shuffle(shuffled)
            yield from shuffled
    finally:
        if enabled:
            gc.enable()


def interleave(
    contestants: Mapping[str, Rotation], budget_s: float, clock: Clock, *, min_rounds: int = MIN_ROUNDS
) -> dict[str, Taken]:
    """Time all contestants side by side for about ``budget_s`` seconds, and at least ``min_rounds`` rounds."""
    taken, lasting, heads = {}, {}, {}
    for name, rotation in contestants.items():
        # The fastest of the warm-ups: a disturbed one would leave samples too short for the whole run.
        fastest = min(clock.wall_s(rotation.once) for _ in range(WARM_UPS))
        taken[name] = Taken(clock.calls_per_sample(rotation, fastest))
        lasting[name] = taken[name].calls_per_sample * fastest / len(rotation.calls)
        heads[name] = clock.host_s(rotation.once) / len(rotation.calls)
    longest = max(lasting.values())
    turns = {name: min(MAX_TURNS, max(1, int(longest / (3 * seconds)))) for name, seconds in lasting.items()}
    names = [name for name, count in turns.items() for _ in range(count)]
    for name in rounds(names, budget_s, least=min_rounds):
        if clock.leads_in(lasting[name]):
            contestants[name].step()
        clock.take(contestants[name], taken[name], heads[name])
    return taken
