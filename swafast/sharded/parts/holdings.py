"""What this rank holds of each param: the whole (DDP), a DTensor's shard, or a run (FSDP1, ZeRO-3)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn import Module

from ...terms.copying import is_plain
from ...terms.layout import is_dense
from ...terms.names import canonical, named_params, persistent_buffers, unwrap
from ...torch_private import distributed as private
from ...torch_private.modules import named_modules, named_tensors
from . import zero


@dataclass(frozen=True)
class Mesh:
    """A ``DeviceMesh`` as names and ints, which can be compared."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Sharding:
    """How a tensor is spread over ranks. It must not change after construction."""

    kind: str  # "replicated", "dtensor", "flat" (FSDP1) or "zero" (ZeRO-3)
    mesh: Mesh | None = None  # of a DTensor; it holds this rank
    placements: tuple[object, ...] = ()
    meshes: tuple[Mesh, ...] = ()  # all meshes that hold the tensor: several if it is on each column of a larger mesh

    @property
    def is_run(self) -> bool:
        """Whether a rank holds any run of the elements, not a box."""
        return self.kind in ("flat", "zero")

    def __str__(self) -> str:
        if self.mesh is None:
            return _WITHOUT_MESH[self.kind]
        of = f" {self.mesh.names}" if self.mesh.names else ""
        ranks = " and of ".join(_name_ranks(mesh.ranks) for mesh in self.meshes)
        return f"{self.placements} on a mesh of {self.mesh.shape}{of} of {ranks}"


_WITHOUT_MESH = {
    "replicated": "one whole tensor on each rank",
    "flat": "a run of an FSDP1 flat parameter",
    "zero": "a run on each rank, by DeepSpeed's ZeRO-3",
}


def _name_ranks(ranks: Sequence[int]) -> str:
    if list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


@dataclass(frozen=True)
class Holding:
    """What this rank holds of one param or buffer: a run of memory, inside a box of the whole tensor."""

    names: tuple[str, ...]  # its own, then those tied to it
    is_buffer: bool
    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    device: torch.device
    sharding: Sharding
    offsets: tuple[int, ...]  # of the box in the whole tensor
    sizes: tuple[int, ...]  # of the box
    order: tuple[int, ...] | None  # the box's dimensions, slowest in memory first; None: not dense, so never cut
    start: int  # of the run, in elements of the box, counted in the order of memory
    stop: int
    replicas: tuple[int, ...]  # the ranks that hold the same elements, sorted, this one included
    always_cut: bool  # over the replicas, even without share_replicas
    device_mesh: DeviceMesh | None = field(default=None, compare=False, repr=False)  # of a DTensor
    local_shape: tuple[int, ...] = ()  # of this rank's tensor; empty for a run

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Held:
    """A holding with its tensor."""

    holding: Holding
    local: Tensor  # this rank's part; 1-D for a run
    found_in: Tensor | private.FlatParam | zero.WorkingRun | zero.Masters  # in the model, or what a run lies in
    offset: int = 0  # of a run, in that
    trains: bool = True  # requires_grad of the original in a flat param
    used_in: zero.WorkingRun | None = None  # under ZeRO-3 what a forward pass reads: `found_in` has masters
    seen: Tensor | None = None  # under ZeRO-3 what a user sees

    def place(self, for_use: bool) -> tuple[Tensor | private.FlatParam | zero.WorkingRun | zero.Masters, int]:
        """Return what an update, or with ``for_use`` a forward pass, finds the part in, and its offset there."""
        return (self.used_in, 0) if for_use and self.used_in is not None else (self.found_in, self.offset)

    @property
    def shown(self) -> Tensor:
        """What a user sees of a param: the tensor in the model, or this rank's shard of a flat param."""
        if isinstance(self.found_in, Tensor):
            return self.found_in
        return self.seen if self.seen is not None else self.local.detach().requires_grad_(self.trains)


def reshard(model: Module, *, for_use: bool = True) -> None:
    """Free the params that FSDP modules or ZeRO-3 have gathered, so that ``model`` holds its shards again.

    Args:
        for_use: whether a forward pass is to read what is written into the shards. If not, what ZeRO-3 has gathered
            stays: an update reads none of it.
    """
    for _, module in named_modules(model, distinct=True):
        if isinstance(module, FSDPModule):
            module.reshard()
    if is_fsdp1(model):
        private.reshard_flat_params(model)
    if for_use and is_zero(model):
        zero.free_gathered(tensor for _, tensor in named_tensors(model))


def refuse_written(model: Module) -> None:
    """Raise RuntimeError if :func:`reshard` would lose what was written into a param that ZeRO-3 has gathered."""
    if names := written_while_gathered(model):
        raise RuntimeError(
            f"{names[0]!r} must be as ZeRO-3 has partitioned it, got one written while gathered: write it inside "
            "deepspeed.zero.GatheredParameters(params, modifier_rank=0), and leave that first"
        )


