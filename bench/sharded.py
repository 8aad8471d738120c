"""Updates of a model that is spread over ranks, beside torch's class sharded by hand: real gloo ranks of one machine.

torch's class cannot copy an FSDP model, so here it averages the bare DTensors. The ranks run together, one contestant
after another, and wait for each other before each sample.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from bench import internals, names
from bench.report import Row, Times
from swafast import ShardedAveragedModel
from tests.ranks import run_ranks

TORCH_DTENSORS, TORCH_MULTI, FOREACH_LOCAL = "AveragedModel", "AveragedModel, SWA fn", "_foreach_lerp_ on locals"
RANKS = 2
SAMPLES, SWAP_SAMPLES = 40, 5
WARM_UPS = 3


# The shapes of DTensors, sharded along their first dimension.
WORKLOADS = {
    "300 DTensors of 7x3 and 33x17": ((7, 3), (33, 17)) * 150,
    "150 DTensors of 1025x1025": ((1025, 1025),) * 150,
}


def _time_updates(shapes: tuple[tuple[int, int], ...]) -> dict[str, list[float]]:
    """Time every contestant on this rank."""
    mesh, whole = init_device_mesh("cpu", (dist.get_world_size(),)), (torch.randn(shape) for shape in shapes)
    model = nn.ParameterList(nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)])) for tensor in whole)
    plain, multi = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    ours = ShardedAveragedModel(model)
    params = [param.to_local().detach() for param in model.parameters() if isinstance(param, DTensor)]
    averages = [param.clone() for param in params]
    contestants: dict[str, Callable[[], object]] = {
        TORCH_DTENSORS: lambda: plain.update_parameters(model),
        TORCH_MULTI: lambda: multi.update_parameters(model),
        FOREACH_LOCAL: lambda: torch._foreach_lerp_(averages, params, 0.1),
        names.OURS: lambda: ours.update_parameters(model),
    }
    return _in_turns(contestants, SAMPLES)


def _in_turns(contestants: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Return the seconds of each contestant on this rank; all ranks begin a sample together."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(WARM_UPS + count):
        for name, call in contestants.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
    return {name: taken[WARM_UPS:] for name, taken in samples.items()}


def measure_updates() -> list[Row]:
    rows = []
    for title, shapes in WORKLOADS.items():
        numel = sum(rows * columns for rows, columns in shapes)
        # Read both, write one, in float32.
        base = Row(title, title, "float32", "", numel, len(shapes), 12 * numel)
        rows += _timed(base, run_ranks(RANKS, _time_updates, shapes))
    return rows


def _timed(base: Row, by_rank: list[dict[str, list[float]]]) -> list[Row]:
    """Return a row for each contestant: of each round, the slowest rank's time."""
    return [
        replace(base, provider=name, wall=Times.of(map(max, *(samples[name] for samples in by_rank))))
        for name in by_rank[0]
    ]


# The windows of swapped_into

WINDOWS_MIB = (1, 4, 8, 16, 64)
_SWAPPED_NUMEL = 32 * 2**20


def _time_swaps() -> dict[str, list[float]]:
    model = nn.ParameterList(nn.Parameter(torch.randn(2**20)) for _ in range(_SWAPPED_NUMEL // 2**20))
    for param in model:
        dist.broadcast(param.detach(), 0)
    averaged = ShardedAveragedModel(model)

    def swap(mib: int) -> None:
        internals.set_window(mib * 2**20)
        with averaged.swapped_into(model):
            pass

    return _in_turns({f"{mib} MiB windows": partial(swap, mib) for mib in WINDOWS_MIB}, SWAP_SAMPLES)


def measure_swaps() -> list[Row]:
    title = f"swapped_into and out of {_SWAPPED_NUMEL // 2**20} Mi replicated float32"
    numel = _SWAPPED_NUMEL
    # There and back, each side read and written.
    base = Row("swap", title, "float32", "", numel, numel // 2**20, 16 * numel)
    return _timed(base, run_ranks(RANKS, _time_swaps))


# A plan of a model that no machine here holds


def llama_405b() -> nn.Sequential:
    """Make the params of Llama-3-405B by their shapes, on the meta device; never run."""
    width, kv, inner, depth, words = 16384, 1024, 53248, 126, 128256
    linears = ((width, width), (kv, width), (kv, width), (width, width), (inner, width), (inner, width), (width, inner))

    def linear(outputs: int, inputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False, device="meta", dtype=torch.bfloat16)

    def norm() -> nn.Module:
        return nn.RMSNorm(width, device="meta", dtype=torch.bfloat16)

    layers = (Layer(*(linear(*shape) for shape in linears), norm(), norm()) for _ in range(depth))
    return Layer(*layers, linear(words, width), norm(), linear(words, width))


class Layer(nn.Sequential):
    """Modules that FSDP shards together."""


@dataclass(frozen=True)
class Planned:
    """What it took to plan one rank's part of a large model."""

    mode: str
    rank: int
    seconds: float
    peak_bytes: int
    share: float  # of an even part


def plan_405b(ranks: int = 1024, some: tuple[int, ...] = (0, 511, 1023)) -> list[Planned]:
    """Plan what some of the ranks average, in this one process: replicated (DDP) and under FSDP2."""
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
            for part in model:
                if isinstance(part, Layer):
                    fully_shard(part, mesh=mesh)
            fully_shard(model, mesh=mesh)
            found.append(_plan("FSDP2", model, rank, ranks, even))
        finally:
            dist.destroy_process_group()
    return found


def _plan(mode: str, model: nn.Module, rank: int, ranks: int, even: float) -> Planned:
    start = time.thread_time()  # not the clock: other processes must not count
    internals.plan_shares(model, rank, ranks)
    seconds = time.thread_time() - start
    tracemalloc.start()
    own = internals.plan_shares(model, rank, ranks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return Planned(mode, rank, seconds, peak, own / even)
