"""States of a sharded average: parts for distributed checkpoints, their checksums, and whole tensors."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement

from ..op.checks import check_plain
from ..op.checksum import checksum, wrap_int64
from ..terms import misfits, other_names
from ..terms.boxes import boxes_of_run
from ..terms.converting import write_all
from ..terms.copying import are_alike, describe_kind
from ..terms.names import unwrapping
from ..terms.spread import Spread
from ..torch_private import distributed as private
from .parts.holdings import RUNS, is_spread_as
from .parts.part_tensor import PartTensor
from .parts.ranks import Ranks
from .parts.shares import Share

COUNT = "n_averaged"
CHECKSUM = "checksum."
MODULE = "module."
SAVE_ID = "save_id"

#: Elements that hold the id of a save, cut over the ranks so that each rank's part has some. Their number is fixed,
#: since the number of ranks may change between a save and a load.
_SAVE_ID_NUMEL = 16384

#: Checkpoints store indices into this list, so only append to it. It has names, as not every torch has all dtypes.
_DTYPES = (
    *("float32", "bfloat16", "float16", "int16", "int8", "float64", "complex64", "complex128", "int64", "int32"),
    *("uint8", "bool", "uint16", "uint32", "uint64", "complex32", "float8_e4m3fn", "float8_e5m2"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)


#: What each deviation adds to a seal's code: more than there are dtypes.
_PER_DEVIATION = 256


@dataclass(frozen=True)
class Entry:
    """One plane or buffer in a state, under one key, or under several if params are tied."""

    keys: tuple[str, ...]
    share: Share
    plane: Tensor  # this rank's part; 1-D, or whole in its own shape
    #: The spread beside it, if it is an average's plane 0. Its seal says so: DCP loads the keys that it is asked for,
    #: so it would take some columns out of more of them, or an average without its spread.
    spread: Spread | None = None

    @property
    def run(self) -> Tensor:
        """This rank's elements, 1-D."""
        return self.plane.detach().reshape(-1)


def entries(shares: Sequence[Share], planes: Mapping[str, tuple[Tensor, ...]]) -> Iterator[Entry]:
    """Yield the entries of a state, under the keys of the unsharded class."""
    for share in shares:
        first, *further = planes[share.name]
        spread = share.format.spread if share.format else None
        yield Entry(tuple(MODULE + name for name in share.holding.names), share, first, spread)
        for (plane, _), tensor in zip(share.format.further if share.format else (), further, strict=True):
            yield Entry((f"{plane}.{share.name}",), share, tensor)


def part_of(entry: Entry) -> Tensor:
    """Return a copy of this rank's part as distributed checkpoints take it: a DTensor, PartTensor or whole tensor."""
    share, holding = entry.share, entry.share.holding
    run = entry.run.clone()
    if share.cut is not None or holding.sharding.kind in RUNS:
        return PartTensor(run, holding.shape, share.boxes)
    local = share.boxes[0].of_run(run) if run.numel() else run.new_empty(holding.local_shape)
    if holding.device_mesh is None:
        return local
    stride = torch.empty(holding.shape, device="meta").stride()
    placements = cast("tuple[Placement, ...]", holding.sharding.placements)
    # Where the average is, as FSDP2 has it under CPUOffloadPolicy. Checkpoints take such tensors from the host.
    return private.on_mesh(local, holding.device_mesh, placements, holding.shape, stride)


def sealed_part_of(entry: Entry, ranks: Ranks) -> tuple[Tensor, int]:
    """Return a copy of this rank's part and its summand of the whole tensor's checksum.

    A buffer that each rank has whole is broadcast from the first rank, which is collective: ranks may differ in its
    values, as in BatchNorm's under DDP.
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
    """Return a state of copies, if asked with a seal for each key, which does not depend on the cut. Collective."""
    state = {COUNT: num_averaged.detach().clone()}
    sums: dict[str, int] = {COUNT: checksum(state[COUNT]) if ranks.index == 0 else 0}
    spreads = {key: entry.spread for entry in all_entries for key in entry.keys}
    for entry in all_entries:
        value, own = sealed_part_of(entry, ranks)
        for key in entry.keys:
            state[key], sums[key] = value, own
    if checksums:
        for key, seal in zip(sums, ranks.sums(sums.values(), num_averaged.device), strict=True):
            code = _code_of(state[key].dtype, spreads.get(key))
            state[CHECKSUM + key] = torch.tensor([seal, code], dtype=torch.int64, device="cpu")
        state[SAVE_ID] = _save_id_part(ranks)
    return state


def _code_of(dtype: torch.dtype, spread: Spread | None = None) -> int:
    """Return what a seal says besides the checksum: the dtype, and 1 more than the number of deviations, or 0."""
    name = str(dtype).removeprefix("torch.")
    beside = 0 if spread is None else 1 + spread.count
    return _DTYPES.index(name) + beside * _PER_DEVIATION if name in _DTYPES else -1


def _save_id_part(ranks: Ranks) -> PartTensor:
    save_id = ranks.gather(secrets.randbits(63))[0]
    # Cut evenly, without rounding the borders, so that with many ranks each still gets some.
    start, stop = (_SAVE_ID_NUMEL * index // ranks.size for index in (ranks.index, ranks.index + 1))
    boxes = boxes_of_run((_SAVE_ID_NUMEL,), start, stop)
    run = torch.full((stop - start,), save_id, dtype=torch.int64, device="cpu")
    return PartTensor(run, (_SAVE_ID_NUMEL,), boxes)


# Loading


@dataclass(frozen=True)
class PendingLoad:
    """This rank's parts of a state, with keys, shapes and dtypes checked but values not yet verified."""

    count: Tensor  # () int64
    runs: list[tuple[Entry, Tensor]]
    seals: dict[str, tuple[int, int]]  # (checksum, dtype) by key; empty for a state without checksums
    save_ids: frozenset[int]
    copies: list[tuple[Tensor, Tensor]]  # what torch copies, with its values


