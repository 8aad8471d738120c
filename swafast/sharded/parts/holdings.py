"""What this rank holds of each param or buffer, how that is spread over ranks, and what is gathered meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn import Module

from ...terms.layout import is_dense
from ...terms.names import canonical, renormed_params, unwrap
from ...terms.partitioned import is_partitioned
from ...torch_private import distributed as private
from ...torch_private.modules import named_modules, named_tensors
from . import zero
from .zero import Masters, WorkingRun

#: A tensor of the model, or what a run lies in outside of its modules.
FoundIn = Tensor | private.FlatParam | WorkingRun | Masters


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

    def __str__(self) -> str:
        if self.mesh is None:
            return _WITHOUT_MESH[self.kind]
        of = f" {self.mesh.names}" if self.mesh.names else ""
        ranks = " and of ".join(name_ranks(mesh.ranks) for mesh in self.meshes)
        return f"{self.placements} on a mesh of {self.mesh.shape}{of} of {ranks}"


#: The kinds of which a rank holds any run of the elements, not a box.
RUNS = ("flat", "zero")

_WITHOUT_MESH = {
    "replicated": "one whole tensor on each rank",
    "flat": "a run of an FSDP1 flat parameter",
    "zero": "a run on each rank, by DeepSpeed's ZeRO-3",
}


def name_ranks(ranks: Sequence[int]) -> str:
    if list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def is_spread_as(tensor: DTensor, sharding: Sharding) -> bool:
    """Return whether a DTensor is on the mesh and has the placements of ``sharding``."""
    return (mesh_of(tensor.device_mesh), tuple(tensor.placements)) == (sharding.mesh, sharding.placements)


@functools.lru_cache(maxsize=8)
def mesh_of(device_mesh: DeviceMesh) -> Mesh:
    """Describe a mesh. The result is shared by all params on it, since 1024 ranks take 8 KB."""
    return Mesh(
        tuple(device_mesh.mesh_dim_names or ()), tuple(device_mesh.shape), tuple(device_mesh.mesh.flatten().tolist())
    )


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
    found_in: FoundIn
    offset: int = 0  # of a run, in that
    trains: bool = True  # requires_grad of the original in a flat param
    used_in: WorkingRun | None = None  # under ZeRO-3 what a forward pass reads: `found_in` has masters
    seen: Tensor | None = None  # under ZeRO-3 `ZeroRun.shown`

    def place(self, for_use: bool) -> tuple[FoundIn, int]:
        """Return what an update, or with ``for_use`` a forward pass, finds the part in, and its offset there."""
        return (self.used_in, 0) if for_use and self.used_in is not None else (self.found_in, self.offset)

    @property
    def shown(self) -> Tensor:
        """What a user sees of a param: the tensor in the model, of FSDP1 this rank's run, of ZeRO-3 only the shape."""
        if isinstance(self.found_in, Tensor):
            return self.found_in
        return self.seen if self.seen is not None else self.local.detach().requires_grad_(self.trains)


def memory_order(sizes: Sequence[int], stride: Sequence[int]) -> tuple[int, ...] | None:
    """Return the dimensions of a dense tensor, the slowest in memory first; None if the tensor is not dense."""
    if not is_dense(sizes, stride):
        return None
    wide = [dim for dim, size in enumerate(sizes) if size > 1]
    by_stride = iter(sorted(wide, key=lambda dim: -stride[dim]))
    # A dimension of size 1 keeps its place, since its stride means nothing.
    return tuple(next(by_stride) if size > 1 else dim for dim, size in enumerate(sizes))


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


def reshard(model: Module) -> None:
    """Free the params that FSDP modules of ``model`` have gathered, so that they hold their shards again."""
    for _, module in named_modules(model, distinct=True):
        if isinstance(module, FSDPModule):
            module.reshard()
    if is_fsdp1(model):
        private.reshard_flat_params(model)


def free_gathered(model: Module, *, lossless: bool = True) -> None:
    """Free the params that ZeRO-3 has gathered, so that the next forward pass reads what is written into its runs.

    An update does not need this. It reads masters, and may come while the user has params gathered.

    Raises:
        RuntimeError: with ``lossless``, if that would lose what was written into a gathered param.
    """
    names = written_while_gathered(model) if lossless else []
    if names:
        raise RuntimeError(
            f"{names[0]!r} must be as ZeRO-3 has partitioned it, got one written while gathered: write it inside "
            "deepspeed.zero.GatheredParameters(params, modifier_rank=0), and leave that first"
        )
    zero.free(tensor for _, tensor in named_tensors(model))


def written_while_gathered(model: Module) -> list[str]:
    """Return the names of params that were written while ZeRO-3 had them gathered, so that freeing would lose it."""
    root = unwrap(model)
    renormed = renormed_params(root)  # which a forward pass writes
    params = {canonical(name): param for name, param in named_tensors(root) if is_partitioned(param)}
    return [name for name, param in params.items() if name not in renormed and zero.is_written(param)]


def is_sharded(model: Module) -> bool:
    """Return whether a rank holds only a part of ``model``, so that forward passes of ranks wait for each other."""
    tensors = [*named_tensors(model), *named_tensors(model, buffers=True)]
    return is_fsdp1(model) or is_zero(model) or any(isinstance(tensor, DTensor) for _, tensor in tensors)


def is_fsdp1(model: Module) -> bool:
    return any(isinstance(module, FullyShardedDataParallel) for _, module in named_modules(model, distinct=True))


def is_zero(model: Module) -> bool:
    """Return whether ZeRO-3 has partitioned params of ``model``."""
    return any(is_partitioned(param) for _, param in named_tensors(model))