def written_while_gathered(model: Module) -> list[str]:
    """Return the names of params that ZeRO-3 has gathered and that were written since."""
    return zero.written_while_gathered({canonical(name): param for name, param in named_tensors(unwrap(model))})


def is_sharded(model: Module) -> bool:
    """Return whether a rank holds only a part of ``model``, so that forward passes of ranks wait for each other."""
    tensors = [*named_tensors(model), *named_tensors(model, buffers=True)]
    return is_fsdp1(model) or is_zero(model) or any(isinstance(tensor, DTensor) for _, tensor in tensors)


def is_fsdp1(model: Module) -> bool:
    return any(isinstance(module, FullyShardedDataParallel) for _, module in named_modules(model, distinct=True))


def is_zero(model: Module) -> bool:
    """Return whether ZeRO-3 has partitioned params of ``model``."""
    return any(zero.is_partitioned(param) for _, param in named_tensors(model))


def partial_meshes(model: Module, ranks: Sequence[int]) -> dict[str, Mesh]:
    """Return, by name, the meshes of this rank's DTensors that lack some of ``ranks``; those may have their own."""
    root = unwrap(model)
    named = {**named_params(root, "model"), **persistent_buffers(root)}
    meshes = {name: _mesh_of(tensor.device_mesh) for name, tensor in named.items() if isinstance(tensor, DTensor)}
    return {name: mesh for name, mesh in meshes.items() if set(mesh.ranks) != set(ranks)}


def copied_by_torch(model: Module) -> dict[tuple[str, ...], Tensor]:
    """Return the persistent buffers that no kernel takes, so that torch copies them, by all their names."""
    tied: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in persistent_buffers(unwrap(model)).items():
        if not (isinstance(tensor, DTensor) or is_plain(tensor)):
            tied.setdefault(id(tensor), ([], tensor))[0].append(name)
    return {tuple(names): tensor for names, tensor in tied.values()}


def find_holdings(
    model: Module, ranks: Sequence[int], meshes: Mapping[str, tuple[Mesh, ...]] | None = None
) -> list[Held]:
    """Return what this rank holds of each distinct param and persistent buffer of ``model``, in the model's order.

    Left out are the buffers that torch copies.

    Args:
        ranks: the ranks of the averaged model's process group, which all hold plain tensors alike.
        meshes: by name, the meshes that :func:`partial_meshes` has found on all ranks. If FSDP2 shards a param that is
            not in the plan of tensor parallelism, the param is a DTensor on a part of the whole mesh.

    Raises:
        ValueError: a tensor is spread in a way that cannot be averaged. The message names the param.
    """
    root = unwrap(model)
    flat = _flat_holdings(root, tuple(ranks)) if is_fsdp1(root) else {}
    flat |= _zero_holdings(root, tuple(ranks)) if is_zero(root) else {}
    in_flat = {name for held in flat.values() for name in held.holding.names}
    by_torch = {name for names in copied_by_torch(model) for name in names}
    found: list[Held] = []
    for is_buffer, tensors in ((False, named_params(root, "model")), (True, persistent_buffers(root))):
        tied: dict[int, tuple[list[str], Tensor]] = {}
        for name, tensor in tensors.items():
            if name in flat:
                found.append(flat[name])
            elif name not in in_flat and name not in by_torch and name.rpartition(".")[2] != private.FLAT_PARAM:
                tied.setdefault(id(tensor), ([], tensor))[0].append(name)
        for names, tensor in tied.values():
            siblings = (meshes or {}).get(names[0], ())
            found.append(_hold(tuple(names), tensor, is_buffer, tuple(ranks), siblings))
        if not is_buffer:
            listed = {held.holding.name for held in found}
            found.extend(held for name, held in flat.items() if name not in listed)
    return found


def _hold(
    names: tuple[str, ...], tensor: Tensor, is_buffer: bool, ranks: tuple[int, ...], siblings: tuple[Mesh, ...]
) -> Held:
    """Describe what this rank holds of a param or buffer that is not in a flat param."""
    if isinstance(tensor, DTensor):
        local, sharding, offsets, sizes, replicas = _shard_of(names[0], tensor, ranks, siblings)
    else:
        local, sharding, replicas = tensor, Sharding("replicated"), ranks
        offsets, sizes = (0,) * tensor.dim(), tuple(tensor.shape)
    if local.layout != torch.strided:
        order = None
    else:
        order = _order(sizes, local.stride()) if local.numel() else tuple(range(tensor.dim()))
    holding = Holding(
        names=names,
        is_buffer=is_buffer,
        shape=tuple(tensor.shape),
        dtype=local.dtype,
        device=local.device,
        sharding=sharding,
        offsets=offsets,
        sizes=sizes,
        order=order,
        start=0,
        stop=local.numel(),
        replicas=replicas,
        always_cut=sharding.kind == "replicated" and not is_buffer,
        device_mesh=tensor.device_mesh if isinstance(tensor, DTensor) else None,
        local_shape=tuple(local.shape),
    )
    return Held(holding, local, tensor)


