"""Tensors put together from snapshots: how they are to be spread, and weighted sums of what is stored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor

from ..op.checksum import checksum, wrap_int64
from ..sharded.parts.ranks import Ranks
from ..terms.names import canonical
from ..torch_private import distributed as private
from .folder import Snapshot, StoredTensor, key_of
from .written import reporting

#: Elements that are summed at a time, or one tensor if that is larger: 12 bytes for each, 8 of the float64 sum and 4 of
#: a snapshot, so 50 MB. With it `python examples/posthoc.py --cost 24` read 1.6 times as fast as with 2**24.
_WINDOW_NUMEL = 2**22


@dataclass(frozen=True)
class WantedTensor:
    """A tensor to be put together, and how it is spread over ranks."""

    stored: StoredTensor
    like: Tensor | None  # a plain one, whole on each rank, or a DTensor; None: whole, on the CPU

    @property
    def name(self) -> str:
        return self.stored.names[0]

    def empty(self, dtype: torch.dtype) -> Tensor:
        if self.like is None:
            return torch.empty(self.stored.shape, dtype=dtype, device="cpu")
        return torch.empty_like(self.like.detach(), dtype=dtype)


def wanted_tensors(snapshot: Snapshot, like: Mapping[str, Tensor] | None) -> dict[str, WantedTensor]:
    """Return the wanted tensors by the user's names; tied names share one, that of the first name."""
    stored = {name: each for each in (*snapshot.params, *snapshot.copies) for name in each.names}
    if like is None:
        return {name: WantedTensor(each, None) for name, each in stored.items()}
    if not isinstance(like, Mapping):
        raise TypeError(f"like must be a mapping, got {type(like).__name__}")
    wanted: dict[str, WantedTensor] = {}
    by_first: dict[str, WantedTensor] = {}
    for name, tensor in like.items():
        if not isinstance(name, str):
            raise TypeError(f"like must have strings for names, got {name!r}")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"like[{name!r}] must be a tensor, got {type(tensor).__name__}")
        each = stored.get(canonical(name))
        if each is None:
            raise ValueError(f"like must have names of the model in {snapshot.path}, got {name!r}")
        if tuple(tensor.shape) != each.shape:
            raise ValueError(f"like[{name!r}] must have shape {each.shape}, as stored, got {tuple(tensor.shape)}")
        if tensor.is_meta:
            raise ValueError(f"like[{name!r}] must be on a device that has memory, got one on meta")
        if isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements):
            raise ValueError(f"like[{name!r}] must be sharded or replicated, got {tensor.placements}")
        wanted[name] = by_first.setdefault(each.names[0], WantedTensor(each, tensor))
    return wanted


def describe_sharding(each: WantedTensor) -> str:
    if each.like is None:
        return "whole"
    placements = each.like.placements if isinstance(each.like, DTensor) else "whole"
    return f"{placements} {each.like.device.type}"


def windows_of(wanted: list[WantedTensor]) -> Iterator[list[WantedTensor]]:
    """Cut tensors into windows of so many elements, or of one each; the same on all ranks."""
    window: list[WantedTensor] = []
    numel = 0
    for each in wanted:
        own = math.prod(each.stored.shape)
        if window and numel + own > _WINDOW_NUMEL:
            yield window
            window, numel = [], 0
        window.append(each)
        numel += own
    if window:
        yield window


# Reading


def read(snapshot: Snapshot, wanted: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill tensors with what is stored under their keys, each rank its own part, and verify it. Collective.

    Raises:
        ValueError: on every rank: a file cannot be read, or does not hold what was saved; then it names the key.
    """
    with reporting(ValueError, f"snapshot {snapshot.path} must be whole and readable, got"):
        dcp.load(dict(wanted), storage_reader=dcp.FileSystemReader(snapshot.path), process_group=ranks.group)
    found = {key: tensor for key, tensor in wanted.items() if tensor.numel()}
    numels = [local_of(tensor).numel() for tensor in found.values()]
    sums = ranks.sums([*map(_checksum_here, found.values()), *numels])
    for (key, tensor), added, numel in zip(found.items(), sums[: len(found)], sums[len(found) :], strict=True):
        copies, rest = divmod(numel, tensor.numel())  # as many as ranks hold each element
        if rest or not copies or added != wrap_int64(snapshot.checksums[key] * copies):
            raise ValueError(
                f"snapshot {snapshot.path} must hold what was saved, got another checksum of {key!r}: it is damaged, "
                "or has files of another one"
            )


def local_of(tensor: Tensor) -> Tensor:
    """Return what this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _checksum_here(tensor: Tensor) -> int:
    if not isinstance(tensor, DTensor):
        return checksum(tensor)
    local = tensor.to_local()
    return checksum(local, tuple(tensor.shape), private.box_of(tensor)[0]) if local.numel() else 0


def sum_up(
    wanted: Sequence[WantedTensor], used: Iterable[tuple[Snapshot, Mapping[str, float]]], ranks: Ranks
) -> dict[str, Tensor]:
    """Add up params of averages, each times its average's coefficient, in float64. Collective.

    Args:
        used: snapshots, with the coefficients of their averages by name.

    Returns:
        the sums by name, spread as is wanted, rounded once to float32; float64 and complex ones keep their dtype.
    """
    totals = [local_of(each.empty(torch.promote_types(each.stored.dtype, torch.float64))).zero_() for each in wanted]
    loaded: list[Tensor] = []
    for snapshot, coefficients in used:
        of_params = {stored.names[0]: stored.dtype for stored in snapshot.params}
        dtypes = [of_params[each.name] for each in wanted]
        for average, coefficient in coefficients.items():
            if [tensor.dtype for tensor in loaded] != dtypes:  # else into the same ones: new memory is slow to touch
                loaded = [each.empty(dtype) for each, dtype in zip(wanted, dtypes, strict=True)]
            keys = [key_of(average, each.name) for each in wanted]
            read(snapshot, dict(zip(keys, loaded, strict=True)), ranks)
            for total, tensor in zip(totals, loaded, strict=True):
                total.add_(local_of(tensor), alpha=coefficient)
    results = {each.name: each.empty(torch.promote_types(each.stored.dtype, torch.float32)) for each in wanted}
    for result, total in zip(results.values(), totals, strict=True):
        local_of(result).copy_(total)
    return results
