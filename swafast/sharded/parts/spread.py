"""Params that are cut over ranks: each rank's own part, spread to all that hold them, window by window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .flat_order import Run
from .holdings import Held
from .ranks import Ranks
from .shares import Cut, view_of_run

#: Most bytes that are gathered at a time, and what a GPU's links take to run at their speed.
WINDOW_NBYTES = 64 * 2**20

#: On a CPU a window that stays in the caches between network and param is faster, but each rank's piece should not be
#: so small that the walk over the ranks takes longer than what they send.
CPU_WINDOW_NBYTES, CPU_PIECE_NBYTES = 8 * 2**20, 2**20

#: What starts in a piece starts on a multiple of this, so that it can be viewed in any dtype.
_ALIGNMENT = 16


class Spread:
    """Fill the params of one cut: after :meth:`fill`, every rank has in them what each rank has in its own part."""

    def __init__(self, cut: Cut, ranks: Ranks) -> None:
        self._cut, self.ranks = cut, ranks
        #: Whether a param outside this rank's own part may have been written by a call that did not come to its end.
        self.torn = False

    @torch.no_grad()
    def fill(self, held: Mapping[str, Held]) -> None:
        """Gather and write, window by window; ``held`` are the model's tensors now, by name.

        Raises:
            LostPeerError: a rank is gone; :attr:`torn` says whether params of others were being written.
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
            for run, view in _with_views(window[own], flats, sent):
                view.copy_(flats[run.index][run.start : run.stop])
            self.ranks.all_gather(received, sent)
            self.torn = True
            for index in range(size):
                if index != own:
                    theirs = received[index * piece : (index + 1) * piece]
                    for run, view in _with_views(window[index], flats, theirs):
                        flats[run.index][run.start : run.stop].copy_(view)
        for param, flat in zip(params, flats, strict=True):
            if param.holding.order is None:
                param.local.detach().copy_(flat.view(param.local.shape))
        self.torn = False


def _piece_nbytes(size: int, device: torch.device) -> int:
    """Give the bytes that each of ``size`` ranks sends at a time."""
    window = WINDOW_NBYTES
    if device.type == "cpu":
        window = min(window, max(CPU_WINDOW_NBYTES, size * CPU_PIECE_NBYTES))
    return max(_ALIGNMENT, window // size // _ALIGNMENT * _ALIGNMENT)


def _flat(held: Held) -> Tensor:
    """View what this rank holds as 1-D; a copy where it is not dense, which is written back at the end."""
    if held.holding.order is None:
        return held.local.detach().reshape(-1).clone()
    return view_of_run(held.holding, held.local.detach(), 0, held.holding.numel)


def pieces_of(runs: Sequence[Run], itemsizes: Sequence[int], nbytes: int) -> Iterator[list[Run]]:
    """Cut runs into what goes into pieces of ``nbytes``, each run in it at the next aligned byte."""
    piece: list[Run] = []
    used = 0
    for run in runs:
        start = run.start
        while start < run.stop:
            room = (nbytes - used) // itemsizes[run.index]
            stop = min(run.stop, start + room)
            if stop > start:
                piece.append(Run(run.index, start, stop))
                used += -(-(stop - start) * itemsizes[run.index] // _ALIGNMENT) * _ALIGNMENT
            start = stop
            if start < run.stop:
                yield piece
                piece, used = [], 0
    if piece:
        yield piece


def _with_views(piece: Sequence[Run], flats: Sequence[Tensor], memory: Tensor) -> Iterator[tuple[Run, Tensor]]:
    """Yield the runs of a rank's piece, each with its view of the piece's memory, in its dtype."""
    used = 0
    for run in piece:
        nbytes = run.numel * flats[run.index].element_size()
        yield run, memory[used : used + nbytes].view(flats[run.index].dtype)
        used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
