"""What a GPU run writes down: its rows, its other parts, and what it left out.

The JSON holds every sample, to five digits. A dry run has the same form, says so, and has another name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.loop import Followed
from bench.report import OK, Row, find, write_json

# Raised when a reader of an older file would misread it.
SCHEMA = 1

# The ceilings: a copy from device to device of as many bytes as the update moves, and one of this many.
COPY, COPY_BIG = "device copy", "device copy, 8 GB"
COPIES = (COPY, COPY_BIG)
OURS_PREFIX = "swafast "
# By device: our backends, the preferred one first. A dry run puts those of the CPU in their places.
OUR_BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpu", "reference")}
DIGITS = 5


# Workload, dtype of the params, format of the averages, and how many of these.
RowKey = tuple[str, str, str, int]


@dataclass(frozen=True)
class GpuRow(Row):
    """One provider on one workload. ``samples`` are wall times: many updates, and the wait at their end."""

    format: str = "float32"  # of the averages
    averages: int = 1  # in one pass
    copies: int = 1  # of model and average that take turns
    filler_bytes: int = 0  # read and written before a sample, to empty the cache
    device_s: list[float] = field(default_factory=list)  # between two events, the queue filled beforehand
    graph_s: list[float] = field(default_factory=list)  # as part of a CUDA graph
    host_s: list[float] = field(default_factory=list)  # until the call returns
    busy_s: float | None = None  # of all activities of the device within one update, without gaps (profiler)
    launches: int | None = None  # of kernels in one update
    transfers: int | None = None  # copies and fills in one update that are no kernels
    kernels: dict[str, int] = field(default_factory=dict)  # launches by the kernels' names, cut off
    waits: bool | None = None  # the call returned only when the device was done
    sync_error: str | None = None  # torch's complaint where waiting is an error; "" for none
    remarks: list[str] = field(default_factory=list)  # why something of it was not measured

    @property
    def key(self) -> RowKey:
        return self.workload, self.dtype, self.format, self.averages

    @property
    def kind(self) -> str:
        """Name what is averaged, and into what."""
        several = f" x{self.averages}" if self.averages > 1 else ""
        return self.dtype + (f" {self.format}" if self.format != self.dtype else "") + several

    @property
    def is_ours(self) -> bool:
        return self.provider.startswith(OURS_PREFIX)

    @property
    def device_seconds(self) -> float:
        return median(self.device_s)

    @property
    def host_seconds(self) -> float:
        return median(self.host_s)

    @property
    def device_bytes_per_s(self) -> float:
        return self.counted_bytes / self.device_seconds


@dataclass(frozen=True)
class Part:
    """One part of the run beside the times: the build, the tests, ..."""

    name: str
    status: str  # "ok", "failed" or "not run"
    detail: str = ""  # in one line: what came out of it, or why not
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.status == "failed"


@dataclass(frozen=True)
class GpuReport:
    environment: dict[str, Any]
    dry: bool  # on a CPU: nothing in it is a figure of a GPU
    parts: list[Part]
    rows: list[GpuRow]
    # By case and backend: a hash of all bits after a fixed set of updates.
    bits: dict[str, dict[str, str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    schema: int = SCHEMA
    # A training step and what averages add to it, by way and backend. Older files have none.
    loop: list[Followed] = field(default_factory=list)

    @property
    def backends(self) -> tuple[str, ...]:
        return OUR_BACKENDS["cpu" if self.dry else "cuda"]

    def groups(self) -> list[list[GpuRow]]:
        """Give the rows of each workload, dtype and format: dtype by dtype, in the order in which they ran."""
        found: dict[RowKey, list[GpuRow]] = {}
        for row in self.rows:
            found.setdefault(row.key, []).append(row)
        kinds = list(dict.fromkeys(key[1:] for key in found))
        return sorted(found.values(), key=lambda rows: kinds.index(rows[0].key[1:]))

    def part(self, name: str) -> Part | None:
        return next((part for part in self.parts if part.name == name), None)

    def failures(self) -> list[str]:
        """Give what went wrong: parts that failed, rows of ours that are wrong or missing, bits that differ."""
        found = [f"{part.name}: {part.detail}" for part in self.parts if part.failed]
        for row in self.rows:
            if row.is_ours and row.status in ("wrong", "failed", "not installed"):
                found.append(f"{row.provider} on {row.title}, {row.kind}: {row.status}: {row.reason}")
        differing = [case for case, hashes in self.bits.items() if len(set(hashes.values())) > 1]
        if differing:
            found.append(f"bits of {len(differing)} cases differ, the first is {differing[0]}")
        if not any(row.is_ours and row.device_s for row in self.rows):
            found.append("no update of swafast was timed")
        return found

    def to_dict(self) -> dict[str, Any]:
        return _rounded(asdict(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GpuReport:
        """Read what ``to_dict`` gave.

        Raises:
            ValueError: ``data`` was written by another version of this file.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f"schema must be {SCHEMA}, got {data.get('schema')}")
        parts = [Part(**part) for part in data["parts"]]
        rows = [GpuRow(**row) for row in data["rows"]]
        loop = [Followed(**row) for row in data.get("loop", [])]
        return cls(data["environment"], data["dry"], parts, rows, data["bits"], data["left_out"], loop=loop)

    def write(self, path: Path) -> None:
        write_json(path, self.to_dict())

    @classmethod
    def read(cls, path: Path) -> GpuReport:
        return cls.from_dict(json.loads(path.read_text()))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


def merged(rows: Iterable[GpuRow]) -> list[GpuRow]:
    """Join the samples of each ceiling, which was measured beside every provider anew."""
    found: dict[tuple[str | int, ...], GpuRow] = {}
    for row in rows:
        key = (*row.key, row.provider)
        before = found.get(key)
        if before is None or row.provider not in COPIES:
            found[key] = row
        else:
            found[key] = replace(before, device_s=[*before.device_s, *row.device_s])
    return list(found.values())


def with_profiles(rows: Iterable[GpuRow], profiles: Iterable[GpuRow]) -> list[GpuRow]:
    """Put what the profiler saw beside the times of the same provider, or why it saw nothing."""
    seen = {(*row.key, row.provider): row for row in profiles}
    return [_with_profile(row, seen.get((*row.key, row.provider))) for row in rows]


def _with_profile(row: GpuRow, seen: GpuRow | None) -> GpuRow:
    if seen is None or row.provider in COPIES:
        return row
    if seen.status != OK:
        return replace(row, remarks=[*row.remarks, f"profiler: {seen.reason}"])
    return replace(row, launches=seen.launches, transfers=seen.transfers, kernels=seen.kernels, busy_s=seen.busy_s)


def timed(rows: Iterable[GpuRow], provider: str) -> GpuRow | None:
    """Find a provider's row in a group, or None where it has no times."""
    return next((row for row in rows if row.provider == provider and row.device_s and row.status == OK), None)


def share_of_copy(row: GpuRow, rows: Iterable[GpuRow]) -> float | None:
    """Give the bytes a second of an update as a part of the same run's device copy of as many bytes."""
    copy = timed(rows, COPY)
    return row.device_bytes_per_s / copy.device_bytes_per_s if copy is not None and row.device_s else None


def wall_ratio(rows: Iterable[GpuRow], other: str, ours: str) -> float | None:
    """Give how many times as long as ``ours`` an update by ``other`` takes on the wall clock."""
    rows = list(rows)
    theirs, own = find(rows, other), find(rows, ours)
    return theirs.seconds / own.seconds if theirs is not None and own is not None else None
