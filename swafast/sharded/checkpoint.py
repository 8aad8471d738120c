"""States of a sharded average: parts for distributed checkpoints, checksums of them, and whole tensors."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement

from ..op.checksum import checksum, wrap_int64
from ..terms.boxes import boxes_of_run
from .parts.holdings import is_spread_as
from .parts.part_tensor import PartTensor
from .parts.ranks import Ranks
from .parts.shares import Share

COUNT = "n_averaged"
CHECKSUM = "checksum."
SAVE_ID = "save_id"

#: Elements with the id of a save, shared out over the ranks so that the part of each carries it. Their number says
#: nothing of the number of ranks, which may change between a save and a load.
_SAVE_ID_NUMEL = 16384

#: Their indices in this list stand in checkpoints: it may only grow. Names, since not every torch has all of them.
_DTYPES = (
    *("float32", "bfloat16", "float16", "int16", "int8", "float64", "complex64", "complex128", "int64", "int32"),
    *("uint8", "bool", "uint16", "uint32", "uint64", "complex32", "float8_e4m3fn", "float8_e5m2"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)


@dataclass(frozen=True)
class Entry:
    """One plane of one average, or a buffer: what a state has under one key, or under several where params are tied."""

    keys: tuple[str, ...]
    share: Share
    plane: Tensor  # this rank's part; 1-D, or whole in its own shape

    @property
    def run(self) -> Tensor:
        """This rank's elements, 1-D."""
        return self.plane.detach().reshape(-1)


def entries(shares: Sequence[Share], planes: Mapping[str, tuple[Tensor, ...]]) -> Iterator[Entry]:
    """Give what a state is made of, under the keys that the unsharded class has."""
    for share in shares:
        first, *further = planes[share.name]
        yield Entry(tuple(f"module.{name}" for name in share.holding.names), share, first)
        for (plane, _), tensor in zip(share.format.extra if share.format else (), further, strict=True):
            yield Entry((f"{plane}.{share.name}",), share, tensor)


def part_of(entry: Entry) -> Tensor:
    """Give a copy of a plane's part in the form that distributed checkpoints take: DTensor, PartTensor, or whole."""
    share, holding = entry.share, entry.share.holding
    run = entry.run.clone()
    if share.cut is not None or holding.sharding.kind == "flat":
        return PartTensor(run, holding.shape, share.boxes)
    local = share.boxes[0].of_run(run) if run.numel() else run.new_empty(holding.local_shape)
    if holding.device_mesh is None:
        return local.clone()
    stride = torch.empty(holding.shape, device="meta").stride()
    placements = cast("tuple[Placement, ...]", holding.sharding.placements)
    return DTensor.from_local(
        local, holding.device_mesh, placements, run_check=False, shape=torch.Size(holding.shape), stride=stride
    )


def sealed_part_of(entry: Entry, ranks: Ranks) -> tuple[Tensor, int]:
    """Copy a plane's part as :func:`part_of` does, with what this rank adds to the whole's checksum.

    Collective for a buffer that each rank has whole: ranks may differ in its values, as in BatchNorm's under DDP, so
    the part is the first rank's.
    """
    value = part_of(entry)
    if entry.share.holding.is_buffer and not isinstance(value, DTensor):
        ranks.broadcast_(value)
        own = checksum(value)
    else:
        own = checksum_of_run(entry.run, entry.share)
    return value, own if entry.share.counts_on(ranks.rank) else 0


def checksum_of_run(run: Tensor, share: Share) -> int:
    return wrap_int64(sum(checksum(box.of_run(run), share.holding.shape, box.offsets) for box in share.boxes))


def make_state(
    all_entries: Sequence[Entry], num_averaged: Tensor, ranks: Ranks, *, checksums: bool
) -> dict[str, Tensor]:
    """Give a state of copies, with a checksum of each key that does not depend on the cut."""
    state = {COUNT: num_averaged.detach().clone()}
    sums: dict[str, int] = {COUNT: checksum(state[COUNT]) if ranks.index == 0 else 0}
    for entry in all_entries:
        value, own = sealed_part_of(entry, ranks)
        for key in entry.keys:
            state[key], sums[key] = value, own
    if checksums:
        for key, seal in zip(sums, ranks.sums(sums.values(), num_averaged.device), strict=True):
            code = _code_of(state[key].dtype)
            state[CHECKSUM + key] = torch.tensor([seal, code], dtype=torch.int64, device="cpu")
        state[SAVE_ID] = _save_id_part(ranks)
    return state


def _code_of(dtype: torch.dtype) -> int:
    name = str(dtype).removeprefix("torch.")
    return _DTYPES.index(name) if name in _DTYPES else -1


