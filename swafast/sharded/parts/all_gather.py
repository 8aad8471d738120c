"""Gather the parts of cut params on all ranks that hold them, window by window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .flat_order import Run
from .holdings import Held
from .ranks import Ranks
from .shares import Cut, view_of_run

#: The largest window. A GPU's links need windows of this size to reach their full speed.
WINDOW_NBYTES = 64 * 2**20

#: On a CPU a window that fits in the caches is faster. But with too small pieces the collective's overhead per rank
#: takes longer than the transfer.
CPU_WINDOW_NBYTES, CPU_PIECE_NBYTES = 8 * 2**20, 2**20

#: Runs start at multiples of this in a piece, so that they can be viewed in any dtype.
ALIGNMENT = 16


class AllGather:
    """Fills the params of one cut on all its ranks with the parts of all its ranks."""

    def __init__(self, cut: Cut, ranks: Ranks) -> None:
        self._cut, self.ranks = cut, ranks
        #: Whether a failed call of fill() may have written params outside this rank's own part.
        self.torn = False

    @torch.no_grad()
    def fill(self, held: Mapping[str, Held]) -> None:
        """Gather the parts and write them into ``held``, the model's current tensors by name. Collective.

        Raises:
            LostPeerError: a rank was lost. :attr:`torn` tells whether params outside this rank's part were written.
        """
        size = self.ranks.size
        if size == 1:
            return
        cut = self._cut
        params = [held[name] for name in cut.names]
        flats = [_flat(param) for param in params]
        device = self.ranks.device_for(flats[0].device)
        piece = _piece_nbytes(size, device)
        itemsizes = [flat.element_size() for flat in flats]
        iterators = [pieces_of(cut.flat.runs(*cut.flat.bounds(index)), itemsizes, piece) for index in range(size)]
        sent = torch.empty(piece, dtype=torch.uint8, device=device)
        received = torch.empty(piece * size, dtype=torch.uint8, device=device)
        own = self.ranks.index
        while any(window := [next(iterator, []) for iterator in iterators]):
            for run, view in with_views(window[own], flats, sent):
                view.copy_(flats[run.index][run.start : run.stop])
            self.ranks.all_gather(received, sent)
            self.torn = True
            for index in range(size):
                if index != own:
                    theirs = received[index * piece : (index + 1) * piece]
                    for run, view in with_views(window[index], flats, theirs):
                        flats[run.index][run.start : run.stop].copy_(view)
        for param, flat in zip(params, flats, strict=True):
            if param.holding.order is None:
                param.local.detach().copy_(flat.view(param.local.shape))
        self.torn = False


def _piece_nbytes(size: int, device: torch.device) -> int:
    """Return the bytes that each of ``size`` ranks sends in a window."""
    window = WINDOW_NBYTES
    if device.type == "cpu":
        window = min(window, max(CPU_WINDOW_NBYTES, size * CPU_PIECE_NBYTES))
    return max(ALIGNMENT, window // size // ALIGNMENT * ALIGNMENT)


def _flat(held: Held) -> Tensor:
    """Return a 1-D view of what this rank holds; if it is not dense, a copy, which ``fill`` writes back."""
    if held.holding.order is None:
        return held.local.detach().reshape(-1).clone()
    return view_of_run(held.holding, held.local.detach(), 0, held.holding.numel)


def pieces_of(runs: Sequence[Run], itemsizes: Sequence[int], nbytes: int) -> Iterator[list[Run]]:
    """Cut runs into pieces of at most ``nbytes``, in which each run starts at the next aligned byte."""
    piece: list[Run] = []
    used = 0
    for run in runs:
        start = run.start
        while start < run.stop:
            room = (nbytes - used) // itemsizes[run.index]
            stop = min(run.stop, start + room)
            if stop > start:
                piece.append(Run(run.index, start, stop))
                used += -(-(stop - start) * itemsizes[run.index] // ALIGNMENT) * ALIGNMENT
            start = stop
            if start < run.stop:
                yield piece
                piece, used = [], 0
    if piece:
        yield piece


def with_views(piece: Sequence[Run], flats: Sequence[Tensor], memory: Tensor) -> Iterator[tuple[Run, Tensor]]:
    """Yield each run of a rank's piece with its view of the piece's memory, in the run's dtype."""
    used = 0
    for run in piece:
        nbytes = run.numel * flats[run.index].element_size()
        yield run, memory[used : used + nbytes].view(flats[run.index].dtype)
        used += -(-nbytes // ALIGNMENT) * ALIGNMENT
