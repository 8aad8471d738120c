"""What an update allocates, by two measures that see different things.

torch's allocator reports every tensor, temporaries included, but nothing that native code takes by itself; the growth
of the process sees all memory, but not what is taken from a heap that was already there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# To clear_refs: set the peak of resident memory back to what is resident now (Linux, proc(5)).
_RESET_PEAK = "5"


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """Keep the profiler's own lines off the terminal; the variable is put back."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]
        else:
            os.environ["KINETO_LOG_LEVEL"] = before


def allocated_peak(call: Callable[[], None], device: torch.device) -> int:
    """Give the most bytes of tensors that one call holds at once beyond what was there before."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.synchronize(device)
        module.reset_peak_memory_stats(device)
        before = module.memory_allocated(device)
        call()
        module.synchronize(device)
        return module.max_memory_allocated(device) - before
    with quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def allocated_total(call: Callable[[], None], device: torch.device) -> int:
    """Give the bytes that one call asks of the device's allocator, freed again or not; the peak on a CPU."""
    if device.type == "cpu":
        return allocated_peak(call, device)
    before = torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"]
    call()
    return torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"] - before


def resident_growth(call: Callable[[], None]) -> int | None:
    """Give how many bytes the process grows by within one call; None where the system does not say (not Linux)."""
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


def available_bytes(device: torch.device) -> int:
    """Give the memory that this process may still take on ``device``."""
    if device.type != "cpu":
        return torch.get_device_module(device).mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # Not Linux: half of all memory is a guess that leaves the machine usable.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Give the bytes of the storages under ``tensors``, each storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