def _save_id_part(ranks: Ranks) -> PartTensor:
    save_id = ranks.gather(secrets.randbits(63))[0]
    # Evenly, and not on the borders of chunks, so that none of many ranks goes without.
    start, stop = (_SAVE_ID_NUMEL * index // ranks.size for index in (ranks.index, ranks.index + 1))
    boxes = boxes_of_run((_SAVE_ID_NUMEL,), start, stop)
    run = torch.full((stop - start,), save_id, dtype=torch.int64, device="cpu")
    return PartTensor(run, (_SAVE_ID_NUMEL,), boxes)


# Loading


@dataclass(frozen=True)
class PendingLoad:
    """What a state gives this rank, checked for its form and not yet for its values."""

    num_averaged: int
    runs: list[tuple[Entry, Tensor]]
    seals: dict[str, tuple[int, int]]  # (checksum, dtype) by key; empty for a state without checksums
    save_ids: frozenset[int]


def prepare_load(all_entries: Sequence[Entry], state: object) -> PendingLoad:
    """Take this rank's parts out of a state.

    Raises:
        TypeError, ValueError: keys, shapes, dtypes, meshes or cuts are not those of this average; it names the key.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state).__name__}")
    keys = [COUNT, *(key for entry in all_entries for key in entry.keys)]
    sealed = [key for key in state if str(key).startswith(CHECKSUM)]
    # First of all, since a state of another format lacks keys as well, and this says why.
    _require_dtypes(all_entries, state)
    _require_keys([*keys, *(CHECKSUM + key for key in keys), SAVE_ID] if sealed else keys, state)
    for key in state:
        if not isinstance(state[key], Tensor):
            raise TypeError(f"state_dict[{key!r}] must be a tensor, got {type(state[key]).__name__}")
    seals: dict[str, tuple[int, int]] = {}
    if sealed:
        for key in keys:
            seal = state[CHECKSUM + key]
            if seal.shape != (2,) or seal.dtype != torch.int64:
                raise ValueError(
                    f"state_dict[{CHECKSUM + key!r}] must be two int64, got {seal.dtype} {tuple(seal.shape)}"
                )
            seals[key] = tuple(seal.tolist())
        _require_saved_as(torch.int64, COUNT, seals)
    runs = [(entry, _run_of_ties(state, entry, seals)) for entry in all_entries]
    count = state[COUNT]
    if count.numel() != 1 or count.dtype != torch.int64 or int(count) < 0:
        raise ValueError(f"state_dict[{COUNT!r}] must be one int64 >= 0, got {count!r}")
    value = state[SAVE_ID] if sealed else torch.empty(0)
    ids = value.run if isinstance(value, PartTensor) else value
    return PendingLoad(int(count), runs, seals, frozenset(ids.flatten().tolist()))


def _require_keys(expected: Sequence[str], state: Mapping[str, object]) -> None:
    missing = [key for key in expected if key not in state]
    surplus = [key for key in state if key not in set(expected)]
    if missing or surplus:
        what = [f"missing {missing[:3]}"] if missing else []
        what += [f"unexpected {surplus[:3]}"] if surplus else []
        raise ValueError(
            f"state_dict must have the keys of this average, got {len(missing)} missing and {len(surplus)} unexpected: "
            f"{'; '.join(what)}"
        )


def _require_dtypes(all_entries: Sequence[Entry], state: Mapping[str, object]) -> None:
    for entry in all_entries:
        for key in entry.keys:
            value = state.get(key)
            if isinstance(value, Tensor) and value.dtype != entry.plane.dtype:
                raise ValueError(f"state_dict[{key!r}] must be {entry.plane.dtype}, got {value.dtype}: another format")


def _require_saved_as(dtype: torch.dtype, key: str, seals: Mapping[str, tuple[int, int]]) -> None:
    """Raise ValueError if a key's values had another dtype: DCP casts what it loads."""
    if key in seals and seals[key][1] != _code_of(dtype):
        saved = f"torch.{_DTYPES[seals[key][1]]}" if 0 <= seals[key][1] < len(_DTYPES) else "an unknown dtype"
        raise ValueError(f"state_dict[{key!r}] must have been saved as {dtype}, got {saved}: another format")


def _run_of_ties(state: Mapping[str, Tensor], entry: Entry, seals: Mapping[str, tuple[int, int]]) -> Tensor:
    """Take this rank's elements of an entry, which has to be the same under all its keys."""
    first, *tied = entry.keys
    run = _run_from(state[first], first, entry, seals)
    for key in tied:
        other = _run_from(state[key], key, entry, seals)
        if seals.get(key) != seals.get(first) or not torch.equal(run.view(torch.uint8), other.view(torch.uint8)):
            raise ValueError(f"state_dict[{key!r}] must be that of {first!r}, which it is tied to, got another one")
    return run


def _run_from(value: Tensor, key: str, entry: Entry, seals: Mapping[str, tuple[int, int]]) -> Tensor:
    """Take this rank's elements out of a value, 1-D, in the order in which its plane has them."""
    share, holding = entry.share, entry.share.holding
    _require_saved_as(entry.plane.dtype, key, seals)
    if tuple(value.shape) != holding.shape:
        raise ValueError(f"state_dict[{key!r}] must have the shape {holding.shape}, got {tuple(value.shape)}")
    if isinstance(value, DTensor):
        if share.cut is not None or not is_spread_as(value, holding.sharding):
            got = f"{value.placements} on {value.device_mesh}"
            raise ValueError(f"state_dict[{key!r}] must be spread as this average, {holding.sharding}, got {got}")
        local = value.to_local().detach()
        return (local.permute(share.boxes[0].order) if share.numel else local).reshape(-1)
    if isinstance(value, PartTensor):
        if [(box.offsets, box.sizes) for box in value.boxes] != [(box.offsets, box.sizes) for box in share.boxes]:
            raise ValueError(f"state_dict[{key!r}] must be cut as this average, got another cut: load it through DCP")
        if value.boxes == share.boxes:
            return value.run.detach()
        views = [view for _, view in value.parts()]  # of a model with other strides
    else:
        views = [box.of_whole(value.detach()) for box in share.boxes]
    run = torch.empty(share.numel, dtype=value.dtype, device=value.device)
    for box, view in zip(share.boxes, views, strict=True):
        box.of_run(run).copy_(view)
    return run


def verify(pending: PendingLoad, ranks: Ranks, device: torch.device) -> None:
    """Raise ValueError on every rank unless what all of them have taken is what was saved.

    Raises:
        ValueError: ranks have loaded different counts or parts of different saves, or a checksum does not fit; it names
            the key.
    """
    everyone = ranks.gather((pending.num_averaged, bool(pending.seals), sorted(pending.save_ids)[:2]))
    counts, sealed = [count for count, _, _ in everyone], [sealed for _, sealed, _ in everyone]
    if len(set(counts)) > 1:
        raise ValueError(f"state_dict[{COUNT!r}] must be the same on every rank, got {counts}")
    if len(set(sealed)) > 1:
        raise ValueError(f"state_dict must have checksums on all ranks or on none, got {sealed}")
    if not pending.seals:
        return
    ids = {save_id for _, _, some in everyone for save_id in some}
    if len(ids) > 1:
        raise ValueError(f"state_dict must be of one save, got parts of {len(ids)} saves mixed, or a damaged one")
    sums, wanted = {}, {}
    first = int(ranks.index == 0)
    count = torch.tensor(pending.num_averaged, dtype=torch.int64)
    sums[COUNT], wanted[COUNT] = first * checksum(count), pending.seals[COUNT][0]
    for entry, run in pending.runs:
        key, share = entry.keys[0], entry.share
        sums[key] = checksum_of_run(run, share)
        wanted[key] = wrap_int64(pending.seals[key][0] * share.multiplicity)
    for key, found in zip(sums, ranks.sums(sums.values(), device), strict=True):
        if found != wanted[key]:
            raise ValueError(
                f"state_dict[{key!r}] must be what was saved, got another checksum: the checkpoint is damaged, or "
                "holds parts of several saves"
            )


def commit(pending: PendingLoad, num_averaged: Tensor) -> None:
    """Write what was taken and verified. Nothing here can fail for what a state may hold."""
    with torch.no_grad():
        for entry, run in pending.runs:
            entry.plane.detach().copy_(run.view(entry.plane.shape))
        num_averaged.fill_(pending.num_averaged)


# Whole tensors


def make_full_state(
    all_entries: Sequence[Entry], num_averaged: Tensor, ranks: Ranks, *, rank0_only: bool, cpu_offload: bool
) -> dict[str, Tensor]:
    """Give whole tensors: gathered one by one, so that a rank needs the memory of one more than it keeps."""
    keeps = not rank0_only or ranks.index == 0
    state = {COUNT: num_averaged.detach().clone()} if keeps else {}
    for entry in all_entries:
        holding = entry.share.holding
        if holding.is_buffer and holding.sharding.kind == "replicated":
            whole = part_of(entry)
            ranks.broadcast_(whole)
        else:
            whole = _gather_whole(entry, ranks, to_first=rank0_only)
        if keeps:
            state |= dict.fromkeys(entry.keys, whole.cpu() if cpu_offload else whole)
    return {key: value.cpu() for key, value in state.items()} if cpu_offload else state


def _gather_whole(entry: Entry, ranks: Ranks, *, to_first: bool) -> Tensor:
    """Add the parts of all ranks up as integers: each byte comes from one rank, and is 0 on all others."""
    holding = entry.share.holding
    nbytes = math.prod(holding.shape) * entry.plane.element_size()
    words = torch.zeros(-(-nbytes // 8), dtype=torch.int64, device=entry.plane.device)
    whole = words.view(torch.uint8)[:nbytes].view(entry.plane.dtype).view(holding.shape)
    if entry.share.counts_on(ranks.rank):
        for box in entry.share.boxes:
            box.of_whole(whole).copy_(box.of_run(entry.run))
    (ranks.sum_to_first_ if to_first else ranks.sum_)(words)
    return whole
