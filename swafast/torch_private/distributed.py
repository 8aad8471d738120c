"""Names that are private in ``torch.distributed``: local tensors of DTensors, FSDP1's flat params, names of groups."""

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
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.nn import Module

from .modules import named_modules

#: The name under which an FSDP1 module registers its flat param.
FLAT_PARAM = "_flat_param"


def storage_info(path: str, offset: int, length: int) -> Any:
    """Return the place of one entry in the files of a distributed checkpoint, in bytes."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo  # importing it takes a while

    return _StorageInfo(path, offset, length)


def local_tensors(tensors: Sequence[DTensor]) -> list[Tensor]:
    """Return the local tensors of DTensors themselves; ``to_local()`` makes a new object, which takes 1 us."""
    return [tensor._local_tensor for tensor in tensors]


def specs(tensors: Sequence[DTensor]) -> list[object]:
    """Return each DTensor's spec: its mesh, placements and shape."""
    return [tensor._spec for tensor in tensors]


def box_of(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the (offsets, sizes) of this rank's box of a DTensor, as torch's checkpoints describe it.

    Raises:
        ValueError: the rank holds more than one box, or a part of a sum (``Partial``).
    """
    for placement in tensor._spec.placements:
        if isinstance(placement, Partial):  # torch 2.6 takes it for replicated
            raise ValueError("it holds a part of a sum")
    try:
        boxes = tensor.__create_chunk_list__()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if len(boxes) != 1:
        raise ValueError(f"a DTensor must have one box on each rank, got {len(boxes)}")
    return tuple(boxes[0].offsets), tuple(boxes[0].sizes)


def group_timeout(group: ProcessGroup) -> timedelta | None:
    """Return how long a collective of ``group`` waits for a peer; None if its backend does not tell."""
    for device_type in ("cpu", "cuda"):
        with contextlib.suppress(RuntimeError, AttributeError):
            return group._get_backend(torch.device(device_type)).options._timeout
    return None


def store_of(group: ProcessGroup) -> dist.Store | None:
    """Return the store that the ranks of ``group`` share; None for a fake group, which has no peers."""
    backend, store = dist.distributed_c10d._world.pg_map[group]
    return None if backend == "fake" else store


def taken_devices(group: ProcessGroup) -> list[str]:
    """Return the types of the devices on which the collectives of ``group`` take tensors."""
    return [device.type for device in group._device_types]


def on_mesh(
    local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int], stride: Sequence[int]
) -> DTensor:
    """Return a DTensor of this rank's tensor where that is: ``DTensor.from_local`` moves it to the mesh's device."""
    meta = TensorMeta(torch.Size(shape), tuple(stride), local.dtype)
    return DTensor(local, DTensorSpec(mesh, tuple(placements), tensor_meta=meta), requires_grad=False)


_naming = threading.Lock()


def new_group(
    ranks: Sequence[int], name: str, *, timeout: timedelta | None = None, backend: str | None = None
) -> ProcessGroup:
    """Make a process group of ``ranks`` of the default group; only these ranks, this one among them, need to call it.

    By default torch names such a group after the number of groups that the rank is in. This number can differ between
    ranks, for instance if the first and last stage of a pipeline share a group. They would then wait for each other
    under different names, so ``name`` is used instead.
    """
    thread = threading.get_ident()

    def named(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return of_torch(*args, **kwargs)
        unname()
        return name

    def unname() -> None:
        # Before torch waits for peers: other threads may make groups meanwhile.
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
    """This rank's shard of one original param in the flat param of an FSDP1 module."""

    names: tuple[str, ...]  # relative to the FSDP module: the param's own, then those tied to it
    shape: tuple[int, ...]  # of the original
    stride: tuple[int, ...]  # of the original; dense
    start: int  # first element of the shard, counted in the order of the original's memory
    stop: int
    offset: int  # of the first element in the local flat tensor
    trains: bool  # requires_grad of the original; without use_orig_params, that of the flat param


@dataclass(frozen=True)
class FlatParam:
    """The flat param of one FSDP1 module."""

    module: FullyShardedDataParallel
    shards: tuple[FlatShard, ...]
    replicas: ProcessGroup | None  # the ranks that hold the same elements; None without replicas
    num_ranks: int  # that share the param, replicas included
    sharded: bool  # False for NO_SHARD

    @property
    def local(self) -> Tensor:
        """This rank's flat shard, also while the module's params are gathered."""
        flat = _handle(self.module).flat_param
        local = getattr(flat, "_local_shard", None)  # does not exist before the first forward pass
        return local if local is not None else flat.detach()

    def is_current(self) -> bool:
        """Return True: a module keeps its flat param."""
        return True


def _handle(module: FullyShardedDataParallel):  # type: ignore[no-untyped-def]  # a private class
    return module._handle


def flat_params(root: Module) -> list[FlatParam]:
    """Return the flat param of each FSDP1 module in ``root``, in the order of the modules."""
    return [_flat_param(module) for module in FullyShardedDataParallel.fsdp_modules(root) if _handle(module)]


def _flat_param(module: FullyShardedDataParallel) -> FlatParam:
    handle = _handle(module)
    flat = handle.flat_param
    tied: dict[tuple[int, str], list[str]] = {}
    for info in flat._shared_param_infos:
        first = (id(info.prim_module), info.prim_param_name)
        tied.setdefault(first, []).append(".".join(filter(None, (info.module_name, info.param_name))))
    shards = []
    params = flat._params or [flat] * len(flat._fqns)
    originals: Sequence = zip(  # type: ignore[assignment]
        flat._fqns, flat._param_infos, flat._shapes, flat._strides, flat._shard_param_infos, params, strict=True
    )
    for name, info, shape, stride, part, param in originals:
        names = (name, *tied.get((id(info.module), info.param_name), ()))
        start, stop = (part.intra_param_start_idx, part.intra_param_end_idx + 1) if part.in_shard else (0, 0)
        offset = part.offset_in_shard or 0
        shards.append(FlatShard(names, tuple(shape), tuple(stride), start, stop, offset, param.requires_grad))
    sharded = bool(handle.uses_sharded_strategy)
    replicas = getattr(module, "_inter_node_pg", None) if sharded else module.process_group
    num_ranks = len(dist.get_process_group_ranks(module.process_group))
    num_ranks *= replicas.size() if sharded and replicas is not None else 1
    return FlatParam(module, tuple(shards), replicas, num_ranks, sharded)


def reshard_flat_params(root: Module) -> None:
    """Free the gathered params of all FSDP1 modules in ``root``, as FSDP1 does after a backward pass.

    After a forward pass without a backward, the root's params stay gathered, and the model ignores writes to shards.
    """
    for module in FullyShardedDataParallel.fsdp_modules(root):
        handle = _handle(module)
        if handle and hasattr(handle.flat_param, "_local_shard"):  # the module has run
            handle.reshard(bool(handle.uses_sharded_strategy))
            handle.post_reshard()
            handle._prefetched = False


def end_forward(root: Module) -> None:
    """Reset FSDP2 modules in ``root`` after an exception in a forward pass, and shard what the pass gathered.

    Without this, ``FSDPModule.reshard()`` treats the pass as still running and leaves the root's params gathered.
    """
    states = [
        module._get_fsdp_state() for _, module in named_modules(root, distinct=True) if isinstance(module, FSDPModule)
    ]
    if all(state._training_state.name == "IDLE" for state in states):
        return
    for state in states:
        if hasattr(state, "_reset_iter_state"):
            if state._is_root:
                state._reset_iter_state()
        else:
            _end_forward_of(state)


def _end_forward_of(state: Any) -> None:
    """Do the same as ``_reset_iter_state`` for a release of torch that lacks it."""
    group = state._fsdp_param_group
    state._training_state = type(state._training_state).IDLE
    state._state_ctx.iter_forward_root = state._comm_ctx.all_gather_state = None
    state._comm_ctx.post_forward_order.clear()
    if group is not None:
        group._training_state = state._training_state
        group._all_gather_result = None
        group._post_forward_indices.clear()
        group.reshard()
