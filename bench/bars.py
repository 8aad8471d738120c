"""The bars of a GPU run, and what it measured of each backend. They are reported, not asserted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench import names
from bench.cases import DEFAULTS, LARGEST, SEVERAL_COUNT, SEVERAL_ON
from bench.lookup import find, grouped, share_of_copy, time_over_bytes
from bench.loop import ATTACHED, NONE, OVERLAP
from bench.report import Report, Row
from bench.tables import kind_text, markdown
from bench.workloads import GPU_WORKLOADS

# How a measured number is written, by its unit; " MB" and others with three decimals.
DIGITS = {"x": ".2f", "%": ".1f", "": ".0f", " B": ".0f"}

# Three averages in one pass may take this much over what their bytes take at the rate of one.
SEVERAL_BAR = 1.15
# In percent of a device copy of the same run, and by workload how many times as fast as torch's class over
# fp32 params, on the wall clock and on the device.
SHARE_BAR = 95.0
WALL_BARS = {"resnet50": 10.0, "vit_l_16": 1.5, "2000x64x64": 4.0, "3000x64": 4.0}
DEVICE_BARS = {"2000x64x64": 10.0, "3000x64": 10.0}
# In percent of a training step: what an attached average may add with overlap.
LOOP_BAR = 1.0
# Seconds that a call may take on the host: this, and this for each param.
HOST_S, HOST_S_PER_TENSOR = 20e-6, 0.5e-6
# Of a run on a CPU. Microseconds of an update without its kernel, on this project's machine when it is idle.
HOST_BARS = {
    "one": 12.0, "resnet50": 45.0, "gpt2_medium": 60.0, "llama3_8b": 85.0, "3000x64": 300.0,
    "gpt2_medium_x3": 100.0,
}  # fmt: skip
# By workload: how many times as fast as another way.
CHECKED_BARS = {
    "3000x64": {names.TORCH_CLASS: 50.0, names.FOREACH: 2.5},
    "2000x64x64": {names.TORCH_CLASS: 9.0, names.FOREACH: 1.4},
    "resnet50": {names.FOREACH_PARAMS: 0.97},
}
# Milliseconds that an attached average may add to a step of the demo's network.
DEMO_BAR_MS = 0.05


@dataclass(frozen=True)
class Bar:
    """One requirement: what is measured must be at most, or at least, ``limit``. None: nothing was measured."""

    work: str
    limit: float
    unit: str  # with the space before it, where there is one
    measured: dict[str, float | None]  # by backend
    at_least: bool = False

    def met(self, backend: str) -> bool | None:
        value = self.measured.get(backend)
        return None if value is None else value >= self.limit if self.at_least else value <= self.limit

    def text(self, backend: str) -> str:
        value = self.measured.get(backend)
        return "not measured" if value is None else f"{value:{DIGITS.get(self.unit, '.3f')}}{self.unit}"


def bars_table(report: Report, found: list[Bar]) -> str:
    """Lay out every bar and whether it is met. A dry run has neither values nor verdicts."""
    columns = list(dict.fromkeys(column for bar in found for column in bar.measured))
    lines = []
    for bar in found:
        verdicts = [{None: "?", True: "ok", False: "SHORT"}[bar.met(column)] for column in columns]
        cells = [f"{bar.text(column)} {verdict}" for column, verdict in zip(columns, verdicts, strict=True)]
        if report.dry:
            cells = ["" if bar.measured[column] is None else "dry" for column in columns]
        lines.append((bar.work, f"{'at least' if bar.at_least else 'at most'} {bar.limit:g}{bar.unit}", *cells))
    caption = "A dry run judges no bar: dry says that there is a value, not whether it is enough." if report.dry else ""
    return markdown(" | ".join(["bar", "required", *columns]), lines, caption, texts=2)


def _ratio(one: Row | None, other: Row | None, kind: str = "wall") -> float | None:
    """Return how many times as long as ``other`` an update by ``one`` takes, on the wall clock or on the device."""
    times = [getattr(row, kind) for row in (one, other) if row is not None and getattr(row, kind) is not None]
    return times[0].median / times[1].median if len(times) == 2 else None


def gpu_bars(report: Report) -> list[Bar]:
    """Return every bar of a GPU run, those without a measurement too."""
    backends = names.OUR_BACKENDS["cpu" if report.dry else "cuda"]
    columns = [list(_of_backend(report, backend)) for backend in backends]
    return [
        Bar(work, limit, unit, dict(zip(backends, (each[3] for each in of_all), strict=True)), at_least)
        for of_all in zip(*columns, strict=True)
        for work, limit, unit, _, at_least in of_all[:1]
    ]


def _of_backend(report: Report, backend: str) -> Iterator[tuple[str, float, str, float | None, bool]]:
    """Yield every bar with what was measured of one backend."""
    groups, name = {rows[0].key: rows for rows in grouped(report.rows)}, f"{names.OURS} {backend}"
    kinds = [(str(dtype).removeprefix("torch."), format) for dtype, format in DEFAULTS]

    def title(workload: str, rows: list[Row]) -> str:
        return (rows[0].title if rows else GPU_WORKLOADS[workload].title).replace(", no embeddings", "")

    for workload in LARGEST:
        for kind in kinds:
            rows = groups.get((workload, *kind), [])
            share = share_of_copy(find(rows, name), rows)
            work = f"{title(workload, rows)}, {kind_text(*kind)}: of the device copy"
            yield work, SHARE_BAR, "%", None if share is None else 100 * share, True
    for clock, limits in (("wall", WALL_BARS), ("device", DEVICE_BARS)):
        for workload, limit in limits.items():
            rows = groups.get((workload, *kinds[0]), [])
            ratio = _ratio(find(rows, names.TORCH_CLASS), find(rows, name), clock)
            yield f"{title(workload, rows)}, fp32: torch's class, {clock} time", limit, "x", ratio, True
    for workload in SEVERAL_ON:
        for dtype, format in kinds:
            rows = groups.get((workload, dtype, f"{format} x{SEVERAL_COUNT}"), [])
            over = time_over_bytes(find(rows, name), find(groups.get((workload, dtype, format), []), name))
            work = f"{title(workload, rows)}, {kind_text(dtype, format)}: {SEVERAL_COUNT} averages, time/bytes"
            yield work, SEVERAL_BAR, "x", over, False

    step = next((row.work for row in report.steps if row.way == NONE), "")
    work = f"a training step of {step}" if step else "a training step"
    followed = next((row for row in report.steps if (row.way, row.backend) == (OVERLAP, backend)), None)
    added = None if followed is None or followed.share is None else 100 * followed.share.median
    yield f"{work}: what overlap leaves exposed", LOOP_BAR, "%", added, False
    yield f"{work}: elements off with overlap", 0, "", None if followed is None else followed.differing, False

    def largest(value: Callable[[Row], float | None]) -> float | None:
        rows = [row for row in report.rows if row.provider == name and row.device]
        return max((found for row in rows if (found := value(row)) is not None), default=None)

    def host_share(row: Row) -> float | None:
        return None if row.host is None else 100 * row.host.median / (HOST_S + HOST_S_PER_TENSOR * row.num_tensors)

    def launches(row: Row) -> float | None:
        return None if row.launches is None else row.launches + (row.transfers or 0)

    compiled = [_ratio(find(rows, names.COMPILED), find(rows, name)) for rows in grouped(report.rows)]
    least = min((ratio for ratio in compiled if ratio is not None), default=None)
    yield "compiled foreach, wall time, least", 1.0, "x", least, True
    yield "launches and transfers of an update, most", 1, "", largest(launches), False
    yield "host time, of 20 us + 0.5 us a tensor, most", 100, "%", largest(host_share), False
    yield "allocated by an update, most", 0, " B", largest(lambda row: row.allocated_bytes), False
    yield "an update that waits for the device (1: there is)", 0, "", largest(lambda row: row.waits), False
    cases = [hashes for hashes in report.bits.values() if backend in hashes]
    off = float(sum(hashes[backend] != next(iter(hashes.values())) for hashes in cases)) if cases else None
    yield f"cases of {len(report.bits)} whose bits are not the CPU's", 0, "", off, False


def host_bars(report: Report) -> list[Bar]:
    """Return the bars of a run of ``python -m bench host``."""
    found = []
    for rows in grouped(report.of_group(names.HOST)):
        row, limit = find(rows, names.OURS), HOST_BARS.get(rows[0].workload)
        if limit is not None:
            measured = {names.OURS: None if row is None else 1e6 * row.seconds}
            found.append(Bar(f"{rows[0].title}: host", limit, " us", measured))
    return found


def checked_bars(report: Report) -> list[Bar]:
    """Return the bars of the group of a run on a CPU that shows the cost of checks."""
    found = []
    for group, threads in ((names.CHECKED, ""), (names.CHECKED_ALONE, ", 1 thread")):
        for rows in grouped(report.of_group(group)):
            for other, limit in CHECKED_BARS.get(rows[0].workload, {}).items():
                ratio = _ratio(find(rows, other), find(rows, names.OURS))
                found.append(Bar(f"{rows[0].title}{threads}: {other}", limit, "x", {names.OURS: ratio}, at_least=True))
    return found


def loop_bars(report: Report) -> list[Bar]:
    """Return the bar of a run of ``python -m bench loop``: its first work is the demo's network."""
    rows = [row for row in report.steps if row.work == report.steps[0].work and row.way == ATTACHED]
    added = next((1e3 * row.exposed.median for row in rows if row.exposed is not None), None)
    return [Bar(f"{row.work}: exposed by {row.way}", DEMO_BAR_MS, " ms", {names.OURS: added}) for row in rows]
