"""Updates of a model that is spread over ranks, beside torch's class sharded by hand: real gloo ranks of one machine.

torch's class cannot copy an FSDP model; what it takes are the bare DTensors, and that is what it gets here. The ranks
run together, one contestant in turn, and wait for one another before each sample.
"""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from bench.report import write_json
from bench.tables import milliseconds
from swafast import ShardedAveragedModel
from swafast.sharded.parts import spread
from tests.ranks import run_ranks

TORCH_CLASS, TORCH_MULTI, FOREACH, OURS = (
    "AveragedModel",
    "AveragedModel, SWA fn",
    "_foreach_lerp_ on locals",
    "swafast",
)
RANKS = 2
SAMPLES = 40
WARM_UPS = 3


@dataclass(frozen=True)
class Workload:
    """DTensors sharded along their first dimension, and the bar: times faster than torch's class with its function."""

    title: str
    shapes: tuple[tuple[int, int], ...]
    bar: float


WORKLOADS = (
    Workload("300 DTensors of 7x3 and 33x17", ((7, 3), (33, 17)) * 150, 20.0),
    Workload("150 DTensors of 1025x1025", ((1025, 1025),) * 150, 1.2),
)


@dataclass(frozen=True)
class Timed:
    """The samples of one contestant on one workload, in seconds: of each round, the slowest rank's."""

    workload: str
    contestant: str
    samples: list[float] = field(repr=False)

    @property
    def seconds(self) -> float:
        return median(self.samples)


class Bare(nn.Module):
    """DTensors and nothing else."""

    def __init__(self, shapes: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        whole = (torch.randn(shape) for shape in shapes)
        self.params = nn.ParameterList(nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)])) for tensor in whole)


def _time_updates(shapes: tuple[tuple[int, int], ...]) -> dict[str, list[float]]:
    """Time every contestant on this rank."""
    model = Bare(shapes)
    plain, multi = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    ours = ShardedAveragedModel(model)
    params = [param.to_local().detach() for param in model.parameters() if isinstance(param, DTensor)]
    averages = [param.clone() for param in params]
    contestants: dict[str, Callable[[], object]] = {
        TORCH_CLASS: lambda: plain.update_parameters(model),
        TORCH_MULTI: lambda: multi.update_parameters(model),
        FOREACH: lambda: torch._foreach_lerp_(averages, params, 0.1),
        OURS: lambda: ours.update_parameters(model),
    }
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(WARM_UPS + SAMPLES):
        for name, update in contestants.items():
            dist.barrier()
            start = time.perf_counter()
            update()
            if turn >= WARM_UPS:
                samples[name].append(time.perf_counter() - start)
    return samples


def measure_updates() -> list[Timed]:
    rows = []
    for workload in WORKLOADS:
        by_rank = run_ranks(RANKS, _time_updates, workload.shapes)
        for name in by_rank[0]:
            slowest = [max(of_turn) for of_turn in zip(*(samples[name] for samples in by_rank), strict=True)]
            rows.append(Timed(workload.title, name, slowest))
    return rows


# The windows of swapped_into

WINDOWS_MIB = (1, 4, 8, 16, 64)
_SWAPPED_NUMEL = 32 * 2**20


