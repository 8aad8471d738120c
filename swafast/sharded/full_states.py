"""States of whole tensors: gathered from all ranks, exported, and loaded into each rank's part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..average.contents import Uncounted
from ..average.planes import translate_state
from ..average.states import check_export, exported_copy
from ..loop.guard import Guard
from ..terms import hints
from ..terms.boxes import boxes_of_run
from ..terms.copying import duplicate
from . import checkpoint
from .checkpoint import COUNT, Entry, PendingLoad
from .parts.all_gather import ALIGNMENT, CPU_WINDOW_NBYTES, WINDOW_NBYTES, pieces_of, with_views
from .parts.flat_order import Run
from .parts.part_tensor import PartTensor
from .parts.ranks import Counting, Ranks
from .parts.shares import Share


class HasFullStates:
    """Base class of one averaged model of shards: its states of whole tensors."""

    @hints.hinted
    def full_state_dict(self, *, rank0_only: bool = False, cpu_offload: bool = False) -> dict[str, Tensor]:
        """Return whole tensors under the keys of :class:`~swafast.FusedAveragedModel`. Collective.

        torch's ``AveragedModel`` loads the averages of ``format="float32"`` or of a float32 model. If a format has
        further planes, pass it ``strict=False``.

        Args:
            rank0_only: return the tensors on the first rank of the group only, and an empty dict on the others.
            cpu_offload: move each tensor to the CPU as soon as it is whole.

        Warns:
            UserWarning: the average holds no model yet.

        Raises:
            RuntimeError: as :meth:`state_dict`.
        """
        with self._guard.hold("full_state_dict", self._saving):
            if self._uncounted is not None:
                self._warn_if_empty("full_state_dict")
            with self._ranks.in_lockstep():
                state = gather_whole(self._entries(), self._ranks, to_first=rank0_only, cpu_offload=cpu_offload)
                copied = copied_on_first(self._copied, self._ranks, cpu_offload=cpu_offload)
            if rank0_only and self._ranks.index > 0:
                return state
            count = self.n_averaged.detach().clone()
            whole = {checkpoint.MODULE + name: each for name, each in copied.items()}
            return {COUNT: count.cpu() if cpu_offload else count, **state, **whole}

    @hints.hinted
    def averaged_state_dict(
        self, dtype: torch.dtype | None = None, *, rank0_only: bool = False, cpu_offload: bool = False
    ) -> dict[str, Tensor]:
        """Return averages and buffers as whole tensors under the model's own names, for export. Collective.

        Tied names have one tensor. Params that ``include`` leaves out are missing.

        Args:
            dtype: as for :meth:`~swafast.FusedAveragedModel.averaged_state_dict`.
            rank0_only, cpu_offload: as for :meth:`full_state_dict`.

        Warns:
            UserWarning: the average holds no model yet.

        Raises:
            ValueError: ``dtype`` is not a floating dtype.
            RuntimeError: as :meth:`state_dict`.
        """
        with self._guard.hold("averaged_state_dict", self._saving):
            with self._ranks.settled(f"averaged_state_dict(dtype={dtype})"):
                check_export(dtype)
            if self._uncounted is not None:
                self._warn_if_empty("averaged_state_dict")
            entries = (
                Entry(share.holding.names, share, exported_copy(self._planes[share.name], share.format, dtype))
                for share in self._shares
            )
            with self._ranks.in_lockstep():
                state = gather_whole(entries, self._ranks, to_first=rank0_only, cpu_offload=cpu_offload)
                copied = copied_on_first(self._copied, self._ranks, cpu_offload=cpu_offload)
            if rank0_only and self._ranks.index > 0:
                return state
            exported = {id(each): exported_copy([each], None, dtype) for each in copied.values()}
            return state | {name: exported[id(each)] for name, each in copied.items()}

    @hints.hinted
    def load_full_state_dict(self, state_dict: Mapping[str, Any] | None, *, from_rank0: bool = False) -> None:
        """Load whole tensors: a state of :class:`~swafast.FusedAveragedModel` or torch's ``AveragedModel``. Collective.

        Averages of another format are converted at full precision. If anything raises, nothing has changed on any rank.

        Args:
            from_rank0: take the state of the first rank of the group, which broadcasts it in windows; the others may
                pass None. By default each rank takes its part of the state that it is given.

        Raises:
            TypeError, ValueError: keys, shapes or dtypes do not match. The message names the key.
            RuntimeError: as :meth:`load_state_dict`.
        """
        call = loading_call(from_rank0)
        with self._guard.hold(call, self._ranks):
            pending = self._take_whole(state_dict, call)
            checkpoint.commit([(pending, self.n_averaged)])
            self._count_from(int(pending.count), is_loaded=True)

    def _take_whole(self, state: object, call: str) -> PendingLoad:
        """Return this rank's part of a state of whole tensors, checked on all ranks; ``call`` is of loading_call."""
        from_rank0, entries = call == loading_call(True), self._entries()
        pending, wholes = None, None
        with self._ranks.settled(call):
            if not from_rank0 or self._ranks.index == 0:
                whole = _translated(self._shares, checkpoint.named_alike(entries, self._copied, state))
                pending = checkpoint.prepare_load(entries, self._copied, whole)
                wholes = [_of_ties(whole, entry) for entry in entries]
        if not from_rank0:
            assert pending is not None
            with self._ranks.settled(call):
                checkpoint.verify(pending, self._ranks, self.n_averaged.device)
            return pending
        with self._ranks.in_lockstep():
            count = self._ranks.gather(int(pending.count) if pending is not None else 0)[0]
            runs = _broadcast(entries, wholes, self._ranks)
            copies = _copies_of_first(pending.copies if pending is not None else [], self._copied, self._ranks)
        return PendingLoad(torch.tensor(count, device=self.n_averaged.device), runs, {}, frozenset(), copies)

    if TYPE_CHECKING:
        n_averaged: Tensor
        _guard: Guard
        _ranks: Ranks
        _saving: Counting
        _uncounted: Uncounted | None
        _shares: Sequence[Share]
        _planes: dict[str, tuple[Tensor, ...]]
        _copied: dict[tuple[str, ...], Tensor]

        def _entries(self) -> list[Entry]: ...
        def _warn_if_empty(self, action: str) -> None: ...
        def _count_from(self, num_averaged: int, *, is_loaded: bool = False) -> None: ...


