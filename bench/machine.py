"""What a figure was measured on, and with: written into every report."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "timm", "ema-pytorch", "diffusers")


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    return cpu_name() if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)


def git_commit() -> str | None:
    """Give the commit of this checkout, with a plus where files differ from it; None outside a checkout."""
    root = Path(__file__).parent
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    # Results of earlier runs are no change of what is measured.
    dirty = [line for line in changed.stdout.splitlines() if "bench/results/" not in line]
    return asked.stdout.strip() + ("+" if dirty else "")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    with suppress(ImportError):
        # Run from a clone, it may be there without being installed.
        import swafast

        found["swafast"] = swafast.__version__
    return found


def swafast_backend(device: torch.device) -> str | None:
    """Name the backend that updates run on, with its instruction set; None where swafast is not installed."""
    try:
        from swafast.backends import cpu
        from swafast.op.choice import choose_backends
    except ImportError:
        return None
    chosen = choose_backends(device_types={device.type})[0]
    return f"{chosen.name}, {cpu.current_isa()}" if chosen is cpu else chosen.name


class OthersCpu:
    """How much of the CPU other processes take, from now on: a kernel on all cores waits for the slowest of them.

    One busy process on one of two cores was seen to turn a ``lerp_`` of 20 us into 8 ms.
    """

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Give (seconds that all cores had, were busy, and were busy with this process); None off Linux."""
        try:
            ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        per_second = os.sysconf("SC_CLK_TCK")
        idle = ticks[3] + ticks[4]
        own = os.times()
        return sum(ticks) / per_second, (sum(ticks) - idle) / per_second, own.user + own.system

    def share(self) -> float | None:
        """Give what others took since the start as a part of all cores' time; what the host stole counts too."""
        end = self._now()
        if self._start is None or end is None or end[0] <= self._start[0]:
            return None
        total, busy, own = (after - before for after, before in zip(end, self._start, strict=True))
        return max(0.0, (busy - own) / total)


def environment(device: torch.device, command: str) -> dict[str, Any]:
    """Describe this machine and what is installed; nothing that names a person, a host or a path."""
    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "device_name": device_name(device),
        "cpu_name": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": _versions(),
        "swafast_backend": swafast_backend(device),
        "git_commit": git_commit(),
    }
