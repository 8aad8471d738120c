"""What this rank holds of params that lie in runs: in FSDP1's flat params, or partitioned by ZeRO-3."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from ...terms.names import canonical, named_params
from ...torch_private import distributed as private
from ...torch_private.modules import named_modules
from .holdings import Held, Holding, Sharding, memory_order
from .zero import zero_runs


def flat_holdings(root: Module, ranks: tuple[int, ...]) -> dict[str, Held]:
    """Return what this rank holds of params in FSDP1's flat params, by name."""
    prefixes = {id(module): canonical(name) for name, module in named_modules(root, distinct=True)}
    found: dict[str, Held] = {}
    for flat in private.flat_params(root):
        replicas = (dist.get_rank(),) if flat.replicas is None else tuple(dist.get_process_group_ranks(flat.replicas))
        for shard in flat.shards:
            names = tuple(canonical(".".join(filter(None, (prefixes[id(flat.module)], name)))) for name in shard.names)
            if flat.num_ranks != len(ranks) or not set(replicas) <= set(ranks):
                raise ValueError(
                    f"process_group must be the {flat.num_ranks} ranks that {names[0]!r} is spread over, "
                    f"got {len(ranks)} ranks"
                )
            local = flat.local[shard.offset : shard.offset + shard.stop - shard.start]
            order, run = memory_order(shard.shape, shard.stride), (shard.start, shard.stop)
            holding = _holding_of_run("flat", names, shard.shape, local, order, run, replicas, not flat.sharded)
            found[names[0]] = Held(holding, local, flat, shard.offset, shard.trains)
    return found


def zero_holdings(root: Module, ranks: tuple[int, ...]) -> dict[str, Held]:
    """Return what this rank holds of the params that ZeRO-3 has partitioned, by name."""
    found: dict[str, Held] = {}
    for run in zero_runs(named_params(root, "model"), ranks):
        local = run.master.local[run.offset : run.offset + run.stop - run.start]
        order, bounds = tuple(range(len(run.shape))), (run.start, run.stop)
        holding = _holding_of_run("zero", run.names, run.shape, local, order, bounds, (dist.get_rank(),), False)
        found[run.names[0]] = Held(holding, local, run.master, run.offset, used_in=run.working, seen=run.shown)
    return found


def _holding_of_run(
    kind: str,
    names: tuple[str, ...],
    shape: tuple[int, ...],
    local: Tensor,
    order: tuple[int, ...] | None,
    run: tuple[int, int],
    replicas: tuple[int, ...],
    always_cut: bool,
) -> Holding:
    """Return a holding of a run, (start, stop), of a param, in whose elements ``order`` is that of the memory."""
    return Holding(
        names=names,
        is_buffer=False,
        shape=shape,
        dtype=local.dtype,
        device=local.device,
        sharding=Sharding(kind),
        offsets=(0,) * len(shape),
        sizes=shape,
        order=order,
        start=run[0],
        stop=run[1],
        replicas=replicas,
        always_cut=always_cut,
    )
