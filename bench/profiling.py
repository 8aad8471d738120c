"""What an update allocates, and what the device does for it, as torch's profiler and the system see them.

torch's allocator reports every tensor, temporaries included, but nothing that native code takes by itself; the growth
of the process sees all memory, but not what is taken from a heap that was already there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.timing import synchronize

Call = Callable[[], object]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# To clear_refs: set the peak of resident memory back to what is resident now (Linux, proc(5)).
_RESET_PEAK = "5"
# Device activities that are no kernels, and those that are no work, by how their names begin.
TRANSFERS = ("Memcpy", "Memset")
NO_WORK = ("Context", "Stream", "Event", "[memory]")
# Kept of the names of kernels: the longest have 500 characters.
NAME_CHARS, NAMES_KEPT = 60, 6


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """Keep the profiler's own lines off the terminal. Restore the variable afterwards."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]
        else:
            os.environ["KINETO_LOG_LEVEL"] = before


def events_of(call: Call, device: torch.device, **options: Any) -> Sequence[Any]:
    """Return the profiler's raw events of one call."""
    activity = ProfilerActivity.CPU if device.type == "cpu" else ProfilerActivity.CUDA
    synchronize(device)
    with quiet_profiler(), profile(activities=[activity], **options) as profiler:
        call()
        synchronize(device)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    return profiler.profiler.kineto_results.events()


def allocated_peak(call: Call, device: torch.device) -> int:
    """Return the most bytes of tensors that one call holds at once beyond what was there before."""
    if device.type == "cpu":
        events = [event for event in events_of(call, device, profile_memory=True) if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        return max(accumulate((event.nbytes() for event in events), initial=0))
    module = torch.get_device_module(device)
    synchronize(device)
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    call()
    synchronize(device)
    return module.max_memory_allocated(device) - before


def allocated_total(call: Call, device: torch.device) -> int:
    """Return the bytes that one call asks of the device's allocator, freed again or not; the peak on a CPU."""
    if device.type == "cpu":
        return allocated_peak(call, device)
    before = torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"]
    call()
    return torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"] - before


def resident_growth(call: Call) -> int | None:
    """Return how many bytes the process grows by within one call; None where the system does not tell (not Linux)."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
        before = _status_bytes("VmRSS")
        call()
        return max(0, _status_bytes("VmHWM") - before)
    except (OSError, LookupError):
        return None


def _status_bytes(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            # in kB
            return int(line.split()[1]) * 1024
    raise LookupError(key)


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages under ``tensors``, each storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@dataclass(frozen=True)
class Activity:
    """What the device did for one update."""

    kernels: dict[str, int]  # launches by name
    transfers: int  # copies and fills that are no kernels
    seconds: float  # of all of these, without the gaps between them

    @classmethod
    def of(cls, events: Sequence[tuple[str, int]]) -> Activity | None:
        """Sort the device's activities (name, nanoseconds). None where the profiler saw no work."""
        work = [(name, ns) for name, ns in events if not name.startswith(NO_WORK)]
        kernels = Counter(name for name, _ in work if not name.startswith(TRANSFERS))
        transfers = len(work) - kernels.total()
        return cls(dict(kernels), transfers, sum(ns for _, ns in work) / 1e9) if work else None

    @property
    def launches(self) -> int:
        return sum(self.kernels.values())

    @property
    def short_names(self) -> dict[str, int]:
        most = Counter(self.kernels).most_common(NAMES_KEPT)
        return {name[:NAME_CHARS]: count for name, count in most}


def activity(call: Call, device: torch.device) -> Activity | None:
    """Return what the profiler saw on the device during one call.

    It runs in a process of its own: from its first use on, the profiler's library slows launches down, and it does not
    go together with CUDA graphs.
    """
    events = events_of(call, device)
    return Activity.of(
        [(event.name(), event.duration_ns()) for event in events if event.device_type() == DeviceType.CUDA]
    )