def _time_swaps() -> dict[int, list[float]]:
    model = nn.ParameterList(nn.Parameter(torch.randn(2**20)) for _ in range(_SWAPPED_NUMEL // 2**20))
    for param in model:
        dist.broadcast(param.detach(), 0)
    averaged = ShardedAveragedModel(model)
    samples: dict[int, list[float]] = {mib: [] for mib in WINDOWS_MIB}
    for _ in range(5):
        for mib in WINDOWS_MIB:
            spread.CPU_WINDOW_NBYTES = mib * 2**20
            dist.barrier()
            start = time.perf_counter()
            with averaged.swapped_into(model):
                pass
            samples[mib].append(time.perf_counter() - start)
    return samples


def measure_swaps() -> list[Timed]:
    by_rank = run_ranks(RANKS, _time_swaps)
    title = f"swapped_into and out of {_SWAPPED_NUMEL // 2**20} Mi replicated float32"
    return [
        Timed(title, f"{mib} MiB windows", [max(turn) for turn in zip(*(of[mib] for of in by_rank), strict=True)])
        for mib in WINDOWS_MIB
    ]


# A plan of a model that no machine here holds


@dataclass(frozen=True)
class Planned:
    """What planning one rank's part of Llama-3-405B over 1024 ranks took."""

    mode: str
    rank: int
    seconds: float
    peak_bytes: int
    share: float  # of an even part


class Group(nn.Module):
    """Modules that FSDP shards together. It is never run."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)


def llama_405b() -> Group:
    """Make the params of Llama-3-405B by their shapes, on the meta device."""
    width, kv, inner, depth, words = 16384, 1024, 53248, 126, 128256

    def linear(outputs: int, inputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False, device="meta", dtype=torch.bfloat16)

    def norm() -> nn.Module:
        return nn.RMSNorm(width, device="meta", dtype=torch.bfloat16)

    def layer() -> nn.Module:
        attention = [linear(width, width), linear(kv, width), linear(kv, width), linear(width, width)]
        perceptron = [linear(inner, width), linear(inner, width), linear(width, inner)]
        return Group(*attention, *perceptron, norm(), norm())

    return Group(*(layer() for _ in range(depth)), linear(words, width), norm(), linear(words, width))


def plan_405b(ranks: int = 1024, some: tuple[int, ...] = (0, 511, 1023)) -> list[Planned]:
    """Plan what some of 1024 ranks average, in this one process: replicated (DDP) and under FSDP2."""
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    found = []
    for rank in some:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        try:
            model = llama_405b()
            even = sum(param.numel() for param in model.parameters()) / ranks
            found.append(_plan("replicated", model, rank, ranks, even))
            mesh = init_device_mesh("cpu", (ranks,))
            for part in model.parts:
                if isinstance(part, Group):
                    fully_shard(part, mesh=mesh)
            fully_shard(model, mesh=mesh)
            found.append(_plan("FSDP2", model, rank, ranks, even))
        finally:
            dist.destroy_process_group()
    return found


def _plan(mode: str, model: nn.Module, rank: int, ranks: int, even: float) -> Planned:
    from swafast.sharded.construction import format_of_average
    from swafast.sharded.parts.holdings import find_holdings
    from swafast.sharded.parts.shares import share_out

    def plan() -> int:
        holdings = [held.holding for held in find_holdings(model, tuple(range(ranks)))]
        formats = {each.name: format_of_average(each, None, False) for each in holdings}
        return sum(share.numel for share in share_out(holdings, formats, rank, share_replicas=False))

    start = time.perf_counter()
    plan()
    seconds = time.perf_counter() - start
    tracemalloc.start()
    own = plan()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return Planned(mode, rank, seconds, peak, own / even)


# The report


@dataclass(frozen=True)
class Report:
    environment: dict[str, Any]
    timed: list[Timed]
    planned: list[Planned]

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Report:
        data = json.loads(path.read_text())
        timed, planned = [Timed(**row) for row in data["timed"]], [Planned(**row) for row in data["planned"]]
        return cls(data["environment"], timed, planned)

    def find(self, workload: str, contestant: str) -> Timed:
        return next(row for row in self.timed if (row.workload, row.contestant) == (workload, contestant))

    def bars(self) -> list[tuple[str, str, str, bool]]:
        """Give (work, required, measured, met) of each bar."""
        rows = []
        for workload in WORKLOADS:
            ratio = self.find(workload.title, TORCH_MULTI).seconds / self.find(workload.title, OURS).seconds
            met = ratio >= workload.bar
            rows.append(
                (f"{workload.title}, {RANKS} ranks", f">= {workload.bar:g}x {TORCH_MULTI}", f"{ratio:.2f}x", met)
            )
        for mode in dict.fromkeys(row.mode for row in self.planned):
            of_mode = [row for row in self.planned if row.mode == mode]
            above = max(row.share for row in of_mode) - 1
            seconds, peak = max(row.seconds for row in of_mode), max(row.peak_bytes for row in of_mode)
            work = f"plan of Llama-3-405B, 1024 ranks, {mode}"
            rows.append((work, "<= 0.1% above even", f"{above:+.4%}", above <= 1e-3))
            rows.append((work, "< 0.5 s", f"{seconds:.3f} s", seconds < 0.5))
            rows.append((work, "< 20 MB", f"{peak / 1e6:.1f} MB", peak < 20e6))
        return rows


def times_table(report: Report) -> Table:
    table = Table(title=f"On {RANKS} gloo ranks, the slower one of each sample", title_justify="left")
    for column in ("work", "by"):
        table.add_column(column)
    table.add_column("ms", justify="right")
    last = ""
    for row in report.timed:
        table.add_row("" if row.workload == last else row.workload, row.contestant, milliseconds(row.seconds))
        last = row.workload
    return table


def bars_table(report: Report) -> Table:
    table = Table(title="Numbers", title_justify="left")
    for column in ("bar", "required", "measured", ""):
        table.add_column(column)
    for work, required, measured, met in report.bars():
        table.add_row(work, required, measured, "ok" if met else "short", style=None if met else "bold red")
    return table


def measure(environment: dict[str, Any]) -> Report:
    report = Report(environment, [*measure_updates(), *measure_swaps()], plan_405b())
    assert all(math.isfinite(row.seconds) for row in report.timed)
    return report
