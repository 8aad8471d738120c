"""The measuring part of a GPU run: case by case, provider by provider, a line for each as soon as it is known.

One provider is in memory at a time, beside its model and the copies from device to device that are its ceiling:
Llama-3-8B with its averages takes half of an H200.

``python -m bench.gpu_bench PART --device cuda --backend cuda --lines FILE`` is a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
from torch import nn

from bench import gate, names
from bench.internals import planes_nbytes
from bench.machine import available_bytes
from bench.measure import findings, first_line, refused, row_of
from bench.profiling import activity, allocated_total
from bench.providers import (
    DEFAULT_FORMATS,
    CompiledForeach,
    Foreach,
    LerpFloat,
    MulAdd,
    Ours,
    Provider,
    TorchClass,
    TorchClassBf16,
    TorchEma,
    dtype_name,
    ours_on,
)
from bench.report import Row, Times, item_line
from bench.timing import COVER, Clock, Rotation, RotationSize, interleave, synchronize
from bench.workloads import DRY_WORKLOADS, GPU_WORKLOADS, build

DTYPES = {dtype_name(dtype): dtype for dtype in DEFAULT_FORMATS}
DEFAULTS = (("float32", "float32"), ("bfloat16", "exact"))
OTHER_FORMATS = (
    *(("bfloat16", format) for format in ("compact", "compensated", "half", "float32")),
    *(("float32", "compensated"), ("float32", "compact"), ("float16", "mirrored")),
)
# So many averages in one pass, and where.
SEVERAL_COUNT, SEVERAL_ON = 3, ("gpt2_medium", "1e9", "llama3_8b")

# What a case takes beside its model and averages: float64 pieces of the gate, one decoded tensor, torch's own.
BESIDE_BYTES, DRY_BESIDE_BYTES = 10 << 30, 64 << 20
# Copied for a moment while a format is made from a model.
MADE_BYTES_PER_PARAM = 1.0
# Copies start on a multiple of this, and so many of them fill any cache.
ALIGNED_BYTES, MOST_COPIES = 512, 1024
# Of the two buffers of the large copy together.
BIG_COPY_BYTES, DRY_BIG_COPY_BYTES = 8_000_000_000, 8_000_000
# For the samples of one provider; a dry run only shows that they are taken.
PROVIDER_S, DRY_PROVIDER_S = 0.4, 0.0
# A provider is begun only with this much time left, a compiled one with this much more for each tensor.
LEAST_S, COMPILE_S, COMPILE_S_PER_TENSOR = 3.0, 15.0, 0.1


@dataclass(frozen=True)
class Case:
    """One workload with params of one dtype, and averages of one format: one of them, or several in one pass."""

    workload: str
    dtype: str
    format: str
    averages: int = 1
    others: bool = True  # torch's class and the loops too
    compiled: bool = False  # the compiled foreach alone: how long a compiler takes is the least certain

    @property
    def group(self) -> str:
        return self.format + (f" x{self.averages}" if self.averages > 1 else "")

    @property
    def held_bytes(self) -> int:
        """Return the bytes that one param and its averages hold."""
        return DTYPES[self.dtype].itemsize + self.averages * planes_nbytes(self.format)

    def providers(self, backends: Sequence[str]) -> list[type[Provider]]:
        """Return the providers of this case, ours first."""
        if self.compiled:
            return [CompiledForeach]
        ours: list[type[Provider]] = [ours_on(backend, self.format, self.averages) for backend in backends]
        others: dict[tuple[str, str], list[type[Provider]]] = {
            ("float32", "float32"): [TorchClass, TorchEma, Foreach],
            ("bfloat16", "exact"): [TorchClassBf16, MulAdd, LerpFloat],
            ("float16", "mirrored"): [LerpFloat],
        }
        return ours + (others.get((self.dtype, self.format), []) if self.others and self.averages == 1 else [])


def cases_of(part: str, *, dry: bool) -> list[Case]:
    """Return the cases of one part of a run, those with a bar first."""
    largest, small = ("dry_one",) if dry else ("1e9", "llama3_8b"), ("3000x64", "2000x64x64", "resnet50")
    if dry:
        small = ("dry_few", "dry_many")  # type: ignore[assignment]
    parts = {
        "largest": [Case(name, *kind, others=False) for kind in DEFAULTS for name in largest],
        "small": [Case(name, *kind) for kind in DEFAULTS for name in small],
        "compiled": [Case(name, *DEFAULTS[0], compiled=True) for name in (largest[0], *small[2:])],
        "formats": [
            *(Case(name, *kind) for name in ("gpt2_medium", "vit_l_16") for kind in DEFAULTS if not dry),
            *(Case(n, *kind, averages=SEVERAL_COUNT) for n in (largest if dry else SEVERAL_ON) for kind in DEFAULTS),
            *(Case(largest[0], *kind) for kind in OTHER_FORMATS),
        ],
    }
    # Of both sizes, ours alone: on the second backend, and to count launches.
    parts["ours"] = [replace(case, others=False) for case in (*parts["largest"], *parts["small"])]
    return parts[part]


@dataclass(frozen=True)
class Setting:
    """Where and how long to measure."""

    device: torch.device
    backends: Sequence[str]
    l2_bytes: int
    provider_s: float
    end: float  # on the clock of time.monotonic
    profile: bool = False  # count launches, instead of taking times

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def left_s(self) -> float:
        return self.end - time.monotonic()


class GpuBench:
    """Measures one case after another. Holds the two buffers that are copied."""

    def __init__(self, setting: Setting, lines: TextIO) -> None:
        self.setting, self._lines = setting, lines
        nbytes = (BIG_COPY_BYTES if setting.on_gpu else DRY_BIG_COPY_BYTES) // 2
        self._source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=setting.device)
        self._target = torch.empty_like(self._source)
        if setting.profile:
            # The first use starts the profiler's own machinery, and may miss what it is meant to see.
            activity(self.copies(ALIGNED_BYTES)[0].step, setting.device)

    def emit(self, row: Row) -> None:
        self._lines.write(item_line("rows", row))
        self._lines.flush()

    def copies(self, counted_bytes: int) -> tuple[Rotation, int]:
        """Return copies that move ``counted_bytes`` each, read and written, and the bytes that they do move."""
        whole = self._source.numel()
        nbytes = min(counted_bytes // 2, whole)
        step = -(-nbytes // ALIGNED_BYTES) * ALIGNED_BYTES
        wanted = -(-COVER * self.setting.l2_bytes // (2 * nbytes))
        count = max(1, min(wanted, MOST_COPIES, (whole - nbytes) // step + 1))
        pieces = [slice(at * step, at * step + nbytes) for at in range(count)]
        return Rotation(*(partial(self._target[at].copy_, self._source[at]) for at in pieces)), 2 * nbytes

    def run(self, case: Case) -> None:
        setting, workload = self.setting, (GPU_WORKLOADS | DRY_WORKLOADS)[case.workload]
        dtype, kinds = DTYPES[case.dtype], case.providers(setting.backends)
        memory, beside = available_bytes(setting.device), BESIDE_BYTES if setting.on_gpu else DRY_BESIDE_BYTES
        depth = workload.depth_within(memory, case.held_bytes + MADE_BYTES_PER_PARAM, beside)
        base = replace(row_of(workload, dtype, None), group=case.group, format=case.format, averages=case.averages)
        reason = f"does not fit the {memory / 2**30:.0f} GiB that are free" if depth == 0 else ""
        if setting.left_s() < LEAST_S:
            reason = "the time was up"
        if reason:
            for kind in kinds:
                self.emit(replace(base, provider=kind.name, status="skipped", reason=reason))
            return
        models = [build(workload, dtype, setting.device, depth)]
        numels = [param.numel() for param in models[0].parameters()]
        size = RotationSize.covering(sum(numels) * case.held_bytes, setting.l2_bytes)
        if setting.profile:
            size = RotationSize(1, COVER * setting.l2_bytes)
        models += [build(workload, dtype, setting.device, depth) for _ in range(size.copies - 1)]
        base = replace(base, title=workload.title_at(depth), num_params=sum(numels), num_tensors=len(numels))
        base = replace(base, copies=size.copies, filler_bytes=size.filler_bytes)
        clock = Clock(setting.device, apart=True, filler_bytes=size.filler_bytes)
        for kind in kinds:
            # The last line of a process that ends early names its provider.
            sys.stdout.write(f"{base.title}, {base.dtype} {base.group}, {kind.name}\n")
            sys.stdout.flush()
            row = replace(row_of(workload, dtype, kind, base), format=case.format)
            not_tried = refused(kind, models[0], row, self._short_of_time(kind, len(numels)))
            if not_tried is not None:
                self.emit(not_tried)
                continue
            with findings(row, self.emit):
                (self._profile if setting.profile else self._measure)(kind, row, models, clock)
            free_memory(setting.device)
            # A device that a kernel has broken raises here, and ends this process: nothing after it would be true.
            synchronize(setting.device)

    def _short_of_time(self, kind: type[Provider], num_tensors: int) -> str | None:
        compiled = issubclass(kind, CompiledForeach) and self.setting.on_gpu
        needs = COMPILE_S + COMPILE_S_PER_TENSOR * num_tensors if compiled else LEAST_S
        left = self.setting.left_s()
        return None if left >= needs else f"{left:.0f} s were left, it may take {needs:.0f}"

    def _measure(self, kind: type[Provider], row: Row, models: list[nn.Module], clock: Clock) -> None:
        built: dict[str, Provider] = {}
        built[kind.name] = first = kind.beside(models[0], built)
        error, _ = gate.check(first, models[0])
        rotation = Rotation(first.update, *(kind.beside(model, built).update for model in models[1:]))
        for _ in range(2):  # the first update copies and plans, the second is like all others
            rotation.once()
        beside = {names.COPY: self.copies(row.counted_bytes)}
        if row.counted_bytes < 2 * self._source.numel():
            beside[names.COPY_BIG] = self.copies(2 * self._source.numel())
        contestants = {kind.name: rotation, **{name: copies for name, (copies, _) in beside.items()}}
        taken = interleave(contestants, self.setting.provider_s, clock)
        for name, (copies, nbytes) in beside.items():
            ceiling = replace(row, provider=name, note="", counted_bytes=nbytes, copies=len(copies.calls))
            self.emit(replace(ceiling, device=taken[name].into(ceiling).device))
        allocated = allocated_total(rotation.step, self.setting.device)
        row = replace(taken[kind.name].into(row), error=error, allocated_bytes=allocated)
        # Times first: a closer look may break the device.
        self.emit(row)
        if self.setting.on_gpu:
            self.emit(self._look_closer(row, rotation, first, clock))

    def _look_closer(self, row: Row, rotation: Rotation, provider: Provider, clock: Clock) -> Row:
        """Look for waiting, and replay a graph: what only a GPU has. A failure is a remark."""
        remarks: list[str] = []
        assert row.host is not None
        host_s = row.host.median
        with _remarked(remarks, "waiting"):
            row = replace(row, waits=clock.waits(rotation.step, host_s))
            if isinstance(provider, Ours):
                row = replace(row, sync_error=clock.sync_error(rotation.step))
        if isinstance(provider, (Ours, Foreach)):
            with _remarked(remarks, "graph"):
                row = replace(row, graph=Times.of(clock.graph_s(rotation)))
        else:
            remarks.append("graph: measured for swafast and _foreach_lerp_ alone")
        return replace(row, remarks=remarks)

    def _profile(self, kind: type[Provider], row: Row, models: list[nn.Module], clock: Clock) -> None:
        """Have the profiler look at one update in cold caches."""
        provider = kind.beside(models[0], {})
        for _ in range(2):
            provider.update()
        clock.evict()
        seen = activity(provider.update, self.setting.device)
        if seen is None:
            self.emit(replace(row, remarks=["profiler: it recorded nothing of the device"]))
            return
        row = replace(row, launches=seen.launches, transfers=seen.transfers, busy_s=seen.seconds)
        self.emit(replace(row, kernels=seen.short_names))


@contextmanager
def _remarked(remarks: list[str], what: str) -> Iterator[None]:
    try:
        yield
    # What a tool raises is worth a remark, not the times that were taken without it.
    except Exception as error:
        remarks.append(f"{what}: {type(error).__name__}: {first_line(error)}")


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", action="append", default=[])
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0, help="From the start of the process.")
    parser.add_argument("--l2-bytes", type=int, required=True)
    parser.add_argument("--profile", action="store_true", help="Count launches, instead of taking times.")
    given = parser.parse_args(arguments)
    dry = given.device == "cpu"
    device = torch.device("cpu") if dry else torch.device(given.device, 0)
    if dry:
        torch.set_num_threads(1)  # a dry run times nothing that counts, and others may be at work on this machine
    provider_s, end = DRY_PROVIDER_S if dry else PROVIDER_S, started + given.seconds
    setting = Setting(device, given.backend, given.l2_bytes, provider_s, end, given.profile)
    with given.lines.open("a") as lines:
        bench = GpuBench(setting, lines)
        for case in cases_of(given.part, dry=dry):
            bench.run(case)
            free_memory(device)


if __name__ == "__main__":
    main()
