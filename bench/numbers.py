"""The bars that this project set itself, and what a run measured of each. Reported, not asserted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.report import (
    ALL_OURS,
    FLAT_LERP,
    ONE,
    OURS_FLOAT32,
    THREE,
    Report,
    Row,
    baseline,
    find,
    grouped,
    our_row,
    time_over_bytes,
)

# An update may allocate this much, whatever the model.
ALLOCATED_BAR = 1_000_000
# How a measured number is written, by its unit; " MB" and others with three decimals.
DIGITS = {"x": ".2f", "%": ".1f", "": ".0f", " B": ".0f"}


@dataclass(frozen=True)
class Bar:
    """One requirement: ``measured`` must be at least, or at most, ``limit``."""

    work: str
    limit: float
    at_least: bool
    measured: float
    unit: str  # with the space before it, where there is one

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    @property
    def required_text(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g}{self.unit}"

    @property
    def measured_text(self) -> str:
        return f"{self.measured:{DIGITS.get(self.unit, '.3f')}}{self.unit}"


def bars(report: Report) -> list[Bar]:
    """Give every bar for which ``report`` holds what it compares."""
    found = [bar for rows in report.groups() for bar in _group_bars(rows)]
    found += [bar for rows in grouped(report.several) for bar in _several_bars(rows)]
    peaks = [peak for row in report.rows if row.provider in ALL_OURS and (peak := row.peak_bytes) is not None]
    if peaks:
        found.append(Bar("memory one update allocates, largest", ALLOCATED_BAR / 1e6, False, max(peaks) / 1e6, " MB"))
    return found


# By workload and dtype: how many times faster than what a user would run today.
SPEED_BARS = {
    ("gpt2_medium", "float32"): 4.0,
    ("gpt2_medium", "bfloat16"): 6.0,
    ("2000x64x64", "float32"): 12.0,
    ("3000x64", "float32"): 20.0,
}


def _group_bars(rows: list[Row]) -> Iterator[Bar]:
    first = rows[0]
    where = f"{first.title}, {first.dtype}"
    ours = our_row(rows)
    if ours is None:
        return
    today, required = baseline(rows), SPEED_BARS.get((first.workload, first.dtype))
    if today is not None and required is not None:
        yield Bar(f"{where}: speed over {today.provider}", required, True, today.seconds / ours.seconds, "x")
    if first.workload != "gpt2_medium":
        return
    for name, limit in ((FLAT_LERP, 1.10), (OURS_FLOAT32, 1.05)):
        other = find(rows, name)
        # The flat lerp_ is the bar of float32 params, our own float32 pass that of bf16 params.
        if other is not None and (name == FLAT_LERP) == (first.dtype == "float32"):
            yield Bar(f"{where}: time over {name}", limit, False, ours.seconds / other.seconds, "x")


# Three averages in one pass may take this much over what their bytes take at the rate of one.
SEVERAL_BAR = 1.15


def _several_bars(rows: list[Row]) -> Iterator[Bar]:
    one, three = find(rows, ONE), find(rows, THREE)
    if one is not None and three is not None and one.workload == "gpt2_medium":
        work = f"{one.title}, {one.dtype}: {THREE}, time over their bytes at the rate of one"
        yield Bar(work, SEVERAL_BAR, False, time_over_bytes(three, one), "x")
