"""What this rank holds of a model: each param whole (DDP), a DTensor's shard, or a run (FSDP1, ZeRO-3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module

from ...terms.copying import is_plain
from ...terms.names import named_params, persistent_buffers, unwrap
from ...torch_private import distributed as private
from .holdings import Held, Holding, Mesh, Sharding, is_fsdp1, is_zero, memory_order, mesh_of, name_ranks
from .runs import flat_holdings, zero_holdings


def partial_meshes(model: Module, ranks: Sequence[int]) -> dict[str, Mesh]:
    """Return, by name, the meshes of this rank's DTensors that lack some of ``ranks``; those may have their own."""
    root = unwrap(model)
    named = {**named_params(root, "model"), **persistent_buffers(root)}
    meshes = {name: mesh_of(tensor.device_mesh) for name, tensor in named.items() if isinstance(tensor, DTensor)}
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
    in_runs = flat_holdings(root, tuple(ranks)) if is_fsdp1(root) else {}
    in_runs |= zero_holdings(root, tuple(ranks)) if is_zero(root) else {}
    names_in_runs = {name for held in in_runs.values() for name in held.holding.names}
    by_torch = {name for names in copied_by_torch(model) for name in names}
    found: list[Held] = []
    for is_buffer, tensors in ((False, named_params(root, "model")), (True, persistent_buffers(root))):
        tied: dict[int, tuple[list[str], Tensor]] = {}
        for name, tensor in tensors.items():
            if name in in_runs:
                found.append(in_runs[name])
            elif name not in names_in_runs and name not in by_torch and name.rpartition(".")[2] != private.FLAT_PARAM:
                tied.setdefault(id(tensor), ([], tensor))[0].append(name)
        for names, tensor in tied.values():
            siblings = (meshes or {}).get(names[0], ())
            found.append(_hold(tuple(names), tensor, is_buffer, tuple(ranks), siblings))
        if not is_buffer:
            listed = {held.holding.name for held in found}
            found.extend(held for name, held in in_runs.items() if name not in listed)
    return found


def _hold(
    names: tuple[str, ...], tensor: Tensor, is_buffer: bool, ranks: tuple[int, ...], siblings: tuple[Mesh, ...]
) -> Held:
    """Describe what this rank holds of a param or buffer that does not lie in a run."""
    if isinstance(tensor, DTensor):
        local, sharding, offsets, sizes, replicas = _shard_of(names[0], tensor, ranks, siblings)
    else:
        local, sharding, replicas = tensor, Sharding("replicated"), ranks
        offsets, sizes = (0,) * tensor.dim(), tuple(tensor.shape)
    if local.layout != torch.strided:
        order = None
    else:
        order = memory_order(sizes, local.stride()) if local.numel() else tuple(range(tensor.dim()))
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
    mesh = mesh_of(tensor.device_mesh)
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
        layouts = " and ".join(f"{mesh.shape} on {name_ranks(mesh.ranks)}" for mesh in meshes)
        raise ValueError(f"{name!r} must be on one mesh, or on meshes of one shape that share no rank, got {layouts}")


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