# Gathering


def gather_whole(all_entries: Iterable[Entry], ranks: Ranks, *, to_first: bool, cpu_offload: bool) -> dict[str, Tensor]:
    """Return whole tensors, gathered one by one to save memory; with ``to_first`` {} on other ranks. Collective."""
    state: dict[str, Tensor] = {}
    for entry in all_entries:
        holding = entry.share.holding
        if holding.is_buffer and holding.sharding.kind == "replicated":
            whole = checkpoint.part_of(entry)
            ranks.broadcast_(whole)
        else:
            whole = summed(entry, ranks, to_first=to_first)
        if not to_first or ranks.index == 0:
            state |= dict.fromkeys(entry.keys, whole.cpu() if cpu_offload else whole)
    return state


def summed(entry: Entry, ranks: Ranks, *, to_first: bool) -> Tensor:
    """Gather a whole tensor by summing all ranks' bytes as integers: each byte is 0 on all ranks but one."""
    holding = entry.share.holding
    nbytes = math.prod(holding.shape) * entry.plane.element_size()
    words = torch.zeros(-(-nbytes // 8), dtype=torch.int64, device=entry.plane.device)
    whole = words.view(torch.uint8)[:nbytes].view(entry.plane.dtype).view(holding.shape)
    if entry.share.counts_on(ranks.rank):
        for box in entry.share.boxes:
            box.of_whole(whole).copy_(box.of_run(entry.run))
    (ranks.sum_to_first_ if to_first else ranks.sum_)(words)
    return whole


def copied_on_first(copied: Mapping[tuple[str, ...], Tensor], ranks: Ranks, *, cpu_offload: bool) -> dict[str, Tensor]:
    """Return the first rank's copies of the buffers that torch copies, by their names. Collective."""
    if not copied:
        return {}
    own = [duplicate(tensor).cpu() for tensor in copied.values()] if ranks.index == 0 else []
    first = ranks.gather(own)[0]
    state: dict[str, Tensor] = {}
    for (names, here), value in zip(copied.items(), first, strict=True):
        state |= dict.fromkeys(names, value if cpu_offload else value.to(here.device))
    return state


# Loading


def loading_call(from_rank0: bool) -> str:
    """Return the call as ranks compare it: all must pass the same ``from_rank0``."""
    return f"load_full_state_dict(from_rank0={bool(from_rank0)})"


def _translated(shares: Sequence[Share], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state of whole tensors with the planes of these averages' formats."""
    for key, value in state.items():
        if isinstance(value, (DTensor, PartTensor)):
            kind = type(value).__name__
            raise TypeError(f"state_dict[{key!r}] must be a whole tensor, got a {kind}: use load_state_dict for parts")
    translated = dict(state)
    keys = {share.name: [checkpoint.MODULE + name for name in share.holding.names] for share in shares}
    given = {name: [key for key in own if isinstance(state.get(key), Tensor)] for name, own in keys.items()}
    formats = {share.name: share.format for share in shares if share.format is not None}
    translate_state(translated, "", given, formats, strict=True, casts=True)
    return translated


def _of_ties(state: Mapping[str, Tensor], entry: Entry) -> Tensor:
    """Return the whole tensor of an entry. Raise ValueError if its tied keys have different values."""
    first, *tied = entry.keys
    for key in tied:
        if state[key] is not state[first] and not torch.equal(_bytes(state[key]), _bytes(state[first])):
            raise ValueError(f"state_dict[{key!r}] must equal that of {first!r}, to which it is tied, got other values")
    return state[first].detach()


def _copies_of_first(
    copies: Sequence[tuple[Tensor, Tensor]], copied: Mapping[tuple[str, ...], Tensor], ranks: Ranks
) -> list[tuple[Tensor, Tensor]]:
    """Return the values that the first rank's state has for the buffers that torch copies, with these. Collective."""
    if not copied:
        return []
    places = {id(tensor): place for place, tensor in enumerate(copied.values())}
    found = ranks.gather([(places[id(tensor)], value.cpu()) for tensor, value in copies])[0]
    tensors = list(copied.values())
    return [(tensors[place], value) for place, value in found]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _broadcast(
    all_entries: Sequence[Entry], wholes: Sequence[Tensor] | None, ranks: Ranks
) -> list[tuple[Entry, Tensor]]:
    """Broadcast whole tensors from the first rank, window by window, and return this rank's elements. Collective.

    Args:
        wholes: the tensors, one for each entry; None on the other ranks.
    """
    runs = [(entry, torch.empty_like(entry.run)) for entry in all_entries]
    if not runs:
        return runs
    device = ranks.device_for(all_entries[0].plane.device)
    shapes = [entry.share.holding.shape for entry in all_entries]
    itemsizes = [entry.plane.element_size() for entry in all_entries]
    everything = [Run(index, 0, math.prod(shape)) for index, shape in enumerate(shapes)]
    flats = [run for _, run in runs] if wholes is None else [whole.reshape(-1) for whole in wholes]
    for piece in pieces_of(everything, itemsizes, CPU_WINDOW_NBYTES if device.type == "cpu" else WINDOW_NBYTES):
        nbytes = sum(run.numel * itemsizes[run.index] + ALIGNMENT for run in piece)
        window = torch.empty(nbytes, dtype=torch.uint8, device=device)
        views = list(with_views(piece, flats, window))
        for run, view in views if wholes is not None else ():
            view.copy_(flats[run.index][run.start : run.stop])
        ranks.broadcast_(window)
        for run, view in views:
            entry, own = runs[run.index]
            for theirs in boxes_of_run(shapes[run.index], run.start, run.stop):
                for ours in entry.share.boxes:
                    if (shared := ours.overlap(theirs)) is not None:
                        ours.of_run(own)[shared[0]].copy_(theirs.of_run(view)[shared[1]])
    return runs
