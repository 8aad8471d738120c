"""The report of every command: rows with a summary of their times, in one JSON.

The JSON is small enough for git: of each set of samples it keeps the median, the quartiles and the count. The samples
themselves go to a file of lines beside it, which stays where it was measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench import names

# Raised when a reader of an older file would misread it.
SCHEMA = 2
# Significant digits of every figure in a file.
DIGITS = 6


@dataclass(frozen=True)
class Times:
    """Seconds of one call: the median and the quartiles of ``count`` samples."""

    median: float
    low: float
    high: float
    count: int
    samples: tuple[float, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, samples: Iterable[float]) -> Times:
        kept = tuple(samples)
        low, _, high = quantiles(kept, method="inclusive") if len(kept) > 1 else kept * 3
        return cls(median(kept), low, high, len(kept), kept)


@dataclass(frozen=True)
class Row:
    """One provider on one workload. It has times only if ``status`` is ok: a wrong provider has no speed."""

    workload: str
    title: str
    dtype: str  # of the params
    provider: str
    num_params: int
    num_tensors: int
    counted_bytes: int  # the least that an update must move
    group: str = names.UPDATES
    format: str = ""  # of the averages
    averages: int = 1  # in one pass
    status: str = "ok"  # "ok", "wrong", "failed", "skipped" or "not installed"
    reason: str = ""  # why it is not ok
    note: str = ""  # what a reader must know to compare it
    error: float | None = None  # the worst tensor's relative L2 distance from float64
    calls_per_sample: int = 1
    wall: Times | None = None  # many updates and the wait at their end
    device: Times | None = None  # between two events on a GPU, with the queue filled beforehand
    host: Times | None = None  # until the call returns
    allocated_bytes: int | None = None  # asked of a GPU's allocator within one update
    held_bytes: int | None = None  # averages and whatever is kept beside them
    others_cpu: float | None = None  # share of all cores that other processes took meanwhile
    copies: int = 1  # of model and average, visited in turn
    filler_bytes: int = 0  # read and written before a sample, to empty the cache
    launches: int | None = None  # of kernels in one update
    transfers: int | None = None  # copies and fills in one update that are no kernels
    waits: bool | None = None  # the call returned only when the device was done
    remarks: list[str] = field(default_factory=list)  # why something was not measured

    @property
    def key(self) -> tuple[str, str, str]:
        return self.workload, self.dtype, self.group

    @property
    def seconds(self) -> float:
        assert self.wall is not None
        return self.wall.median

    @property
    def bytes_per_s(self) -> float:
        """Return the rate on the device, or else on the wall clock."""
        times = self.device or self.wall
        assert times is not None
        return self.counted_bytes / times.median

    @property
    def is_ours(self) -> bool:
        return self.provider.startswith(names.OURS) or self.group in (names.FORMATS, names.SEVERAL)


@dataclass(frozen=True)
class StepRow:
    """One way of averaging beside a training step."""

    work: str
    way: str
    num_params: int
    step: Times
    backend: str | None = None  # of an average of ours; None: the default
    exposed: Times | None = None  # this step less the step without averaging of the same round
    share: Times | None = None  # ``exposed`` over that step; no seconds
    differing: int | None = None  # elements of an average of ours that are not those of the plain one
    others_cpu: float | None = None


@dataclass(frozen=True)
class Curve:
    """The errors of one average along its updates."""

    stream: str
    rule: str
    format: str
    errors: list[float]  # relative L2 distance from float64, at the report's updates


@dataclass(frozen=True)
class Part:
    """One part of a GPU run: the build, the tests, ..."""

    name: str
    status: str  # "ok", "failed" or "not run"
    detail: str = ""  # in one line: what it found, or why it did not run
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FileRow:
    """One way to average checkpoints in files: the best of some rounds."""

    way: str
    dtype: str
    num_inputs: int
    nbytes: int  # of one input
    status: str = "ok"  # as in Row
    reason: str = ""
    wall_s: float = 0.0
    cpu_s: float = 0.0  # of the process, user and system
    peak_bytes: int = 0
    rounds: int = 0
    differing: float | None = None  # the share of elements that are not the float64 mean rounded once
    others_cpu: float | None = None


ITEMS: dict[str, type] = {"rows": Row, "steps": StepRow, "curves": Curve, "parts": Part, "files": FileRow}


@dataclass
class Report:
    """All that one command found. Each command fills the lists that it has something for."""

    environment: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    steps: list[StepRow] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    updates: list[int] = field(default_factory=list)  # at which the curves were read
    parts: list[Part] = field(default_factory=list)
    files: list[FileRow] = field(default_factory=list)
    bits: dict[str, dict[str, str]] = field(default_factory=dict)  # by case and backend: a hash of all bits
    left_out: list[str] = field(default_factory=list)
    dry: bool = False  # a GPU run on a CPU: no figure of a GPU
    schema: int = SCHEMA

    def of_group(self, group: str) -> list[Row]:
        return [row for row in self.rows if row.group == group]

    @property
    def differing(self) -> int:
        """Return the elements of attached averages that are not those of the plain ones."""
        return sum(row.differing or 0 for row in self.steps)

    def add(self, line: str) -> None:
        """Add what :func:`item_line` wrote."""
        for kind, item in json.loads(line).items():
            if kind == "bits":
                for case, hashes in item.items():
                    self.bits.setdefault(case, {}).update(hashes)
            else:
                getattr(self, kind).append(_built(ITEMS[kind], item))

    def to_dict(self) -> dict[str, Any]:
        data = {each.name: getattr(self, each.name) for each in fields(self)}
        data |= {kind: [_bare(item) for item in data[kind]] for kind in ITEMS}
        return {key: value for key, value in data.items() if value not in ([], {}, False)}

    def write(self, path: Path) -> None:
        """Write the summary in one step: whoever reads it, at any moment, finds this report or the one before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = ",\n".join(f" {json.dumps(key)}: {_indented(value)}" for key, value in _rounded(self.to_dict()).items())
        beside = path.with_name(f".{path.name}.part")
        with beside.open("w") as file:
            file.write(f"{{\n{text}\n}}\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)

    def write_samples(self, path: Path) -> None:
        """Write every item with its samples, one a line."""
        path.write_text("".join(item_line(kind, item) for kind in ("rows", "steps") for item in getattr(self, kind)))

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read what ``write`` wrote.

        Raises:
            ValueError: the file was written by another version of this module.
        """
        data = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            raise ValueError(f"schema must be {SCHEMA}, got {data.get('schema')}")
        lists = {kind: [_built(ITEMS[kind], item) for item in data.get(kind, [])] for kind in ITEMS}
        return cls(**{**data, **lists})


def count_text(count: int, noun: str) -> str:
    """Write so many of a noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def item_line(kind: str, item: Any) -> str:
    """Return one item with its samples as a line of JSON."""
    return json.dumps({kind: _rounded(_bare(item, samples=True) if kind in ITEMS else item)}) + "\n"


def _bare(item: Any, *, samples: bool = False) -> dict[str, Any]:
    """Return the fields of a dataclass that are not at their defaults."""
    data = asdict(item)
    for each in fields(item):
        value = data[each.name]
        if value == each.default or value in ([], {}):
            del data[each.name]
        elif isinstance(value, dict) and "samples" in value and not samples:
            del value["samples"]
    return data


def _built(kind: type, data: dict[str, Any]) -> Any:
    return kind(**{key: _times(value) for key, value in data.items()})


def _times(value: Any) -> Any:
    """Return the times that ``value`` holds, or ``value`` itself."""
    if isinstance(value, dict) and {"median", "low", "high", "count"} <= value.keys():
        return Times(**{**value, "samples": tuple(value.get("samples", ()))})
    return value


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


def _indented(value: Any) -> str:
    """Return JSON with one item a line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
    return json.dumps(value)
