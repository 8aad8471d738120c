"""What is measured: on a CPU and, part by part, on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from bench import names
from bench.checked import PROVIDERS as CHECKED_PROVIDERS
from bench.internals import SIDE, Grid, planes_nbytes
from bench.measure import Case
from bench.providers import (
    BF16,
    DEFAULT_FORMATS,
    FORMAT_PROVIDERS,
    FP16,
    FP32,
    NUM_COLUMNS,
    UPDATE_PROVIDERS,
    VARIANCE_BYTES,
    ours_on,
    providers_for,
    several_providers,
    spread_on,
)
from bench.workloads import DRY_WORKLOADS, GPU_WORKLOADS, WORKLOADS

DTYPES = {"float32": FP32, "bfloat16": BF16}
# For each param at most, counted from the copies that a run keeps of bf16 params. All providers: model 2, flat average
# and param 7, shared averages 4, torch's 2, ours 4 and 4, one being made 4, one read of ours 4. Our own passes: the
# formats of bf16 params 2 + 4 + 4 + 3 + 8 + 2, three and two averages of float32 ones 4 + 12 + 8, one read 4.
HELD_BYTES, PASSES_HELD_BYTES = 31, 28

# By dtype and format: the defaults, which have bars, and the others.
DEFAULTS = ((FP32, "float32"), (BF16, "exact"))
OTHER_FORMATS = (
    *((BF16, format) for format in ("compact", "compensated", "half", "float32")),
    *((FP32, "compensated"), (FP32, "compact"), (FP16, "mirrored")),
)
# Averages in one pass, and where.
SEVERAL_COUNT, SEVERAL_ON = 3, ("gpt2_medium", "1e9", "llama3_8b")
LARGEST, SMALL = ("1e9", "llama3_8b"), ("3000x64", "2000x64x64", "resnet50")


def _labelled(grid: Grid) -> tuple[str, Grid]:
    """Name a grid by what is true on every GPU: a share of the blocks that it has room for."""
    if grid.chunk_numel is not None:
        return f"chunks of {grid.chunk_numel}", grid
    return f"{grid.share:.0%} of the blocks of {grid.num_threads} threads", grid


# Grids and chunks that a GPU run tries, beside the backend's own: blocks of 256 threads, 4 of which fill a
# multiprocessor, blocks of 1024, each on a whole multiprocessor, as for an update beside other work, and chunks of
# other sizes.
SWEPT: tuple[tuple[str, Grid], ...] = (
    *(_labelled(Grid(share=count / 4)) for count in (1, 2, 3)),
    *(_labelled(Grid(1024, share)) for share in (SIDE.share / 3, SIDE.share / 3 * 2, SIDE.share, SIDE.share * 2)),
    *(_labelled(Grid(chunk_numel=numel)) for numel in (1 << 12, 1 << 14, 1 << 16)),
)
SWEPT_ON = ("1e9", "resnet50")
# Averages with a spread: 20 deviations of 1e9 params would take most of an H200's memory.
SPREADS_ON = ("gpt2_medium", "resnet50")
# What is timed beside ours in a GPU run.
OTHERS = (names.TORCH_CLASS, names.TORCH_EMA, names.FOREACH, names.MUL_ADD, names.LERP_FLOAT)


def cpu_cases(group: str, workloads: Iterable[str]) -> list[Case]:
    """Return the cases of one group: every provider, our formats, several averages of ours, or the cost of checks."""
    found = []
    for name in workloads:
        if group in (names.CHECKED, names.CHECKED_ALONE):
            found.append(Case(WORKLOADS[name], FP32, CHECKED_PROVIDERS, HELD_BYTES, group))
            continue
        for dtype in DTYPES.values():
            if group == names.UPDATES:
                found.append(Case(WORKLOADS[name], dtype, providers_for(dtype), HELD_BYTES))
                continue
            several = group == names.SEVERAL
            providers = several_providers(dtype) if several else providers_for(dtype, FORMAT_PROVIDERS)
            found.append(Case(WORKLOADS[name], dtype, providers, PASSES_HELD_BYTES, group))
    return found


def gpu_case(
    workload: str, dtype: torch.dtype, format: str, backends: Sequence[str], others: Sequence[str] = OTHERS,
    averages: int = 1,
) -> Case:  # fmt: skip
    """Return the case of one format: ours on each backend, and those of ``others`` that keep such an average."""
    alike = providers_for(dtype, UPDATE_PROVIDERS) if DEFAULT_FORMATS[dtype] == format and averages == 1 else []
    providers = [ours_on(backend, format, averages) for backend in backends]
    providers += [provider for provider in alike if provider.name in others]
    held = dtype.itemsize + averages * planes_nbytes(format)
    group = f"{format} x{averages}" if averages > 1 else format
    return Case((GPU_WORKLOADS | DRY_WORKLOADS)[workload], dtype, providers, held, group, format, averages)


def spread_case(workload: str, dtype: torch.dtype, format: str, backend: str, work: str) -> Case:
    """Return the case of averages with a spread on one backend, alone: a draw of one changes the model for others."""
    nbytes = dtype.itemsize + planes_nbytes(format) + VARIANCE_BYTES + NUM_COLUMNS * dtype.itemsize
    case = gpu_case(workload, dtype, format, (), ())
    providers = [spread_on(backend, format, work)]
    return replace(case, providers=providers, held_bytes=nbytes, group=f"{format}{work}")


def swept_case(workload: str, dtype: torch.dtype, format: str, backend: str) -> Case:
    """Return the case of one backend in its own grid and in all of :data:`SWEPT`."""
    case = gpu_case(workload, dtype, format, (backend,), ())
    swept = [ours_on(backend, format, swept=each) for each in SWEPT]
    return replace(case, providers=[*case.providers, *swept], group=f"{format}{names.SWEPT}")


def gpu_cases(part: str, backends: Sequence[str], *, dry: bool) -> list[Case]:
    """Return the cases of one part of a GPU run, those with a bar first."""
    largest, small = (("dry_one",), ("dry_few", "dry_many")) if dry else (LARGEST, SMALL)
    both = (*largest, *small)
    if part == "compiled":
        # Apart, because how long a compiler takes is the least certain.
        return [gpu_case(name, *DEFAULTS[0], (), (names.COMPILED,)) for name in (largest[0], *small[2:])]
    if part == "formats":
        several = largest if dry else SEVERAL_ON
        return [
            *(gpu_case(name, *kind, backends) for name in ("gpt2_medium", "vit_l_16") for kind in DEFAULTS if not dry),
            *(gpu_case(name, *kind, backends, averages=SEVERAL_COUNT) for name in several for kind in DEFAULTS),
            *(gpu_case(largest[0], *kind, backends) for kind in OTHER_FORMATS),
        ]
    if part == "spreads":
        return [
            spread_case(name, *kind, backend, work)
            for name in (("dry_few",) if dry else SPREADS_ON)
            for kind in DEFAULTS
            for backend in backends
            for work in names.SPREADS
        ]
    if part == "swept":
        return [swept_case(name, *DEFAULTS[0], backends[0]) for name in (("dry_one",) if dry else SWEPT_ON)]
    # "ours": of both sizes, on the second backend, and to count launches.
    workloads = {"largest": largest, "small": small, "ours": both}[part]
    others = OTHERS if part == "small" else ()
    return [gpu_case(name, *kind, backends, others) for kind in DEFAULTS for name in workloads]
