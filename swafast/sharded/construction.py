"""The making of a sharded average: room for it, and what all ranks have to agree on before the first update."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.nn import Module

from ..op import checks
from ..op.buckets import PlaneLike, new_in_buckets
from ..op.checksum import checksum
from ..terms.formats import Format, format_of, stored_dtype
from .parts.holdings import Held, Holding, Mesh, partial_meshes
from .parts.ranks import Ranks
from .parts.shares import Share, view_of_run
from .parts.spread import Spread


def gather_meshes(model: Module, ranks: Ranks) -> dict[str, tuple[Mesh, ...]]:
    """Give, by name, all meshes that hold a DTensor where each of them has some of the ranks. Collective."""
    found: dict[str, set[Mesh]] = {}
    for meshes in ranks.gather(partial_meshes(model, ranks.ranks)):
        for name, mesh in meshes.items():
            found.setdefault(name, set()).add(mesh)
    return {name: tuple(sorted(meshes, key=lambda mesh: mesh.ranks)) for name, meshes in found.items()}


def format_of_average(holding: Holding, requested: str | None, use_buffers: bool) -> Format | None:
    """Give the format of a holding's average; None where it is copied.

    Raises:
        NotImplementedError: its dtype cannot be averaged; it names the parameter.
    """
    averaged = holding.dtype.is_floating_point or holding.dtype.is_complex
    if not averaged or (holding.is_buffer and not use_buffers):
        return None
    fmt = format_of(requested, stored_dtype(requested, holding.dtype))
    if fmt is None:
        raise NotImplementedError(f"{holding.name!r} must have a dtype that can be averaged, got {holding.dtype}")
    return fmt


def make_planes(
    shares: Sequence[Share], held: Mapping[str, Held], requested: str | None
) -> dict[str, tuple[Tensor, ...]]:
    """Make the planes of this rank's shares in buckets, without values, by name.

    Args:
        requested: the format that the user asked for.

    Raises:
        ValueError: a tensor holds no plain memory; it names the parameter.
    """
    likes: list[PlaneLike] = []
    counts: list[int] = []
    for share in shares:
        local = held[share.name].local.detach()
        checks.check_plain(f"{share.name!r} of the model", local)
        first = stored_dtype(requested, local.dtype, copied=share.format is None)
        dtypes = [first, *(dtype for _, dtype in (share.format.extra if share.format is not None else ()))]
        shape = share.of(local).shape
        stride = torch.empty(shape, device="meta").stride()
        likes.extend(PlaneLike(shape, stride, dtype, local.device) for dtype in dtypes)
        counts.append(len(dtypes))
    made = {index: plane for bucket in new_in_buckets(likes) for index, plane in bucket}
    planes = (made[index] for index in range(len(likes)))
    return {share.name: tuple(islice(planes, count)) for share, count in zip(shares, counts, strict=True)}


def spell(option: object) -> str:
    """Spell an argument out in the same way on every rank: a rule without a ``__repr__`` of its own has its address."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(option))


def describe(shares: Sequence[Share]) -> dict[str, str]:
    """Give what all ranks must have in common, whichever part is theirs, by name."""
    described = {}
    for holding in (share.holding for share in shares):
        tied = f", tied to {', '.join(holding.names[1:])}" if holding.names[1:] else ""
        described[holding.name] = f"{holding.shape} {holding.dtype} {holding.device.type} ({holding.sharding}{tied})"
    return described


def require_same_bits(shares: Sequence[Share], held: Mapping[str, Held], ranks: Ranks) -> None:
    """Raise ValueError on every rank unless ranks that hold the same elements hold the same bits of them.

    What goes round is a digest for each set of replicas; the checksums themselves only once digests differ.
    """
    sums: dict[bytes, list[tuple[str, int]]] = {}
    for share in shares:
        holding = share.holding
        if not holding.is_buffer and len(holding.replicas) > 1 and holding.numel:
            run = view_of_run(holding, held[share.name].local.detach(), 0, holding.numel)
            sums.setdefault(_digest(holding.replicas), []).append((share.name, checksum(run)))
    everyone = ranks.gather({replicas: _digest(of) for replicas, of in sums.items()})
    # Each set of replicas is spoken for by just the ranks in it.
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


def make_spreads(shares: Sequence[Share], ranks: Ranks) -> list[Spread]:
    """Make a spread for each cut, and process groups for those that are cut over some of the ranks. Collective."""
    cuts = {id(share.cut): share.cut for share in shares if share.cut is not None}
    # In one order on every rank: each subgroup waits for its members.
    subgroups = {replicas: ranks.subgroup(replicas) for replicas in sorted({cut.replicas for cut in cuts.values()})}
    return [Spread(cut, subgroups[cut.replicas]) for cut in cuts.values()]
