"""The bars of a GPU run: for each of our backends, what was measured, and what it must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from bench.gpu.cases import DEFAULTS, GPU_WORKLOADS, SEVERAL, SEVERAL_ON
from bench.gpu.report import OURS_PREFIX, GpuReport, GpuRow, RowKey, share_of_copy, timed, wall_ratio
from bench.loop import NONE, OVERLAP, Followed
from bench.numbers import SEVERAL_BAR, Bar
from bench.providers import CompiledForeach
from bench.report import TORCH_CLASS

# In percent of a device copy of the same run.
SHARE_BAR, SHARED = 95.0, ("1e9", "llama3_8b")
# By workload: how many times as fast as torch's class, on the wall clock and on the device. fp32 params.
WALL_BARS = {"resnet50": 10.0, "vit_l_16": 1.5, "2000x64x64": 4.0, "3000x64": 4.0}
DEVICE_BARS = {"2000x64x64": 10.0, "3000x64": 10.0}
# In percent of a training step: what an attached average may add with overlap.
LOOP_BAR = 1.0
# Seconds that a call may take on the host: this, and this for each param.
HOST_S, HOST_S_PER_TENSOR = 20e-6, 0.5e-6


@dataclass(frozen=True)
class BackendBars:
    """One requirement, and how each backend does; None where the run holds nothing to compare."""

    work: str
    limit: float
    at_least: bool
    unit: str
    measured: dict[str, float | None]

    def bar(self, backend: str) -> Bar | None:
        value = self.measured.get(backend)
        return None if value is None else Bar(self.work, self.limit, self.at_least, value, self.unit)

    @property
    def required_text(self) -> str:
        return Bar(self.work, self.limit, self.at_least, 0.0, self.unit).required_text


Measure = Callable[[str], "float | None"]  # takes a backend's provider


def bars(report: GpuReport) -> list[BackendBars]:
    """Give every bar, those without a measurement too."""
    groups = {rows[0].key: rows for rows in report.groups()}
    found = []
    described = *_speed_bars(groups), *_several_bars(groups), *_loop_bars(report), *_cost_bars(report)
    for work, limit, at_least, unit, measure in described:
        measured = {backend: measure(f"{OURS_PREFIX}{backend}") for backend in report.backends}
        found.append(BackendBars(work, limit, at_least, unit, measured))
    return [*found, _bits_bar(report)]


Described = tuple[str, float, bool, str, Measure]
Groups = dict[RowKey, list[GpuRow]]


def _speed_bars(groups: Groups) -> Iterator[Described]:
    for workload in SHARED:
        for dtype, fmt in DEFAULTS:
            rows = groups.get((workload, dtype, fmt, 1), [])
            title = f"{rows[0].title if rows else GPU_WORKLOADS[workload].title}, {kind_text(dtype, fmt)}"
            yield f"{title}: of the device copy", SHARE_BAR, True, "%", lambda ours, rows=rows: _share(rows, ours)  # type: ignore[misc]
    for name, limit in WALL_BARS.items():
        title, rows = GPU_WORKLOADS[name].title, groups.get((name, *DEFAULTS[0], 1), [])
        wall = lambda ours, rows=rows: wall_ratio(rows, TORCH_CLASS, ours)  # noqa: E731
        yield f"{title}, fp32: torch's class, wall time", limit, True, "x", wall
        if name in DEVICE_BARS:
            device = lambda ours, rows=rows: _device_ratio(rows, ours)  # noqa: E731
            yield f"{title}, fp32: torch's class, device time", DEVICE_BARS[name], True, "x", device


def _several_bars(groups: Groups) -> Iterator[Described]:
    """Hold several averages in one pass to the time that their bytes take at the rate of one, on the same backend."""
    for workload in SEVERAL_ON:
        for dtype, fmt in DEFAULTS:
            one, several = (groups.get((workload, dtype, fmt, count), []) for count in (1, SEVERAL))
            name = several[0].title.replace(", no embeddings", "") if several else GPU_WORKLOADS[workload].title
            measure = partial(_time_over_bytes, several, one)
            yield f"{name}, {kind_text(dtype, fmt)}: {SEVERAL} averages, time/bytes", SEVERAL_BAR, False, "x", measure


def _time_over_bytes(several: list[GpuRow], one: list[GpuRow], ours: str) -> float | None:
    row, base = timed(several, ours), timed(one, ours)
    return base.device_bytes_per_s / row.device_bytes_per_s if row is not None and base is not None else None


def _loop_bars(report: GpuReport) -> Iterator[Described]:
    """Hold an average that follows an optimizer with overlap to a share of the step, and to the bits without."""
    bare = next((row for row in report.loop if row.way == NONE), None)

    def followed(ours: str) -> Followed | None:
        backend = ours.removeprefix(OURS_PREFIX)
        return next((row for row in report.loop if (row.way, row.backend) == (OVERLAP, backend)), None)

    def exposed(ours: str) -> float | None:
        row = followed(ours)
        return None if row is None or bare is None else 100 * row.exposed(bare).share

    def differing(ours: str) -> float | None:
        row = followed(ours)
        return None if row is None or row.differing is None else float(row.differing)

    title = "a training step" if bare is None else f"a training step of {bare.work}"
    yield f"{title}: what overlap leaves exposed", LOOP_BAR, False, "%", exposed
    yield f"{title}: elements off with overlap", 0, False, "", differing


def _share(rows: list[GpuRow], ours: str) -> float | None:
    row = timed(rows, ours)
    share = None if row is None else share_of_copy(row, rows)
    return None if share is None else 100 * share


def _device_ratio(rows: list[GpuRow], ours: str) -> float | None:
    theirs, own = timed(rows, TORCH_CLASS), timed(rows, ours)
    return theirs.device_seconds / own.device_seconds if theirs is not None and own is not None else None


def _cost_bars(report: GpuReport) -> Iterator[Described]:
    def least_over_compiled(ours: str) -> float | None:
        ratios = [wall_ratio(rows, CompiledForeach.name, ours) for rows in report.groups()]
        return min((ratio for ratio in ratios if ratio is not None), default=None)

    def most(value: Callable[[GpuRow], float | None]) -> Measure:
        def over_rows(ours: str) -> float | None:
            rows = [row for row in report.rows if row.provider == ours and row.device_s]
            return max((found for row in rows if (found := value(row)) is not None), default=None)

        return over_rows

    def waiting(row: GpuRow) -> float | None:
        return None if row.waits is None or row.sync_error is None else float(row.waits or bool(row.sync_error))

    yield "compiled foreach, wall time, least", 1.0, True, "x", least_over_compiled
    yield "launches and transfers of an update, most", 1, False, "", most(_launches)
    yield "host time, of 20 us + 0.5 us a tensor, most", 100, False, "%", most(_host_share)
    yield "allocated by an update, most", 0, False, " B", most(lambda row: row.allocated_bytes)
    yield "an update that waits for the device (1: there is)", 0, False, "", most(waiting)


def _launches(row: GpuRow) -> float | None:
    return None if row.launches is None else row.launches + (row.transfers or 0)


def _host_share(row: GpuRow) -> float | None:
    return 100 * row.host_seconds / (HOST_S + HOST_S_PER_TENSOR * row.num_tensors) if row.host_s else None


def _bits_bar(report: GpuReport) -> BackendBars:
    measured: dict[str, float | None] = {}
    for backend in report.backends:
        cases = [hashes for hashes in report.bits.values() if backend in hashes]
        oracle = [next(iter(hashes.values())) for hashes in cases]
        differing = sum(hashes[backend] != first for hashes, first in zip(cases, oracle, strict=True))
        measured[backend] = float(differing) if cases else None
    return BackendBars(f"cases of {len(report.bits)} whose bits are not the CPU's", 0, False, "", measured)


def kind_text(dtype: str, fmt: str, averages: int = 1) -> str:
    """Name params and averages as a reader of a table does."""
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    into = "" if fmt == dtype else f" to {short[fmt]}" if fmt in short else f" {fmt}"
    return f"{short[dtype]}{into}" + (f" x{averages}" if averages > 1 else "")
