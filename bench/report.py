"""What a run writes down: plain dataclasses, one JSON file, and the names by which rows are found again.

A report of another device reuses these as they are: nothing here knows what was timed, or on what.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

# Raised when a reader of an older file would misread it.
SCHEMA = 1

# Provider names that tables, bars and pictures look rows up by.
TORCH_CLASS = "torch AveragedModel"
TORCH_EMA = "torch AveragedModel, EMA fn"
FLAT_LERP = "one flat lerp_"
MUL_ADD = "mul_().add_()"
LERP_FLOAT = "lerp_(p.float())"
OURS = "swafast"
OURS_EXACT = "swafast exact"
OURS_FLOAT32 = "swafast float32"
ALL_OURS = (OURS, OURS_EXACT, OURS_FLOAT32)
# Of the tables that compare our own passes with each other.
FLOAT32, EXACT = "float32", "exact"
ONE, TWO, THREE = "1 average", "2 averages in one pass", "3 averages in one pass"
THREE_APART = "3 averages in three passes"

OK = "ok"

RowT = TypeVar("RowT", bound="Row")


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a report, with the folder that it goes into."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


@dataclass(frozen=True)
class Row:
    """One provider on one workload. No samples unless ``status`` is ok: a wrong provider has no speed."""

    workload: str
    title: str
    dtype: str  # of the params
    provider: str
    num_params: int
    num_tensors: int
    counted_bytes: int  # the least that an update of this workload must move
    status: str = OK  # "ok", "wrong", "failed", "skipped" or "not installed"
    reason: str = ""  # why it is not ok
    note: str = ""  # what a reader must know to compare it
    error: float | None = None  # worst tensor's relative L2 distance from float64
    calls_per_sample: int = 1
    samples: list[float] = field(default_factory=list)  # seconds per update
    allocated_bytes: int | None = None  # peak of torch's allocator within one update
    resident_bytes: int | None = None  # growth of the process within one update
    held_bytes: int | None = None  # averages and whatever is kept beside them
    others_cpu: float | None = None  # what other processes took of all cores' time while this was timed

    @property
    def seconds(self) -> float:
        return median(self.samples)

    @property
    def wrong(self) -> bool:
        """Whether this provider was tried and did not do its work."""
        return self.status in ("wrong", "failed")

    @property
    def gb_per_s(self) -> float:
        return self.counted_bytes / self.seconds / 1e9

    @property
    def peak_bytes(self) -> int | None:
        """The larger of both measures of memory: each is blind to something that the other sees."""
        seen = [value for value in (self.allocated_bytes, self.resident_bytes) if value is not None]
        return max(seen, default=None)


@dataclass(frozen=True)
class TrainingRow:
    """One class averaging along one training loop: per block of steps, the seconds in steps and in updates."""

    model: str
    setting: str  # "alone" or "DDP, 2 ranks"
    provider: str
    every: int  # steps between updates
    num_params: int
    steps_per_block: int
    step_s: list[float]  # per block, without updates
    update_s: list[float]  # per block

    @property
    def share(self) -> float:
        """Median over blocks of the time spent averaging, as a part of all time."""
        return median(update / (step + update) for step, update in zip(self.step_s, self.update_s, strict=True))

    @property
    def step_ms(self) -> float:
        """Median milliseconds of one step, without updates."""
        return median(self.step_s) / self.steps_per_block * 1e3

    @property
    def update_ms(self) -> float:
        """Median milliseconds of one update inside the loop."""
        return median(self.update_s) * self.every / self.steps_per_block * 1e3


@dataclass(frozen=True)
class Report:
    environment: dict[str, Any]
    rows: list[Row]
    training: list[TrainingRow] = field(default_factory=list)
    schema: int = SCHEMA
    # Our own passes, which were timed beside each other and beside nothing else. Older files have none.
    formats: list[Row] = field(default_factory=list)
    several: list[Row] = field(default_factory=list)

    def row(self, workload: str, dtype: str, provider: str) -> Row | None:
        """Find one measured row, or None."""
        for row in self.rows:
            if (row.workload, row.dtype, row.provider) == (workload, dtype, provider) and row.samples:
                return row
        return None

    def groups(self) -> list[list[Row]]:
        """Give the rows of each (workload, dtype) that was run, in the order in which they ran."""
        return grouped(self.rows)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Read what ``to_dict`` gave.

        Raises:
            ValueError: ``data`` was written by another version of this file.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f"schema must be {SCHEMA}, got {data.get('schema')}")
        rows = [Row(**row) for row in data["rows"]]
        training = [TrainingRow(**row) for row in data["training"]]
        formats, several = ([Row(**row) for row in data.get(part, [])] for part in ("formats", "several"))
        return cls(data["environment"], rows, training, formats=formats, several=several)

    def write(self, path: Path) -> None:
        write_json(path, self.to_dict())

    @classmethod
    def read(cls, path: Path) -> Report:
        return cls.from_dict(json.loads(path.read_text()))


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Give the rows of each (workload, dtype), in the order in which they ran."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.workload, row.dtype), []).append(row)
    return list(found.values())


def time_over_bytes(row: Row, base: Row) -> float:
    """Give the time of ``row`` over what its bytes would take at the rate of ``base``."""
    return (row.seconds / base.seconds) / (row.counted_bytes / base.counted_bytes)


def find(rows: Iterable[RowT], provider: str) -> RowT | None:
    """Find a provider's row among those of one group, or None where it has no time."""
    return next((row for row in rows if row.provider == provider and row.samples), None)


def baseline(rows: Iterable[RowT]) -> RowT | None:
    """Give what a user would run today for an average that is sound.

    For float32 params that is torch's class. Its average of bf16 params freezes, so there it is the faster of the two
    loops that keep a float32 average.
    """
    rows = list(rows)
    if rows and rows[0].dtype == "float32":
        return find(rows, TORCH_CLASS)
    loops = [row for name in (MUL_ADD, LERP_FLOAT) if (row := find(rows, name)) is not None]
    return min(loops, key=lambda row: row.seconds, default=None)


def our_row(rows: Iterable[Row]) -> Row | None:
    """Give our row in the default format of the params' dtype."""
    rows = list(rows)
    return find(rows, OURS) or find(rows, OURS_EXACT)
