"""Weighted sums of stored tensors, spread over ranks as the user wants them."""

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
from ..sharded.strict_reader import StrictReader
from ..terms.coefficients import factors_of
from ..terms.names import unwrapping
from ..torch_private import distributed as private
from .folder import Snapshot, StoredTensor, fingerprint, key_of
from .written import reporting

#: Elements in a window; a larger tensor is a window by itself. Each takes 12 bytes, 8 for the float64 sum and 4 for a
#: snapshot: 50 MB. `python examples/posthoc.py --cost 24` read 1.6 times as fast as with 2**24.
_WINDOW_NUMEL = 2**22


@dataclass(frozen=True)
class WantedTensor:
    """A tensor to sum up from snapshots, and how it is spread over ranks."""

    stored: StoredTensor
    like: Tensor | None  # a plain tensor: whole on each rank; a DTensor: sharded like it; None: whole, on the CPU

    @property
    def name(self) -> str:
        return self.stored.names[0]

    def empty(self, dtype: torch.dtype) -> Tensor:
        if self.like is None:
            return torch.empty(self.stored.shape, dtype=dtype, device="cpu")
        return torch.empty_like(self.like.detach(), dtype=dtype)


def wanted_tensors(snapshot: Snapshot, like: Mapping[str, Tensor] | None) -> dict[str, WantedTensor]:
    """Return the wanted tensors by the user's names, tied ones shared, or raise if ``like`` does not fit."""
    stored = {name: each for each in (*snapshot.params, *snapshot.copies) for name in each.names}
    if like is None:
        return {name: WantedTensor(each, None) for name, each in stored.items()}
    if not isinstance(like, Mapping):
        raise TypeError(f"like must be a mapping, got {type(like).__name__}")
    wanted: dict[str, WantedTensor] = {}
    by_first: dict[str, WantedTensor] = {}
    for name in like:
        if not isinstance(name, str):
            raise TypeError(f"like must have strings for names, got {name!r}")
    unwrapped = unwrapping(like, stored)
    for name, tensor in like.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"like[{name!r}] must be a tensor, got {type(tensor).__name__}")
        each = stored.get(unwrapped(name))
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
    """Group tensors into windows of at most ``_WINDOW_NUMEL`` elements, or of one tensor; the same on all ranks."""
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
    """Read each rank's part of the stored tensors, by key, in place, and verify the checksums. Collective.

    Raises:
        ValueError: on every rank, if a file cannot be read, or a checksum differs; the message names the key.
    """
    with reporting(ValueError, f"snapshot {snapshot.path} must be whole and readable, got"):
        dcp.load(dict(wanted), storage_reader=StrictReader(snapshot.path, snapshot.metadata), process_group=ranks.group)
    found = {key: tensor for key, tensor in wanted.items() if tensor.numel()}
    numels = [local_of(tensor).numel() for tensor in found.values()]
    sums = ranks.sums([*map(_checksum_here, found.values()), *numels])
    for (key, tensor), added, numel in zip(found.items(), sums[: len(found)], sums[len(found) :], strict=True):
        copies, rest = divmod(numel, tensor.numel())  # number of ranks that hold each element
        if rest or not copies or added != wrap_int64(snapshot.checksums[key] * copies):
            raise ValueError(
                f"snapshot {snapshot.path} must hold what was saved, got another checksum of {key!r}: it is damaged, "
                "or has files of another snapshot; delete it"
            )


def local_of(tensor: Tensor) -> Tensor:
    """Return this rank's local tensor of a DTensor, or a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _checksum_here(tensor: Tensor) -> int:
    if not isinstance(tensor, DTensor):
        return checksum(tensor)
    local = tensor.to_local()
    return checksum(local, tuple(tensor.shape), private.box_of(tensor)[0]) if local.numel() else 0


def sum_up(
    wanted: Sequence[WantedTensor], used: Iterable[tuple[Snapshot, Mapping[str, float]]], ranks: Ranks
) -> dict[str, Tensor]:
    """Sum the stored averages of some params, each times its coefficient, in float64. Collective.

    Args:
        used: snapshots, each with the coefficients of its averages by name.

    Returns:
        the sums by name, spread as wanted and rounded once to float32; float64 and complex ones keep their dtype.
    """
    totals = [local_of(each.empty(torch.promote_types(each.stored.dtype, torch.float64))).zero_() for each in wanted]
    loaded: list[Tensor] = []
    used = [*used]
    factors, divisor = factors_of([each for _, coefficients in used for each in coefficients.values()])
    remaining = iter(factors)
    for snapshot, coefficients in used:
        of_params = {stored.names[0]: stored.dtype for stored in snapshot.params}
        dtypes = [of_params[each.name] for each in wanted]
        for average in coefficients:
            if [tensor.dtype for tensor in loaded] != dtypes:  # else reuse them: new memory is slow at first
                loaded = [each.empty(dtype) for each, dtype in zip(wanted, dtypes, strict=True)]
            keys = [key_of(average, each.name) for each in wanted]
            read(snapshot, dict(zip(keys, loaded, strict=True)), ranks)
            factor = next(remaining)
            for total, tensor in zip(totals, loaded, strict=True):
                total.add_(local_of(tensor), alpha=factor)
    results = {each.name: each.empty(torch.promote_types(each.stored.dtype, torch.float32)) for each in wanted}
    for result, total in zip(results.values(), totals, strict=True):
        local_of(result).copy_(total.div_(divisor))
    return results


def agree_on(
    ranks: Ranks, snapshots: Sequence[Snapshot], wanted: Mapping[str, WantedTensor], described: Mapping[str, object]
) -> None:
    """Raise ValueError on every rank unless all want the same of the same snapshots. Collective."""
    spread = {name: describe_sharding(each) for name, each in wanted.items()}
    stored = {snapshot.path.name: fingerprint(snapshot) for snapshot in snapshots}
    ranks.agree("the call and the snapshots", {**spread, **stored, **described})


def sum_all(
    wanted: Mapping[str, WantedTensor],
    used: Sequence[tuple[Snapshot, Mapping[str, float]]],
    latest: Snapshot,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Return the wanted tensors by the user's names: sums of averages, and of ``latest`` what is copied. Collective."""
    averaged = {stored.names[0] for stored in latest.params}
    distinct = {each.name: each for each in wanted.values()}
    results: dict[str, Tensor] = {}
    for window in windows_of([each for name, each in distinct.items() if name in averaged]):
        results |= sum_up(window, used, ranks)
    copies = {name: each.empty(each.stored.dtype) for name, each in distinct.items() if name not in averaged}
    if copies:
        read(latest, {key_of("", name): tensor for name, tensor in copies.items()}, ranks)
    results |= copies
    return {name: results[each.name] for name, each in wanted.items()}
