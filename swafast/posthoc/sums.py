"""Tensors put together from snapshots: how they are to be spread, and weighted sums of what is stored."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor

from ..op.checksum import checksum, wrap_int64
from ..sharded.parts.ranks import Ranks
from ..terms.names import canonical
from ..torch_private import distributed as private
from .folder import Snapshot, StoredTensor, key_of
from .written import group_of, reporting

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
    """Give what is wanted, by the name that it is wanted under; what is tied is wanted once, under its first name."""
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


def read(path: Path, wanted: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill tensors with what is stored under their keys, each rank its own part. Collective."""
    with reporting(ValueError, f"snapshot {path} must be whole and readable, got"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        dcp.load(dict(wanted), storage_reader=dcp.FileSystemReader(path), process_group=group_of(ranks))


def local_of(tensor: Tensor) -> Tensor:
    """Give what this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def verify_checksums(snapshot: Snapshot, loaded: Iterable[tuple[str, Tensor]], ranks: Ranks) -> None:
    """Raise ValueError on every rank, naming the key, unless ``loaded``, by key, is what was saved. Collective."""
    found = [(key, tensor) for key, tensor in loaded if tensor.numel()]
    sums = torch.tensor([_checksum_here(tensor) for _, tensor in found], dtype=torch.int64, device="cpu")
    numels = torch.tensor([local_of(tensor).numel() for _, tensor in found], dtype=torch.int64, device="cpu")
    ranks.sum_(both := torch.stack([sums, numels]))
    for (key, tensor), added, numel in zip(found, *both.tolist(), strict=True):
        copies, rest = divmod(numel, tensor.numel())  # as many as ranks hold each element
        if rest or not copies or added != wrap_int64(snapshot.checksums[key] * copies):
            raise ValueError(
                f"snapshot {snapshot.path} must hold what was saved, got another checksum of {key!r}: it is damaged, "
                "or has files of another one"
            )


def _checksum_here(tensor: Tensor) -> int:
    if not isinstance(tensor, DTensor):
        return checksum(tensor)
    local = tensor.to_local()
    if not local.numel():
        return 0
    offsets, _ = private.box_of(tensor)
    return checksum(local, tuple(tensor.shape), offsets)


class Sum:
    """A weighted sum of what snapshots hold of a few tensors, in float64.

    Args:
        wanted: with params of one average each.
    """

    def __init__(self, wanted: Sequence[WantedTensor]) -> None:
        self.wanted = wanted
        self._loaded: list[Tensor] = []
        self._sums = [local_of(each.empty(_wide(each.stored.dtype))).zero_() for each in wanted]

    def add(self, snapshot: Snapshot, coefficients: Mapping[str, float], ranks: Ranks) -> None:
        """Add an average's params times its coefficient, for each that has one. Collective."""
        dtypes = {stored.names[0]: stored.dtype for stored in snapshot.params}
        for average, coefficient in coefficients.items():
            keys = [key_of(average, each.name) for each in self.wanted]
            loaded = self._room([dtypes[each.name] for each in self.wanted])
            read(snapshot.path, dict(zip(keys, loaded, strict=True)), ranks)
            verify_checksums(snapshot, zip(keys, loaded, strict=True), ranks)
            for total, tensor in zip(self._sums, loaded, strict=True):
                total.add_(local_of(tensor), alpha=coefficient)

    def _room(self, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """Give tensors to read into, the same ones again: new memory is slow to touch."""
        if [tensor.dtype for tensor in self._loaded] != list(dtypes):
            self._loaded = [each.empty(dtype) for each, dtype in zip(self.wanted, dtypes, strict=True)]
        return self._loaded

    def results(self) -> Iterator[Tensor]:
        """Give the sums, spread as was asked for, rounded once to float32; float64 and complex ones keep theirs."""
        for each, total in zip(self.wanted, self._sums, strict=True):
            result = each.empty(torch.promote_types(each.stored.dtype, torch.float32))
            local_of(result).copy_(total)
            yield result


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64
