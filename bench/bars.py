"""The bars of this project, and what a run measured for each. They are reported, not asserted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from rich.table import Table

from bench import names
from bench.gpu_bench import DEFAULTS, SEVERAL_COUNT, SEVERAL_ON
from bench.lookup import baseline, find, grouped, our_row, speed_ratio, time_over_bytes
from bench.loop import NONE, OVERLAP
from bench.report import Report, Row
from bench.sharded import TORCH_MULTI
from bench.sharded import WORKLOADS as SHARDED_WORKLOADS
from bench.tables import kind_text, make_table, share_of_copy, warn
from bench.workloads import GPU_WORKLOADS

# How a measured number is written, by its unit; " MB" and others with three decimals.
DIGITS = {"x": ".2f", "%": ".1f", "": ".0f", " B": ".0f"}
# What was measured stands in this column, but on a GPU, where each backend has one.
MEASURED = "measured"


@dataclass(frozen=True)
class Bar:
    """One requirement: what is measured must be at least, or at most, ``limit``. None: nothing was measured."""

    work: str
    limit: float
    at_least: bool
    unit: str  # with the space before it, where there is one
    measured: dict[str, float | None]

    def met(self, column: str = MEASURED) -> bool | None:
        value = self.measured.get(column)
        return None if value is None else value >= self.limit if self.at_least else value <= self.limit

    def text(self, column: str = MEASURED) -> str:
        value = self.measured.get(column)
        return "not measured" if value is None else f"{value:{DIGITS.get(self.unit, '.3f')}}{self.unit}"

    @property
    def required_text(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g}{self.unit}"


def bars_table(report: Report, found: list[Bar]) -> Table:
    """Lay out every bar and whether it is met. A dry run has no verdicts."""
    columns = list(dict.fromkeys(column for bar in found for column in bar.measured))
    title = "DRY RUN: these are not GPU figures" if report.dry else "Bars"
    on_gpu = columns != [MEASURED]
    table = make_table(title, ("bar", "required"), (), plain=on_gpu)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
    for bar in found:
        verdicts = [
            "?" if bar.met(c) is None else "dry" if report.dry else "ok" if bar.met(c) else "SHORT" for c in columns
        ]
        cells = [
            cell for column, verdict in zip(columns, verdicts, strict=True) for cell in (bar.text(column), verdict)
        ]
        table.add_row(bar.work, bar.required_text, *cells, style="bold red" if "SHORT" in verdicts else None)
    return table if on_gpu else warn(table, report.rows)


# On a CPU

# An update may allocate this much, whatever the model.
ALLOCATED_BAR = 1_000_000
# Three averages in one pass may take this much over what their bytes take at the rate of one.
SEVERAL_BAR = 1.15
# By workload and dtype: how many times faster than torch's class as it comes, or for bf16 than the faster loop.
SPEED_BARS = {
    ("gpt2_medium", "float32"): 4.0,
    ("gpt2_medium", "bfloat16"): 6.0,
    ("2000x64x64", "float32"): 12.0,
    ("3000x64", "float32"): 20.0,
}


def cpu_bars(report: Report) -> list[Bar]:
    """Return every bar for which ``report`` holds what it compares."""
    found = [bar for rows in grouped(report.of_group(names.UPDATES)) for bar in _group_bars(rows)]
    for rows in grouped(report.of_group(names.SEVERAL)):
        one, three = find(rows, names.ONE), find(rows, names.THREE)
        if one is not None and three is not None and one.workload == "gpt2_medium":
            work = f"{one.title}, {one.dtype}: {names.THREE}, time over their bytes at the rate of one"
            found.append(_bar(work, SEVERAL_BAR, False, "x", time_over_bytes(three, one)))
    peaks = [peak for row in report.rows if row.provider in names.ALL_OURS and (peak := row.peak_bytes) is not None]
    if peaks:
        work = "memory one update allocates, largest"
        found.append(_bar(work, ALLOCATED_BAR / 1e6, False, " MB", max(peaks) / 1e6))
    return found


def _bar(work: str, limit: float, at_least: bool, unit: str, measured: float) -> Bar:
    return Bar(work, limit, at_least, unit, {MEASURED: measured})


def _group_bars(rows: list[Row]) -> Iterator[Bar]:
    first, ours = rows[0], our_row(rows)
    if ours is None:
        return
    where, required = f"{first.title}, {first.dtype}", SPEED_BARS.get((first.workload, first.dtype))
    today = find(rows, names.TORCH_CLASS) if first.dtype == "float32" else baseline(rows)
    if today is not None and required is not None:
        yield _bar(f"{where}: speed over {today.provider}", required, True, "x", today.seconds / ours.seconds)
    if first.workload != "gpt2_medium":
        return
    # The flat lerp_ is the bar of float32 params, our own float32 pass that of bf16 params.
    name, limit = (names.FLAT_LERP, 1.10) if first.dtype == "float32" else (names.OURS_FLOAT32, 1.05)
    other = find(rows, name)
    if other is not None:
        yield _bar(f"{where}: time over {name}", limit, False, "x", ours.seconds / other.seconds)


# On two ranks


def sharded_bars(report: Report) -> list[Bar]:
    found = []
    for workload in SHARDED_WORKLOADS:
        rows = [row for row in report.rows if row.title == workload.title]
        ratio = speed_ratio(rows, TORCH_MULTI, names.OURS)
        if ratio is not None:
            found.append(_bar(f"{workload.title}, 2 ranks: speed over {TORCH_MULTI}", workload.bar, True, "x", ratio))
    for mode in dict.fromkeys(row.mode for row in report.planned):
        of_mode, work = [row for row in report.planned if row.mode == mode], f"plan of Llama-3-405B, 1024 ranks, {mode}"
        above = 100 * (max(row.share for row in of_mode) - 1)
        found.append(_bar(f"{work}: above an even part", 0.1, False, "%", above))
        found.append(_bar(f"{work}: time", 0.5, False, " s", max(row.seconds for row in of_mode)))
        found.append(_bar(f"{work}: memory", 20.0, False, " MB", max(row.peak_bytes for row in of_mode) / 1e6))
    return found


# On a GPU

# In percent of a device copy of the same run.
SHARE_BAR, SHARED = 95.0, ("1e9", "llama3_8b")
# By workload: how many times as fast as torch's class, on the wall clock and on the device. fp32 params.
WALL_BARS = {"resnet50": 10.0, "vit_l_16": 1.5, "2000x64x64": 4.0, "3000x64": 4.0}
DEVICE_BARS = {"2000x64x64": 10.0, "3000x64": 10.0}
# In percent of a training step: what an attached average may add with overlap.
LOOP_BAR = 1.0
# Seconds that a call may take on the host: this, and this for each param.
HOST_S, HOST_S_PER_TENSOR = 20e-6, 0.5e-6

Groups = dict[tuple[str, str, str], list[Row]]
Described = tuple[str, float, bool, str, Callable[[str], "float | None"]]  # the last takes the name of a backend


def gpu_bars(report: Report) -> list[Bar]:
    """Return every bar, those without a measurement too."""
    groups = {rows[0].key: rows for rows in grouped(report.rows)}
    backends = names.OUR_BACKENDS["cpu" if report.dry else "cuda"]
    described = [*_speed_bars(groups), *_several_bars(groups), *_loop_bars(report), *_cost_bars(report)]
    described.append(_bits_bar(report))
    return [
        Bar(work, limit, at_least, unit, {backend: measure(backend) for backend in backends})
        for work, limit, at_least, unit, measure in described
    ]


def _ours(backend: str) -> str:
    return f"{names.OURS} {backend}"


def _speed_bars(groups: Groups) -> Iterator[Described]:
    for workload in SHARED:
        for dtype, format in DEFAULTS:
            rows = groups.get((workload, dtype, format), [])
            title = f"{rows[0].title if rows else GPU_WORKLOADS[workload].title}, {kind_text(dtype, format)}"
            yield f"{title}: of the device copy", SHARE_BAR, True, "%", partial(_percent, rows)
    for name in WALL_BARS:
        title, rows = GPU_WORKLOADS[name].title, groups.get((name, *DEFAULTS[0]), [])
        for kind, limits in (("wall", WALL_BARS), ("device", DEVICE_BARS)):
            if name in limits:
                work = f"{title}, fp32: torch's class, {kind} time"
                yield work, limits[name], True, "x", partial(_over_torch, rows, kind == "device")


def _over_torch(rows: list[Row], device: bool, backend: str) -> float | None:
    return speed_ratio(rows, names.TORCH_CLASS, _ours(backend), device=device)


def _percent(rows: list[Row], backend: str) -> float | None:
    share = share_of_copy(find(rows, _ours(backend)), rows)
    return None if share is None else 100 * share


def _several_bars(groups: Groups) -> Iterator[Described]:
    """Hold several averages in one pass to the time that their bytes take at the rate of one, on the same backend."""
    for workload in SEVERAL_ON:
        for dtype, format in DEFAULTS:
            one = groups.get((workload, dtype, format), [])
            several = groups.get((workload, dtype, f"{format} x{SEVERAL_COUNT}"), [])
            title = several[0].title.replace(", no embeddings", "") if several else GPU_WORKLOADS[workload].title

            work = f"{title}, {kind_text(dtype, format)}: {SEVERAL_COUNT} averages, time/bytes"
            yield work, SEVERAL_BAR, False, "x", partial(_over_bytes, several, one)


def _over_bytes(several: list[Row], one: list[Row], backend: str) -> float | None:
    row, base = find(several, _ours(backend)), find(one, _ours(backend))
    return None if row is None or base is None else time_over_bytes(row, base)


def _loop_bars(report: Report) -> Iterator[Described]:
    """Hold an average that follows an optimizer with overlap to a share of the step, and to the bits without."""
    bare = next((row for row in report.steps if row.way == NONE), None)
    followed = {row.backend: row for row in report.steps if row.way == OVERLAP}

    def exposed(backend: str) -> float | None:
        row = followed.get(backend)
        return None if row is None or row.share is None else 100 * row.share.median

    def differing(backend: str) -> float | None:
        row = followed.get(backend)
        return None if row is None or row.differing is None else float(row.differing)

    title = "a training step" if bare is None else f"a training step of {bare.work}"
    yield f"{title}: what overlap leaves exposed", LOOP_BAR, False, "%", exposed
    yield f"{title}: elements off with overlap", 0, False, "", differing


def _cost_bars(report: Report) -> Iterator[Described]:
    def least_over_compiled(backend: str) -> float | None:
        ratios = [speed_ratio(rows, names.COMPILED, _ours(backend)) for rows in grouped(report.rows)]
        return min((ratio for ratio in ratios if ratio is not None), default=None)

    def most(value: Callable[[Row], float | None]) -> Callable[[str], float | None]:
        def over_rows(backend: str) -> float | None:
            rows = [row for row in report.rows if row.provider == _ours(backend) and row.device]
            return max((found for row in rows if (found := value(row)) is not None), default=None)

        return over_rows

    def launches(row: Row) -> float | None:
        return None if row.launches is None else row.launches + (row.transfers or 0)

    def host_share(row: Row) -> float | None:
        return None if row.host is None else 100 * row.host.median / (HOST_S + HOST_S_PER_TENSOR * row.num_tensors)

    def waiting(row: Row) -> float | None:
        return None if row.waits is None or row.sync_error is None else float(row.waits or bool(row.sync_error))

    yield "compiled foreach, wall time, least", 1.0, True, "x", least_over_compiled
    yield "launches and transfers of an update, most", 1, False, "", most(launches)
    yield "host time, of 20 us + 0.5 us a tensor, most", 100, False, "%", most(host_share)
    yield "allocated by an update, most", 0, False, " B", most(lambda row: row.allocated_bytes)
    yield "an update that waits for the device (1: there is)", 0, False, "", most(waiting)


def _bits_bar(report: Report) -> Described:
    def differing(backend: str) -> float | None:
        cases = [hashes for hashes in report.bits.values() if backend in hashes]
        return float(sum(hashes[backend] != next(iter(hashes.values())) for hashes in cases)) if cases else None

    return f"cases of {len(report.bits)} whose bits are not the CPU's", 0, False, "", differing
