"""Construction of a sharded average: its formats and planes, and the checks that all ranks agree."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module

from ..op import checks
from ..op.buckets import PlaneLike, new_in_buckets
from ..op.checksum import checksum
from ..terms.formats import Format, format_of, stored_dtype, with_spread
from ..terms.names import empty_buffers, unwrap
from ..terms.spread import Spread
from .parts.all_gather import AllGather
from .parts.finding import partial_meshes
from .parts.holdings import Held, Holding, Mesh
from .parts.ranks import OneProcess, Ranks
from .parts.rendezvous import shared_ranks
from .parts.shares import Share, view_of_run


def ranks_over(process_group: ProcessGroup | Ranks | None, call: str) -> Ranks:
    """Return the ranks of a new average. Without a process group they are one process. Collective.

    Args:
        process_group, call: as for :func:`~.parts.rendezvous.shared_ranks`.

    Raises:
        TypeError, LostPeerError: as :func:`~.parts.rendezvous.shared_ranks`.
        ValueError: likewise; or a launcher such as torchrun has started several processes, and there is no group.
    """
    ranks = shared_ranks(process_group, call)
    started = os.environ.get("WORLD_SIZE", "1")
    if process_group is None and isinstance(ranks, OneProcess) and started != "1":
        raise ValueError(
            f"process_group must exist, got none in one of {started} processes (WORLD_SIZE): call "
            "torch.distributed.init_process_group before"
        )
    return ranks


def gather_meshes(model: Module, ranks: Ranks) -> dict[str, tuple[Mesh, ...]]:
    """Return, by name, all meshes of a DTensor if they hold only some of the ranks each. Collective."""
    found: dict[str, set[Mesh]] = {}
    for meshes in ranks.gather(partial_meshes(model, ranks.ranks)):
        for name, mesh in meshes.items():
            found.setdefault(name, set()).add(mesh)
    return {name: tuple(sorted(meshes, key=lambda mesh: mesh.ranks)) for name, meshes in found.items()}


def format_of_average(
    holding: Holding, requested: str | None, use_buffers: bool, spread: Spread | None = None
) -> Format | None:
    """Return the format of a holding's average, with the spread that params have; None if it is copied.

    Raises:
        NotImplementedError: its dtype cannot be averaged. The message names the param.
    """
    averaged = holding.dtype.is_floating_point or holding.dtype.is_complex
    if not averaged or (holding.is_buffer and not use_buffers):
        return None
    stored = stored_dtype(requested, holding.dtype)
    fmt = format_of(requested, stored)
    if fmt is None:
        raise NotImplementedError(f"{holding.name!r} must have a dtype that can be averaged, got {holding.dtype}")
    return fmt if holding.is_buffer else with_spread(fmt, spread, stored)


def followed(
    shares: Sequence[Share], held: Mapping[str, Held], model: Module, requested: str | None, use_buffers: bool
) -> list[Share]:
    """Return shares with those of copied buffers that the model has made anew, of another shape, or has given up.

    Each rank follows its own model. Buffers that are spread over ranks, or averaged, stay as they were.
    """

    def is_copied(holding: Holding) -> bool:
        is_whole = holding.is_buffer and holding.sharding.kind == "replicated"
        return is_whole and format_of_average(holding, requested, use_buffers) is None

    lacking = empty_buffers(unwrap(model))
    kept = {each.name: each for each in shares if not (each.name in lacking and is_copied(each.holding))}
    for name, each in held.items():
        now = each.holding
        before = kept[name].holding if name in kept else None
        if before is not None:
            cast = before.dtype.is_floating_point and now.dtype.is_floating_point
            as_before = before.shape == now.shape and (cast or before.dtype == now.dtype)
            if as_before or not is_copied(before):
                continue
        if is_copied(now):
            kept[name] = Share(now, None, 0, now.numel, None)
    return list(kept.values())


def make_planes(
    shares: Sequence[Share], held: Mapping[str, Held], requested: str | None
) -> dict[str, tuple[Tensor, ...]]:
    """Allocate the planes of this rank's shares in buckets, and return them by name. Only spreads have values: 0.

    Args:
        requested: the name of the format that the user asked for.

    Raises:
        ValueError: a tensor has no plain memory. The message names the param.
    """
    likes: list[PlaneLike] = []
    counts: list[int] = []
    for share in shares:
        local = held[share.name].local.detach()
        checks.check_plain(f"{share.name!r} of the model", local)
        first = stored_dtype(requested, local.dtype, copied=share.format is None)
        dtypes = [first, *(dtype for _, dtype in (share.format.further if share.format is not None else ()))]
        shape = share.of(local).shape
        stride = torch.empty(shape, device="meta").stride()
        likes.extend(PlaneLike(shape, stride, dtype, local.device) for dtype in dtypes)
        counts.append(len(dtypes))
    made = {index: plane for bucket in new_in_buckets(likes) for index, plane in bucket}
    each = (made[index] for index in range(len(likes)))
    planes = {share.name: tuple(islice(each, count)) for share, count in zip(shares, counts, strict=True)}
    for share in shares:
        for plane in planes[share.name][share.format.num_planes :] if share.format is not None else ():
            plane.zero_()
    return planes


def spell(option: object) -> str:
    """Return ``repr(option)`` without memory addresses, which differ between ranks."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(option))


