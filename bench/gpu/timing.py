"""Times on a GPU: what the host pays, what the device pays, and each update in cold caches.

Copies of the model and its average are visited in turn, so that an update finds nothing of its own in the L2 cache.
Where so many copies would take minutes to build (3000 tensors of 64 need a hundred), a filler as large is read and
written before each sample, which then visits each copy once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import torch

from bench.timing import collector_paused, sample, synchronize

Call = Callable[[], None]

# What a rotation touches, as a multiple of the L2 cache.
COVER = 4
# The most tensors of all copies together: a copy of 3000 takes half a second to build and plan.
MAX_TENSORS, DRY_MAX_TENSORS = 24_000, 500
# A sample of short updates is about this long, where the caches stay cold in it.
SAMPLE_S = 5e-3
MIN_ROUNDS, MAX_ROUNDS = 5, 20
# The device sleeps while the host fills its queue, at most this long.
MAX_AHEAD_S = 0.05
# An update that returns while the device sleeps this long has not waited for it.
WAIT_PROBE_S = 0.03


@dataclass(frozen=True)
class RotationSize:
    """How many copies take turns, and the bytes of the filler that makes up for those that are missing."""

    copies: int
    filler_bytes: int


def rotation_size(copy_bytes: int, num_tensors: int, l2_bytes: int, max_tensors: int = MAX_TENSORS) -> RotationSize:
    """Give the copies that exceed the L2 cache :data:`COVER` times, or as many as there may be and a filler."""
    wanted = max(1, math.ceil(COVER * l2_bytes / copy_bytes))
    copies = max(1, min(wanted, max_tensors // num_tensors))
    return RotationSize(copies, COVER * l2_bytes if copies < wanted else 0)


class Rotation:
    """The same update of several copies, each call the next one's."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = list(calls)
        self._turns = cycle(self.calls)

    def step(self) -> None:
        next(self._turns)()

    def once(self) -> None:
        for call in self.calls:
            call()


@dataclass
class Samples:
    """Seconds of one update each, by what was measured."""

    calls: int
    wall: list[float] = field(default_factory=list)  # many updates and the wait at their end
    device: list[float] = field(default_factory=list)  # between two events, the queue filled beforehand
    host: list[float] = field(default_factory=list)  # until the call returns


class Stopwatch:
    """Takes the times of one device; on a CPU, where the host's and the device's are one, for dry runs."""

    def __init__(self, device: torch.device, filler_bytes: int = 0) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self._filler = torch.zeros(2, filler_bytes // 8, dtype=torch.int32, device=device) if filler_bytes else None
        self._cycles_per_s = self._measure_sleep() if self.on_gpu else 0.0

    def evict(self) -> None:
        """Drive all else out of the cache. Half of what is left in it is to be written back, as after an update."""
        if self._filler is not None:
            self._filler[0].copy_(self._filler[1])

    def _measure_sleep(self) -> float:
        cycles = 20_000_000
        torch.cuda._sleep(cycles)  # the clock rises with work
        return cycles / self._between_events(lambda: torch.cuda._sleep(cycles))

    def sleep(self, seconds: float) -> None:
        """Keep the device busy for so long, roughly, without using its memory."""
        if self.on_gpu:
            torch.cuda._sleep(int(seconds * self._cycles_per_s))

    def _between_events(self, call: Call) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def wall_s(self, call: Call, calls: int) -> float:
        self.evict()
        return sample(call, calls, self.device)

    def device_s(self, call: Call, calls: int, ahead_s: float) -> float:
        """Give the device's seconds for one of ``calls`` calls, when their launches wait in its queue already.

        ``ahead_s`` is how long the host takes for all of them. A call that waits for the device ends the head start,
        and what the device then waits for counts.
        """
        if not self.on_gpu:
            return self.wall_s(call, calls)
        synchronize(self.device)
        self.evict()
        self.sleep(min(MAX_AHEAD_S, 1.5 * ahead_s + 2e-4))

        def all_calls() -> None:
            for _ in range(calls):
                call()

        return self._between_events(all_calls) / calls

    def host_s(self, call: Call) -> float:
        """Give the seconds until the call returns, on an idle device."""
        synchronize(self.device)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def calls_per_sample(self, rotation: Rotation) -> int:
        """Give a multiple of the copies that lasts long enough; each copy once where a filler keeps them cold."""
        copies = len(rotation.calls)
        if self._filler is not None:
            return copies
        lasting = min(sample(rotation.once, 1, self.device) for _ in range(2))
        return copies * max(1, math.ceil(SAMPLE_S / lasting))

    def measure(self, rotation: Rotation, beside: Sequence[Rotation], budget_s: float) -> tuple[Samples, list[Samples]]:
        """Time ``rotation``, and on the device those ``beside`` it in the same rounds, for about ``budget_s``."""
        all_samples = [Samples(self.calls_per_sample(each)) for each in (rotation, *beside)]
        heads = [self.host_s(each.once) / len(each.calls) for each in (rotation, *beside)]
        first = all_samples[0]
        end = time.perf_counter() + budget_s
        with collector_paused():
            for done in range(MAX_ROUNDS):
                if done >= MIN_ROUNDS and time.perf_counter() > end:
                    break
                for each, samples, head in zip((rotation, *beside), all_samples, heads, strict=True):
                    samples.device.append(self.device_s(each.step, samples.calls, head * samples.calls))
                first.wall.append(self.wall_s(rotation.step, first.calls))
                first.host.append(self.host_s(rotation.step))
        return first, all_samples[1:]

    def graph_s(self, rotation: Rotation) -> list[float]:
        """Give the seconds of an update as part of a CUDA graph of all copies, one sample for each replay."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rotation.once()
        graph.replay()
        copies = len(rotation.calls)
        return [self.device_s(graph.replay, 1, 1e-4) / copies for _ in range(MIN_ROUNDS)]

    def waits(self, call: Call, host_s: float) -> bool:
        """Say whether ``call`` returns only when the device has done what it was given before."""
        asleep = max(WAIT_PROBE_S, 10 * host_s)
        synchronize(self.device)
        self.sleep(asleep)
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        synchronize(self.device)
        return took > asleep / 2

    def sync_error(self, call: Call) -> str:
        """Give torch's complaint where ``call`` makes it wait for the device, or nothing."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            return str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return ""