def prepare_load(all_entries: Sequence[Entry], copied: Mapping[tuple[str, ...], Tensor], given: object) -> PendingLoad:
    """Take this rank's parts out of a state.

    Args:
        copied: the buffers that torch copies, by their names. Not all states have them.

    Raises:
        TypeError, ValueError: keys, shapes, dtypes, meshes or cuts differ from this average's; it names the key.
    """
    given = named_alike(all_entries, copied, given)
    keys_of = {MODULE + name: names for names in copied for name in names}
    state = {key: value for key, value in given.items() if key not in keys_of}
    copies = [(copied[keys_of[key]], given[key]) for key in keys_of if key in given]
    for key in keys_of:
        if key in given and not are_alike(given[key], copied[keys_of[key]]):
            wanted, got = describe_kind(copied[keys_of[key]]), given[key]
            raise ValueError(f"state_dict[{key!r}] must be like this average's, {wanted}, got {got!r}")
    keys = [COUNT, *(key for entry in all_entries for key in entry.keys)]
    sealed = [key for key in state if str(key).startswith(CHECKSUM)]
    # Check dtypes first: a state of another format also lacks keys, and this error is clearer.
    _require_dtypes(all_entries, state)
    _require_keys([*keys, *(CHECKSUM + key for key in keys), SAVE_ID] if sealed else keys, state, all_entries)
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
    check_plain(f"state_dict[{COUNT!r}]", count)
    if count.numel() != 1 or count.dtype != torch.int64 or int(count) < 0:
        raise ValueError(f"state_dict[{COUNT!r}] must be one int64 >= 0, got {count!r}")
    value = state[SAVE_ID] if sealed else torch.empty(0)
    ids = value.run if isinstance(value, PartTensor) else value
    return PendingLoad(count.detach().reshape(()), runs, seals, frozenset(ids.flatten().tolist()), copies)


def named_alike(all_entries: Sequence[Entry], copied: Iterable[tuple[str, ...]], state: object) -> Mapping[str, Any]:
    """Return a state with the names of these entries and copied buffers, however the model of it was wrapped."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state).__name__}")
    given = [key.removeprefix(MODULE) for key in map(str, state) if key.startswith(MODULE)]
    own = [key.removeprefix(MODULE) for entry in all_entries for key in entry.keys]
    own += [name for names in copied for name in names]
    unwrapped = unwrapping(given, own)
    keys = {MODULE + name: MODULE + unwrapped(name) for name in given}
    if len({*keys.values()}) < len(keys):
        return state
    return {keys.get(key) or key: value for key, value in state.items()}


def _require_keys(expected: Sequence[str], state: Mapping[str, object], all_entries: Sequence[Entry] = ()) -> None:
    missing = [key for key in expected if key not in state]
    surplus = [key for key in state if key not in set(expected)]
    if missing or surplus:
        formats = {each.share.name: each.share.format for each in all_entries if MODULE + each.share.name in state}
        differs = misfits.of_spreads(state, "", {name: fmt.spread for name, fmt in formats.items() if fmt is not None})
        if differs:
            raise ValueError(differs)
        names = {key.removeprefix(MODULE) for key in expected if key.startswith(MODULE)}
        what = [f"missing {missing[:3]}"] if missing else []
        what += [f"unexpected {surplus[:3]}"] if surplus else []
        raise ValueError(
            f"state_dict must have the keys of this average, got {len(missing)} missing and {len(surplus)} unexpected: "
            f"{'; '.join(what)}{misfits.of_state(state, names, 'ShardedAveragedModel')}"
        )


def _require_dtypes(all_entries: Sequence[Entry], state: Mapping[str, object]) -> None:
    for entry in all_entries:
        for key in entry.keys:
            value = state.get(key)
            if isinstance(value, Tensor) and value.dtype != entry.plane.dtype:
                raise ValueError(f"state_dict[{key!r}] must be {entry.plane.dtype}, got {value.dtype}: another format")


def _require_saved_as(
    dtype: torch.dtype, key: str, seals: Mapping[str, tuple[int, int]], spread: Spread | None = None
) -> None:
    """Raise ValueError if a key was saved with another dtype, since DCP casts on loading, or another spread."""
    if key not in seals or seals[key][1] == _code_of(dtype, spread):
        return
    beside, code = divmod(seals[key][1], _PER_DEVIATION)
    if code == _code_of(dtype):
        own, found = spread.count if spread is not None else None, beside - 1 if beside else None
        raise ValueError(f"state_dict[{key!r}] must have been saved with deviations={own}, got deviations={found}")
    saved = f"torch.{_DTYPES[code]}" if code < len(_DTYPES) else "an unknown dtype"
    raise ValueError(f"state_dict[{key!r}] must have been saved as {dtype}, got {saved}: another format")


def _run_of_ties(state: Mapping[str, Tensor], entry: Entry, seals: Mapping[str, tuple[int, int]]) -> Tensor:
    """Return this rank's elements of an entry, 1-D. Raise ValueError if its tied keys have different values."""
    first, *tied = entry.keys
    run = _run_from(state[first], first, entry, seals)
    for key in tied:
        other = _run_from(state[key], key, entry, seals)
        if seals.get(key) != seals.get(first) or not torch.equal(run.view(torch.uint8), other.view(torch.uint8)):
            raise ValueError(f"state_dict[{key!r}] must equal that of {first!r}, to which it is tied, got other values")
    return run