def describe(shares: Sequence[Share]) -> dict[str, str]:
    """Describe each holding, by name, by what must be the same on all ranks."""
    described = {}
    for holding in (share.holding for share in shares):
        tied = f", tied to {', '.join(holding.names[1:])}" if holding.names[1:] else ""
        described[holding.name] = f"{holding.shape} {holding.dtype} {holding.device.type} ({holding.sharding}{tied})"
    return described


def require_same_bits(shares: Sequence[Share], held: Mapping[str, Held], ranks: Ranks) -> None:
    """Raise ValueError on every rank unless replicas hold the same bits.

    Ranks exchange one digest per set of replicas, and the checksums themselves only if digests differ. Collective.
    """
    sums: dict[bytes, list[tuple[str, int]]] = {}
    for share in shares:
        holding = share.holding
        if not holding.is_buffer and len(holding.replicas) > 1 and holding.numel:
            run = view_of_run(holding, held[share.name].local.detach(), 0, holding.numel)
            sums.setdefault(_digest(holding.replicas), []).append((share.name, checksum(run)))
    everyone = ranks.gather({replicas: _digest(of) for replicas, of in sums.items()})
    # Only the ranks in a set of replicas send a digest for it.
    expected_of = {alike: digest for digests in everyone for alike, digest in digests.items()}
    if all(digest == expected_of[alike] for digests in everyone for alike, digest in digests.items()):
        return
    first: dict[bytes, tuple[int, list[tuple[str, int]]]] = {}
    for rank, checksums in zip(ranks.ranks, ranks.gather(sums), strict=True):
        for alike, theirs in checksums.items():
            first_rank, ours = first.setdefault(alike, (rank, theirs))
            for (name, expected), (_, got) in zip(ours, theirs, strict=True):
                if got != expected:
                    raise ValueError(
                        f"{name!r} must be the same on all ranks that hold it alike, got other bits on rank {rank} "
                        f"than on rank {first_rank}: broadcast it before averaging, or pass the process_group of the "
                        "ranks that share it"
                    )


def _digest(value: object) -> bytes:
    return hashlib.sha256(repr(value).encode()).digest()


def make_all_gathers(shares: Sequence[Share], ranks: Ranks) -> list[AllGather]:
    """Make an all-gather for each cut, and subgroups for cuts over only some of the ranks. Collective."""
    cuts = {id(share.cut): share.cut for share in shares if share.cut is not None}
    # In the same order on every rank, since the members of a subgroup wait for each other.
    subgroups = {replicas: ranks.subgroup(replicas) for replicas in sorted({cut.replicas for cut in cuts.values()})}
    return [AllGather(cut, subgroups[cut.replicas]) for cut in cuts.values()]