def _shard_of(
    name: str, tensor: DTensor, ranks: tuple[int, ...], siblings: tuple[Mesh, ...]
) -> tuple[Tensor, Sharding, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return a DTensor's local tensor, its sharding, the offsets and sizes of its box, and its replicas."""
    (local,) = private.local_tensors([tensor])
    mesh = _mesh_of(tensor.device_mesh)
    sharding = Sharding("dtensor", mesh, tuple(tensor.placements), siblings or (mesh,))
    _require_meshes(name, sharding.meshes, ranks)
    try:
        offsets, sizes = private.box_of(tensor)
    except ValueError as error:
        raise ValueError(f"{name!r} must be sharded or replicated, got {tensor.placements}: {error}") from None
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None or local.numel() == 0:
        offsets = sizes = (0,) * tensor.dim()  # torch has several descriptions of an empty shard
    elif sizes != tuple(local.shape):
        raise ValueError(f"{name!r} must hold {sizes} on this rank, got a local tensor of {tuple(local.shape)}")
    return local, sharding, offsets, sizes, _replicas(tensor, coordinate, sharding.meshes)


def _require_meshes(name: str, meshes: tuple[Mesh, ...], ranks: tuple[int, ...]) -> None:
    on_meshes = [rank for mesh in meshes for rank in mesh.ranks]
    missing = sorted(set(on_meshes) - set(ranks))
    if missing:
        raise ValueError(f"process_group must hold all ranks of the mesh of {name!r}, got one without {missing}")
    if len(set(on_meshes)) < len(on_meshes) or len({mesh.shape for mesh in meshes}) > 1:
        layouts = " and ".join(f"{mesh.shape} on {_name_ranks(mesh.ranks)}" for mesh in meshes)
        raise ValueError(f"{name!r} must be on one mesh, or on meshes of one shape that share no rank, got {layouts}")


def is_spread_as(tensor: DTensor, sharding: Sharding) -> bool:
    """Return whether a DTensor is on the mesh and has the placements of ``sharding``."""
    return (_mesh_of(tensor.device_mesh), tuple(tensor.placements)) == (sharding.mesh, sharding.placements)


@functools.lru_cache(maxsize=8)
def _mesh_of(device_mesh: DeviceMesh) -> Mesh:
    """Describe a mesh. The result is shared by all params on it, since 1024 ranks take 8 KB."""
    return Mesh(
        tuple(device_mesh.mesh_dim_names or ()), tuple(device_mesh.shape), tuple(device_mesh.mesh.flatten().tolist())
    )


def _replicas(tensor: DTensor, coordinate: Sequence[int] | None, meshes: Sequence[Mesh]) -> tuple[int, ...]:
    """Return the ranks, on all ``meshes``, that hold the same elements of ``tensor`` as this rank."""
    if coordinate is None:
        return (dist.get_rank(),)
    index = tuple(
        slice(None) if placement.is_replicate() else slice(at, at + 1)
        for at, placement in zip(coordinate, tensor.placements, strict=True)
    )
    mesh = tensor.device_mesh.mesh
    positions = torch.arange(mesh.numel(), device="cpu").view(mesh.shape)[index].flatten().tolist()
    return tuple(sorted(each.ranks[position] for each in meshes for position in positions))


def _order(sizes: Sequence[int], stride: Sequence[int]) -> tuple[int, ...] | None:
    """Return the dimensions of a dense tensor, the slowest in memory first; None if the tensor is not dense."""
    if not is_dense(sizes, stride):
        return None
    wide = [dim for dim, size in enumerate(sizes) if size > 1]
    by_stride = iter(sorted(wide, key=lambda dim: -stride[dim]))
    # A dimension of size 1 keeps its place, since its stride means nothing.
    return tuple(next(by_stride) if size > 1 else dim for dim, size in enumerate(sizes))


def _flat_holdings(root: Module, ranks: tuple[int, ...]) -> dict[str, Held]:
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
            order, run = _order(shard.shape, shard.stride), (shard.start, shard.stop)
            holding = _holding_of_run("flat", names, shard.shape, local, order, run, replicas, not flat.sharded)
            found[names[0]] = Held(holding, local, flat, shard.offset, shard.trains)
    return found


def _zero_holdings(root: Module, ranks: tuple[int, ...]) -> dict[str, Held]:
    """Return what this rank holds of the params that ZeRO-3 has partitioned, by name."""
    found: dict[str, Held] = {}
    for run in zero.zero_runs(named_params(root, "model"), ranks):
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


def require_same_sharding(before: Holding, now: Holding) -> None:
    """Raise ValueError with the param's name if it is no longer spread over the ranks as at construction."""
    for what, was, got in (
        ("the whole shape", before.shape, now.shape),
        ("the placement", before.sharding, now.sharding),
        ("the part on this rank", (before.start, before.stop), (now.start, now.stop)),
        ("the layout in memory", before.order, now.order),
        ("the replicas", before.replicas, now.replicas),
        ("the ties", before.names, now.names),
    ):
        if was != got:
            raise ValueError(f"{now.name!r} must have {what} that it was averaged with, {was}, got {got}")
