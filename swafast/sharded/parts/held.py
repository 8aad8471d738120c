"""What this rank holds of a param or buffer, and how that is spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ...terms.layout import is_dense
from ...torch_private.distributed import FlatParam
from .zero import Masters, WorkingRun

#: What a run lies in, outside of the modules.
RunHome = FlatParam | WorkingRun | Masters


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
        ranks = " and of ".join(name_ranks(mesh.ranks) for mesh in self.meshes)
        return f"{self.placements} on a mesh of {self.mesh.shape}{of} of {ranks}"


_WITHOUT_MESH = {
    "replicated": "one whole tensor on each rank",
    "flat": "a run of an FSDP1 flat parameter",
    "zero": "a run on each rank, by DeepSpeed's ZeRO-3",
}


def name_ranks(ranks: Sequence[int]) -> str:
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
    found_in: Tensor | RunHome  # the tensor registered in the model, or what a run lies in
    offset: int = 0  # of a run, in that
    trains: bool = True  # requires_grad of the original in a flat param
    used_in: WorkingRun | None = None  # under ZeRO-3 what a forward pass reads: `found_in` has masters
    seen: Tensor | None = None  # under ZeRO-3 what a user sees

    def place(self, for_use: bool) -> tuple[Tensor | RunHome, int]:
        """Return what an update, or with ``for_use`` a forward pass, finds the part in, and its offset there."""
        return (self.used_in, 0) if for_use and self.used_in is not None else (self.found_in, self.offset)

    @property
    def shown(self) -> Tensor:
        """What a user sees of a param: the tensor in the model, or this rank's shard of a flat param."""
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
