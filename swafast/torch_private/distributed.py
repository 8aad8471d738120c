"""Names of ``torch.distributed`` that are not public API: a DTensor's local tensor, FSDP1's flat params, groups' names.

A test fails with the name when a torch release changes one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn import Module

#: The name under which an FSDP1 module registers its flat param.
FLAT_PARAM = "_flat_param"


def local_tensors(tensors: Sequence[DTensor]) -> list[Tensor]:
    """Give what DTensors hold here, the tensors themselves: ``to_local()`` makes new objects, at 1 us each."""
    return [tensor._local_tensor for tensor in tensors]


def specs(tensors: Sequence[DTensor]) -> list[object]:
    """Give what says how DTensors are spread: mesh, placements, shape."""
    return [tensor._spec for tensor in tensors]


def box_of(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give the (offsets, sizes) of what a DTensor holds here, as its own checkpoints do.

    Raises:
        ValueError: it holds more than one box, or a rank's part of a sum.
    """
    try:
        boxes = tensor.__create_chunk_list__()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if len(boxes) != 1:
        raise ValueError(f"{len(boxes)} boxes on one rank")
    return tuple(boxes[0].offsets), tuple(boxes[0].sizes)


def group_timeout(group: ProcessGroup) -> timedelta | None:
    """Give how long a collective of ``group`` waits for a peer; None where its backend does not say."""
    for device_type in ("cpu", "cuda"):
        with contextlib.suppress(RuntimeError, AttributeError):
            return group._get_backend(torch.device(device_type)).options._timeout
    return None


def store_of(group: ProcessGroup) -> dist.Store | None:
    """Return the store through which the ranks of ``group`` have met; None for a fake group, which has no peers."""
    backend, store = dist.distributed_c10d._world.pg_map[group]
    return None if backend == "fake" else store


_naming = threading.Lock()


def new_group(
    ranks: Sequence[int], name: str, *, timeout: timedelta | None = None, backend: str | None = None
) -> ProcessGroup:
    """Make a process group over ``ranks`` of the default one, this one among them, that only these have to make.

    torch's own name for such a group counts the groups that this rank is in. Where ranks differ in that, as when the
    first and the last stage of a pipeline have a group to themselves, each would wait under another name.
    """
    thread = threading.get_ident()

    def named(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return of_torch(*args, **kwargs)
        unname()
        return name

    def unname() -> None:
        # At once, since what follows waits for peers, and other threads may make groups meanwhile.
        if dist.distributed_c10d._process_group_name is named:
            dist.distributed_c10d._process_group_name = of_torch
            _naming.release()

    _naming.acquire()
    of_torch, dist.distributed_c10d._process_group_name = dist.distributed_c10d._process_group_name, named
    try:
        group = dist.new_group(list(ranks), timeout=timeout, backend=backend, use_local_synchronization=True)
    finally:
        unname()
    assert isinstance(group, ProcessGroup)
    return group


@dataclass(frozen=True)
class FlatShard:
    """What the flat param of an FSDP1 module holds here of one of the original params."""

    names: tuple[str, ...]  # under the FSDP module: the param's own, then those tied to it
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # of the original; dense
    start: int  # of the elements held, in the order of the original's memory
    stop: int
    offset: int  # of the first of them in the local flat tensor


@dataclass(frozen=True)
class FlatParam:
    """The flat param of one FSDP1 module."""

    module: FullyShardedDataParallel
    shards: tuple[FlatShard, ...]
    replicas: ProcessGroup | None  # the ranks that hold the same elements, where there are several
    num_ranks: int  # that it is spread over, replicas and all
    sharded: bool  # False for NO_SHARD

    @property
    def local(self) -> Tensor:
        """This rank's flat tensor, whether the module is sharded at the moment or not."""
        flat = _handle(self.module).flat_param
        local = getattr(flat, "_local_shard", None)  # not there before the first forward pass
        return local if local is not None else flat.detach()


def _handle(module: FullyShardedDataParallel):  # type: ignore[no-untyped-def]  # a private class
    return module._handle


def flat_params(root: Module) -> list[FlatParam]:
    """Give the flat params of all FSDP1 modules in ``root``, each once, in the order of the modules."""
    return [_flat_param(module) for module in FullyShardedDataParallel.fsdp_modules(root) if _handle(module)]


def _flat_param(module: FullyShardedDataParallel) -> FlatParam:
    handle = _handle(module)
    flat = handle.flat_param
    tied: dict[tuple[Module, str], list[str]] = {}
    for info in flat._shared_param_infos:
        first = (info.prim_module, info.prim_param_name)
        tied.setdefault(first, []).append(".".join(filter(None, (info.module_name, info.param_name))))
    shards = []
    originals: Sequence = zip(  # type: ignore[assignment]
        flat._fqns, flat._param_infos, flat._shapes, flat._strides, flat._shard_param_infos, strict=True
    )
    for name, info, shape, stride, part in originals:
        names = (name, *tied.get((info.module, info.param_name), ()))
        start, stop = (part.intra_param_start_idx, part.intra_param_end_idx + 1) if part.in_shard else (0, 0)
        shards.append(FlatShard(names, tuple(shape), tuple(stride), start, stop, part.offset_in_shard or 0))
    sharded = bool(handle.uses_sharded_strategy)
    replicas = getattr(module, "_inter_node_pg", None) if sharded else module.process_group
    num_ranks = len(dist.get_process_group_ranks(module.process_group))
    num_ranks *= replicas.size() if sharded and replicas is not None else 1
    return FlatParam(module, tuple(shards), replicas, num_ranks, sharded)


def reshard_flat_params(root: Module) -> None:
    """Give the gathered params of all FSDP1 modules in ``root`` back, as FSDP1 does after a backward pass.

    After a forward pass without a backward the root's stay gathered, and what is written into shards goes unseen.
    """
    for module in FullyShardedDataParallel.fsdp_modules(root):
        handle = _handle(module)
        if handle and hasattr(handle.flat_param, "_local_shard"):  # else it has not run yet
            handle.reshard(bool(handle.uses_sharded_strategy))
            handle.post_reshard()
            handle._prefetched = False


def end_forward(root: Module) -> None:
    """Have FSDP2 modules in ``root`` forget a forward pass that an exception broke off, and shard what it gathered.

    ``FSDPModule.reshard()`` takes such a pass to be going on, and leaves the root's params gathered.
    """
    states = [module._get_fsdp_state() for module in root.modules() if isinstance(module, FSDPModule)]
    if all(state._training_state.name == "IDLE" for state in states):
        return
    for state in states:
        if hasattr(state, "_reset_iter_state"):
            if state._is_root:
                state._reset_iter_state()
        else:
            _end_forward_of(state)


def _end_forward_of(state: Any) -> None:
    """Do what torch 2.13 does by itself."""
    group = state._fsdp_param_group
    state._training_state = type(state._training_state).IDLE
    state._state_ctx.iter_forward_root = state._comm_ctx.all_gather_state = None
    state._comm_ctx.post_forward_order.clear()
    if group is not None:
        group._training_state = state._training_state
        group._all_gather_result = None
        group._post_forward_indices.clear()
        group.reshard()
