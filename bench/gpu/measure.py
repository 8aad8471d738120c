"""The measuring part of a GPU run: case by case, provider by provider, each through the gate before it is timed.

One provider is in memory at a time, beside the model and the two buffers of the copy that is the ceiling: Llama-3-8B
with its averages takes half of an H200. Each row is handed on as soon as it is known.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from bench import gate
from bench.gpu.cases import DTYPES, Case, providers_of
from bench.gpu.ours import check_error
from bench.gpu.profile import activity
from bench.gpu.report import COPY, COPY_BIG, GpuRow
from bench.gpu.timing import (
    COVER,
    DRY_MAX_TENSORS,
    MAX_TENSORS,
    Rotation,
    RotationSize,
    Samples,
    Stopwatch,
    rotation_size,
)
from bench.memory import allocated_total, available_bytes
from bench.provider import Provider
from bench.providers import CompiledForeach, Foreach, Ours
from bench.timing import synchronize
from bench.workloads import Workload, build

# What a case takes beside its model and averages: float64 pieces of the gate, one decoded tensor, torch's own.
BESIDE_BYTES = 10 << 30
DRY_BESIDE_BYTES = 64 << 20
# Copied for a moment while a format is made from a model.
PEAK_BYTES_PER_PARAM = 1.0
# Copies start on a multiple of this.
ALIGNED_BYTES = 512
# Of the two buffers of the large copy together.
BIG_COPY_BYTES, DRY_BIG_COPY_BYTES = 8_000_000_000, 8_000_000
# A dry run's idea of an L2 cache, so that it rotates and fills too.
DRY_L2_BYTES = 1 << 18
# A case is begun only with this much time left, for a compiled provider this much more a tensor.
LEAST_S, COMPILE_S, COMPILE_S_PER_TENSOR = 6.0, 20.0, 0.25


@dataclass(frozen=True)
class Setting:
    """Where and how long to measure."""

    device: torch.device
    backends: tuple[str, ...]
    l2_bytes: int
    provider_s: float  # for the samples of one provider
    end: float  # on the clock of time.monotonic
    profile: bool = False  # count launches, instead of taking times

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def rotation_size(self, copy_bytes: int, num_tensors: int) -> RotationSize:
        if self.profile:
            return RotationSize(1, COVER * self.l2_bytes)
        return rotation_size(copy_bytes, num_tensors, self.l2_bytes, MAX_TENSORS if self.on_gpu else DRY_MAX_TENSORS)

    def left_s(self) -> float:
        return self.end - time.monotonic()


class Progress(Protocol):
    """Who is told how far the run is: another process goes on from there if this one ends early."""

    def wanted(self, case: Case, provider: str) -> bool:
        """Say whether it is still to be measured."""

    def begin(self, case: Case, provider: str) -> None: ...
    def emit(self, row: GpuRow) -> None: ...


class Ceiling:
    """Two buffers, and the copies from one to the other that a workload is compared with."""

    def __init__(self, setting: Setting) -> None:
        self.nbytes = (BIG_COPY_BYTES if setting.on_gpu else DRY_BIG_COPY_BYTES) // 2
        self.l2_bytes = setting.l2_bytes
        self.source = torch.randint(256, (self.nbytes,), dtype=torch.uint8, device=setting.device)
        self.target = torch.empty_like(self.source)

    def rotation(self, counted_bytes: int) -> tuple[Rotation, int]:
        """Give copies that move ``counted_bytes`` each, read and written, and the bytes that they do move."""
        nbytes = min(counted_bytes // 2, self.nbytes)
        step = -(-nbytes // ALIGNED_BYTES) * ALIGNED_BYTES
        wanted = rotation_size(2 * nbytes, 1, self.l2_bytes).copies
        count = max(1, min(wanted, (self.nbytes - nbytes) // step + 1))
        return Rotation([self._copy(at * step, nbytes) for at in range(count)]), 2 * nbytes

    def _copy(self, start: int, nbytes: int) -> Callable[[], None]:
        source, target = self.source[start : start + nbytes], self.target[start : start + nbytes]

        def copy() -> None:
            target.copy_(source)

        return copy


def common_row(workload: Workload, case: Case, depth: int, models: Sequence[nn.Module], size: RotationSize) -> GpuRow:
    params = list(models[0].parameters()) if models else []
    numel = sum(param.numel() for param in params) if models else workload.num_params
    return GpuRow(
        workload.name,
        workload.title_at(depth) if depth else workload.title,
        case.dtype,
        "",
        numel,
        len(params),
        numel * case.counted_bytes,
        format=case.format,
        averages=case.averages,
        copies=size.copies,
        filler_bytes=size.filler_bytes,
    )


def measure_all(cases: Sequence[Case], setting: Setting, progress: Progress) -> None:
    """Measure all cases until the time is up; what is left out gets a row that says so."""
    ceiling = Ceiling(setting)
    if setting.profile:
        # The first use starts the profiler's own machinery, and may miss what it was meant to see.
        activity(ceiling.rotation(ALIGNED_BYTES)[0].step, setting.device)
    for case in cases:
        measure_case(case, setting, ceiling, progress)
        free_memory(setting.device)


def measure_case(case: Case, setting: Setting, ceiling: Ceiling, progress: Progress) -> None:
    workload = case.find_workload()
    wanted = [kind for kind in providers_of(case, setting.backends) if progress.wanted(case, kind.name)]
    if not wanted:
        return
    beside = BESIDE_BYTES if setting.on_gpu else DRY_BESIDE_BYTES
    memory = available_bytes(setting.device)
    depth = depth_within(workload, memory, case.held_bytes + PEAK_BYTES_PER_PARAM, beside)
    reason = f"does not fit the {memory / 2**30:.0f} GiB that are free" if depth == 0 else ""
    if setting.left_s() < LEAST_S:
        reason = "the time was up"
    if reason:
        row = common_row(workload, case, 0, [], RotationSize(0, 0))
        for kind in wanted:
            progress.emit(replace(row, provider=kind.name, status="skipped", reason=reason))
        return
    progress.begin(case, wanted[0].name)
    models = [build(workload, DTYPES[case.dtype], setting.device, depth)]
    params = list(models[0].parameters())
    numel = sum(param.numel() for param in params)
    size = setting.rotation_size(numel * case.held_bytes, len(params))
    models += [build(workload, DTYPES[case.dtype], setting.device, depth) for _ in range(size.copies - 1)]
    run = _CaseRun(common_row(workload, case, depth, models, size), models, setting, ceiling, progress.emit)
    for kind in wanted:
        progress.begin(case, kind.name)
        run.run(kind)
        free_memory(setting.device)


def depth_within(workload: Workload, memory: float, per_param: float, beside: float) -> int:
    """Give the number of blocks that fit; less than all of them where what goes with all does not fit as well."""
    depth = workload.depth_within(memory, per_param, beside)
    whole = (memory - beside) / per_param >= workload.num_params
    return depth if whole else min(depth, workload.full_depth - 1)


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class _CaseRun:
    """One case: its models, and what is measured of each provider."""

    def __init__(
        self,
        row: GpuRow,
        models: list[nn.Module],
        setting: Setting,
        ceiling: Ceiling,
        emit: Callable[[GpuRow], None],
    ) -> None:
        self.row, self.models, self.setting, self.emit = row, models, setting, emit
        self.watch = Stopwatch(setting.device, row.filler_bytes)
        self.copies: dict[str, tuple[Rotation, int]] = {COPY: ceiling.rotation(row.counted_bytes)}
        if row.counted_bytes < 2 * ceiling.nbytes:
            self.copies[COPY_BIG] = ceiling.rotation(2 * ceiling.nbytes)

    def run(self, kind: type[Provider]) -> None:
        row = replace(self.row, provider=kind.name, note=kind.note)
        for status, reason in (
            ("not installed", kind.missing()),
            ("skipped", kind.refusal(self.models[0]) or self._short_of_time(kind)),
        ):
            if reason is not None:
                self.emit(replace(row, status=status, reason=reason))
                return
        try:
            (self._profile if self.setting.profile else self._measure)(kind, row)
        except gate.WrongAverageError as wrong:
            self.emit(replace(row, status="wrong", reason=str(wrong)))
        except torch.OutOfMemoryError as error:
            self.emit(replace(row, status="skipped", reason=f"out of memory: {first_line(error)}"))
        # Whatever a provider raises is a finding about that provider, and the others still run.
        except Exception as failure:
            self.emit(replace(row, status="failed", reason=f"{type(failure).__name__}: {first_line(failure)}"))
        # A device that a kernel has broken raises here, and ends this process: nothing after it would be true.
        synchronize(self.setting.device)

    def _short_of_time(self, kind: type[Provider]) -> str | None:
        needs = LEAST_S
        if issubclass(kind, CompiledForeach):
            needs = COMPILE_S + COMPILE_S_PER_TENSOR * self.row.num_tensors
        left = self.setting.left_s()
        return None if left >= needs else f"{left:.0f} s were left, it may take {needs:.0f}"

    def _measure(self, kind: type[Provider], row: GpuRow) -> None:
        first = kind(self.models[0])
        error = check_error(first, self.models[0])
        providers = [first, *(first.beside(model) for model in self.models[1:])]
        rotation = Rotation([provider.update for provider in providers])
        for _ in range(2):  # the first update copies and plans, the second is like all others
            rotation.once()
        samples = self._time(rotation)
        row = replace(
            row,
            error=error,
            calls_per_sample=samples.calls,
            samples=samples.wall,
            device_s=samples.device,
            host_s=samples.host,
            allocated_bytes=allocated_total(rotation.step, self.setting.device),
        )
        if self.setting.on_gpu:
            row = self._look_closer(row, rotation, first)
        else:
            row = replace(row, remarks=["graph and waiting: only on a GPU"])
        self.emit(row)

    def _time(self, rotation: Rotation) -> Samples:
        """Time an update, and the copies beside it."""
        beside = [copy for copy, _ in self.copies.values()]
        samples, copied = self.watch.measure(rotation, beside, self.setting.provider_s)
        for (name, (copy, nbytes)), each in zip(self.copies.items(), copied, strict=True):
            row = replace(self.row, provider=name, counted_bytes=nbytes, copies=len(copy.calls), device_s=each.device)
            self.emit(replace(row, calls_per_sample=each.calls))
        return samples

    def _profile(self, kind: type[Provider], row: GpuRow) -> None:
        """Have the profiler look at one update in cold caches."""
        provider = kind(self.models[0])
        for _ in range(2):
            provider.update()
        self.watch.evict()
        seen = activity(provider.update, self.setting.device)
        if seen is None:
            raise RuntimeError("the profiler recorded nothing of the device")
        row = replace(row, launches=seen.launches, transfers=seen.transfers, busy_s=seen.seconds)
        self.emit(replace(row, kernels=seen.short_names))

    def _look_closer(self, row: GpuRow, rotation: Rotation, provider: Provider) -> GpuRow:
        """Look for waiting, and replay a graph: what only a GPU has. A failure is a remark."""
        remarks: list[str] = []
        with _remarked(remarks, "waiting"):
            row = replace(row, waits=self.watch.waits(rotation.step, row.host_seconds))
            if isinstance(provider, Ours):
                row = replace(row, sync_error=self.watch.sync_error(rotation.step))
        if isinstance(provider, (Ours, Foreach)):
            with _remarked(remarks, "graph"):
                row = replace(row, graph_s=self.watch.graph_s(rotation))
        else:
            remarks.append("graph: measured for swafast and _foreach_lerp_ alone")
        return replace(row, remarks=remarks)


@contextmanager
def _remarked(remarks: list[str], what: str) -> Iterator[None]:
    try:
        yield
    # What a tool raises is worth a remark, not the times that were taken without it.
    except Exception as error:
        remarks.append(f"{what}: {type(error).__name__}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
