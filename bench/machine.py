"""The machine and the versions behind a figure: each report holds them."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "timm", "ema-pytorch", "diffusers", "triton")


def cpu_name() -> str:
    return _line_of("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def _line_of(path: str, key: str) -> str | None:
    """Return what a file of Linux says about ``key``; None elsewhere."""
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return None


def device_name(device: torch.device) -> str:
    return cpu_name() if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)


def _output_of(*command: str) -> str | None:
    """Return what a program prints, run in this checkout, or None where it fails."""
    try:
        root = Path(__file__).parent
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def git_commit() -> str | None:
    """Return the commit of this checkout, with a plus where files differ from it; None outside a checkout."""
    commit, changed = _output_of("git", "rev-parse", "HEAD"), _output_of("git", "status", "--porcelain")
    # Results of earlier runs are no change of what is measured.
    dirty = [line for line in (changed or "").splitlines() if "bench/results/" not in line]
    return commit and commit + ("+" if dirty else "")


def _versions() -> dict[str, str]:
    import swafast  # run from a clone, it may be there without being installed

    found = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return {**found, "swafast": swafast.__version__}


class OthersCpu:
    """The share of the CPU that other processes take from now on. A kernel on all cores waits for the slowest core.

    One busy process on one of two cores once turned a ``lerp_`` of 20 us into 8 ms.
    """

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Return the seconds that all cores had, were busy, and were busy with us and our children (Linux, proc(5))."""
        ticks = [int(each) / os.sysconf("SC_CLK_TCK") for each in Path("/proc/stat").read_text().split()[1:9]]
        own = os.times()
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4], sum(own[:4])

    def share(self) -> float:
        """Return what others took since the start, as a share of all cores' time. Time stolen by the host counts."""
        total, busy, own = (after - before for after, before in zip(self._now(), self._start, strict=True))
        return max(0.0, (busy - own) / total) if total > 0 else 0.0


def environment(device: torch.device, command: str) -> dict[str, Any]:
    """Describe this machine and its packages. Name no person, no host and no path."""
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
        "git_commit": git_commit(),
    }


def available_bytes(device: torch.device) -> int:
    """Return the memory that this process may still take on ``device``."""
    if device.type != "cpu":
        return torch.get_device_module(device).mem_get_info(device)[0]
    return int((_line_of("/proc/meminfo", "MemAvailable") or "0").split()[0]) * 1024


def gpu_facts() -> dict[str, Any]:
    """Describe the GPU, and nothing that tells one machine from another of its kind."""
    about = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return {
        "gpu": about.name,
        "compute_capability": f"{about.major}.{about.minor}",
        "architecture": f"{about.major}{about.minor}",
        "l2_bytes": about.L2_cache_size,
        "multiprocessors": about.multi_processor_count,
        "memory_bytes": total,
        "free_bytes": free,
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda_runtime": torch.version.cuda,
    }


def source_digest(root: Path) -> str:
    """Hash the measured sources, to tell copies of the tree without git apart."""
    state = hashlib.sha256()
    for folder in ("csrc", "swafast"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                state.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return state.hexdigest()
