"""What the device does for one update, as torch's profiler sees it: how many launches, and how long they take alone.

This has a process of its own, after all times: the profiler's library slows launches down from its first use on, and
does not go together with CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.memory import quiet_profiler
from bench.timing import synchronize

# Device activities that are no kernels, and those that are no work, by how their names begin.
TRANSFERS = ("Memcpy", "Memset")
NO_WORK = ("Context", "Stream", "Event", "[memory]")
# Kept of the names of kernels: the longest are of 500 characters.
NAME_CHARS, NAMES_KEPT = 60, 6


@dataclass(frozen=True)
class Activity:
    """What the device did for one update."""

    kernels: dict[str, int]  # launches by name
    transfers: int  # copies and fills that are no kernels
    seconds: float  # of all of these, without the gaps between them

    @property
    def launches(self) -> int:
        return sum(self.kernels.values())

    @property
    def short_names(self) -> dict[str, int]:
        most = sorted(self.kernels.items(), key=lambda item: -item[1])[:NAMES_KEPT]
        return {name[:NAME_CHARS]: count for name, count in most}


def activity(call: Callable[[], None], device: torch.device) -> Activity | None:
    """Give what the profiler saw on the device during one call; None where it saw nothing."""
    synchronize(device)
    with quiet_profiler(), profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize(device)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    return sum_up([(event.name(), event.duration_ns()) for event in events if event.device_type() == DeviceType.CUDA])


def sum_up(events: Sequence[tuple[str, int]]) -> Activity | None:
    """Sort the device's activities (name, nanoseconds) into kernels and transfers."""
    work = [(name, ns) for name, ns in events if not name.startswith(NO_WORK)]
    if not work:
        return None
    kernels: dict[str, int] = {}
    for name, _ in work:
        if not name.startswith(TRANSFERS):
            kernels[name] = kernels.get(name, 0) + 1
    return Activity(kernels, len(work) - sum(kernels.values()), sum(ns for _, ns in work) / 1e9)
