"""A closer look at one update on a GPU: launches, allocations, waiting."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.timing import Clock, synchronize

Call = Callable[[], object]

# Device activities that are no kernels, and those that are no work, by how their names begin.
TRANSFERS = ("Memcpy", "Memset")
NO_WORK = ("Context", "Stream", "Event", "[memory]")
# An update that returns while the device sleeps this long has not waited for it.
WAIT_PROBE_S = 0.03


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def allocated_total(call: Call, device: torch.device) -> int | None:
    """Return the bytes that one call asks of the device's allocator, freed again or not; None on a CPU."""
    if device.type == "cpu":
        return None
    before = torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"]
    call()
    return torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"] - before


def waits(clock: Clock, call: Call, host_s: float) -> bool:
    """Return whether ``call`` returns only when the device has done its earlier work."""
    asleep = max(WAIT_PROBE_S, 10 * host_s)
    synchronize(clock.device)
    clock.sleep(asleep)
    start = time.perf_counter()
    call()
    took = time.perf_counter() - start
    synchronize(clock.device)
    return took > asleep / 2


def launches_among(names: Sequence[str]) -> dict[str, int]:
    """Count launches of kernels and transfers among a device's activities. Empty where the profiler saw no work."""
    work = [name for name in names if not name.startswith(NO_WORK)]
    transfers = sum(name.startswith(TRANSFERS) for name in work)
    return {"launches": len(work) - transfers, "transfers": transfers} if work else {}


def activity(call: Call, device: torch.device) -> dict[str, int]:
    """Return what the profiler saw on the device during one call.

    It runs in a process of its own: from its first use on, the profiler's library slows launches down, and it does not
    go together with CUDA graphs.
    """
    kind = ProfilerActivity.CPU if device.type == "cpu" else ProfilerActivity.CUDA
    synchronize(device)
    # The profiler's own lines stay off the terminal.
    with patch.dict(os.environ, {"KINETO_LOG_LEVEL": "99"}), profile(activities=[kind]) as profiler:
        call()
        synchronize(device)
    results: Any = profiler.profiler
    events = results.kineto_results.events()
    return launches_among([event.name() for event in events if event.device_type() == DeviceType.CUDA])