def _run_from(value: Tensor, key: str, entry: Entry, seals: Mapping[str, tuple[int, int]]) -> Tensor:
    """Return this rank's elements of a value, 1-D, in the order of its plane's memory."""
    share, holding = entry.share, entry.share.holding
    _require_saved_as(entry.plane.dtype, key, seals, entry.spread)
    if tuple(value.shape) != holding.shape:
        hint = f"if the model has changed since, {other_names.after_loading('ShardedAveragedModel')}"
        raise ValueError(f"state_dict[{key!r}] must have the shape {holding.shape}, got {tuple(value.shape)}: {hint}")
    if isinstance(value, DTensor):
        if share.cut is not None or not is_spread_as(value, holding.sharding):
            got = f"{value.placements} on {value.device_mesh}"
            raise ValueError(f"state_dict[{key!r}] must be spread as this average, {holding.sharding}, got {got}")
        local = value.to_local().detach()
        check_plain(f"state_dict[{key!r}]", local)
        return (local.permute(share.boxes[0].order) if share.numel else local).reshape(-1)
    if isinstance(value, PartTensor):
        if [(box.offsets, box.sizes) for box in value.boxes] != [(box.offsets, box.sizes) for box in share.boxes]:
            raise ValueError(f"state_dict[{key!r}] must be cut as this average, got another cut: load it through DCP")
        check_plain(f"state_dict[{key!r}]", value.run)
        if value.boxes == share.boxes:
            return value.run.detach()
        views = [view for _, view in value.parts()]  # the saved model had other strides
    else:
        check_plain(f"state_dict[{key!r}]", value)
        views = [box.of_whole(value.detach()) for box in share.boxes]
    in_order = [view.permute(box.order) for box, view in zip(share.boxes, views, strict=True)]
    starts = [view.storage_offset() - box.start for box, view in zip(share.boxes, in_order, strict=True)]
    if len(set(starts)) == 1 and all(view.is_contiguous() for view in in_order):
        return in_order[0].as_strided((share.numel,), (1,), starts[0])  # one run of memory already: needs no copy
    run = torch.empty(share.numel, dtype=value.dtype, device=value.device)
    for box, view in zip(share.boxes, views, strict=True):
        box.of_run(run).copy_(view)
    return run


def verify(pending: PendingLoad, ranks: Ranks, device: torch.device) -> None:
    """Verify on all ranks that the loaded values are those that were saved. Collective.

    Raises:
        ValueError: on every rank, if counts, saves or checksums differ; the message names the key.
    """
    everyone = ranks.gather((int(pending.count), bool(pending.seals), sorted(pending.save_ids)[:2]))
    counts, sealed = [count for count, _, _ in everyone], [sealed for _, sealed, _ in everyone]
    if len(set(counts)) > 1:
        raise ValueError(f"state_dict[{COUNT!r}] must be the same on every rank, got {counts}")
    if len(set(sealed)) > 1:
        raise ValueError(f"state_dict must have checksums on all ranks or on none, got {sealed}")
    if not pending.seals:
        return
    ids = {save_id for _, _, some in everyone for save_id in some}
    if len(ids) > 1:
        raise ValueError(f"state_dict must be of one save, got parts of {len(ids)} saves, or a damaged checkpoint")
    sums, wanted = {}, {}
    first = int(ranks.index == 0)
    sums[COUNT], wanted[COUNT] = first * checksum(pending.count), pending.seals[COUNT][0]
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


def commit(loads: Iterable[tuple[PendingLoad, Tensor]]) -> None:
    """Write verified values, and each count into its counter. No content of a state makes this fail."""
    writes: list[tuple[Tensor, Tensor]] = []
    for pending, counter in loads:
        writes += [(entry.plane.detach(), run.view(entry.plane.shape)) for entry, run in pending.runs]
        writes += [*pending.copies, (counter, pending.count)]
    write_all(writes)
