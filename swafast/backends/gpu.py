"""What the GPU backends have in common: tables in device memory, one launch for each device, and nothing read back.

The kernels read ``num_averaged`` on the device and count there. A backend adds how its kernels are started.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..terms.capturing import allowed_to_wait, refuse_capture
from ..terms.grids import WHOLE, Grid, current_grid
from ..terms.layout import GPU_CHUNK_NUMELS, cut_chunks, gpu_chunk_numel
from ..terms.samples import Sample
from ..torch_private.core import current_raw_stream
from . import library
from .contract import Pair, Update
from .rows import Rows, make_paces

#: 64-bit words of ``swafast_state`` in csrc/swafast.h, and which of them is ``nonfinite``.
_STATE_WORDS, _NONFINITE_WORD = 4, 2
_COUNTER_WORDS = library.MAX_PACES


@dataclass
class Table:
    """The tables of the launches on one device, in one allocation there: descriptors, state, counters."""

    device: torch.device
    indices: tuple[int, ...]  # of the pairs, in the order of the rows
    words: Tensor = field(repr=False)  # int64
    rings: Tensor = field(repr=False)  # int64, of the pairs with a spread
    has_spread: bool  # whether there are such pairs: another kernel updates them
    head: library.TableHead
    stream: int  # that the table was made on
    #: By the grids that were asked for. Two threads may make one at the same time: either serves.
    grids: dict[Grid, library.LaunchGrid] = field(default_factory=dict, repr=False)
    #: The last update, with its paces. An interrupt cannot part the two.
    _made: tuple[Update | None, ctypes.Array[library.Pace]] = field(
        default_factory=lambda: (None, make_paces((), ())), repr=False
    )

    @property
    def counters(self) -> Sequence[Tensor]:
        """Counters for a launch beside that of the device where the averaged models' own are."""
        return self.words[-_COUNTER_WORDS:].unbind()

    def paces_of(self, update: Update, counters: Sequence[Tensor]) -> ctypes.Array[library.Pace]:
        """Return the paces of ``update`` with ``counters`` on this device: the same object for the same update."""
        made, paces = self._made
        if update is not made:
            paces = make_paces(update.terms, counters)
            self._made = update, paces
        return paces

    @property
    def nonfinite(self) -> Tensor:
        return self.words[_NONFINITE_WORD - _STATE_WORDS - _COUNTER_WORDS]


def make_table(pairs: Sequence[Pair], indices: Sequence[int], num_blocks: int) -> Table:
    """Write the tables of ``pairs``, all on one device, into its memory. This waits for the copy, once for a plan."""
    device = pairs[0].param.device
    with torch.inference_mode(False), allowed_to_wait():
        rows = Rows(pairs, device)
    # Of a param with several averages a chunk is read again for each of them, from caches that hold the shortest.
    chunk_numel = GPU_CHUNK_NUMELS[0] if rows.most_followers else gpu_chunk_numel(rows.numel, num_blocks)
    chunks = cut_chunks(rows.runs(), current_grid().chunk_numel or chunk_numel)
    state = torch.zeros(_STATE_WORDS + _COUNTER_WORDS, dtype=torch.int64, device="cpu")
    with torch.inference_mode(False), torch.no_grad(), allowed_to_wait():
        words = torch.cat((rows.descriptors(chunks).flatten(), state)).to(device)
        if device.type == "cuda":
            # Later launches may be on another stream, which knows nothing of this copy.
            torch.cuda.current_stream(device).synchronize()
    head = library.TableHead(num_tensors=len(rows.table), num_chunks=len(chunks), device=device.index or 0)
    head.descriptors = words.data_ptr()
    head.state = words[-len(state) :].data_ptr()
    order = tuple(indices[index] for index in rows.order)
    return Table(device, order, words, rows.rings, len(rows.rings) > 0, head, current_raw_stream(device))


@functools.cache
def warn_unusable(kernels: str, device: str, reason: str) -> None:
    """Warn, once for each reason, that a device's tensors go to another backend."""
    warnings.warn(f"swafast's {kernels} kernels do not run on {device}: {reason}", RuntimeWarning, stacklevel=3)


class DeviceLaunch:
    """Launches on GPUs, one for each device that the pairs are on."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.captured = False
        by_device: dict[torch.device, list[int]] = {}
        for index, pair in enumerate(pairs):
            by_device.setdefault(pair.param.device, []).append(index)
        self._tables = [
            make_table([pairs[i] for i in indices], indices, self.num_blocks(device, WHOLE.num_threads))
            for device, indices in by_device.items()
        ]

    # What a backend adds

    def num_blocks(self, device: torch.device, num_threads: int) -> int:
        """Return how many blocks of so many threads run on the device at once."""
        raise NotImplementedError

    def grid(self, table: Table) -> library.LaunchGrid:
        """Return the current grid as it is on the table's device."""
        grid = current_grid()
        made = table.grids.get(grid)
        if made is None:
            num_blocks = grid.num_blocks(self.num_blocks(table.device, grid.num_threads))
            made = table.grids[grid] = library.LaunchGrid(num_blocks, grid.num_threads)
        return made

    def start_update(
        self, table: Table, paces: ctypes.Array[library.Pace], advance: int, skip_nonfinite: bool, stream: int
    ) -> None:
        """Start the update's kernel, and set :attr:`captured` where a graph takes it up instead.

        The counters of ``paces`` are on the table's device.
        """
        raise NotImplementedError

    def start_exchange(self, table: Table, wanted: bool, stream: int) -> None:
        raise NotImplementedError

    def start_draw(self, table: Table, sample: Sample, coefficients: Tensor, stream: int) -> None:
        """Start the kernel that writes a sample into the params. ``coefficients`` are on the table's device."""
        raise NotImplementedError

    def start_first_nonfinite(self, table: Table, stream: int) -> None:
        """Start what fills in :attr:`Table.nonfinite`."""
        raise NotImplementedError

    # What a launch does

    def update(self, params: Sequence[Tensor], update: Update) -> None:
        """Update as any launch does. Where everything is on one device, that device decides whether to skip."""
        counters, device = update.counters, update.device
        counts_here = any(table.device == device for table in self._tables)
        if not counts_here and device.type == "cpu" and min(map(int, counters)) < 0:
            raise ValueError(f"n_averaged must be >= 0, got {min(map(int, counters))}")
        skip = update.skip_nonfinite
        if skip and (len(self._tables) > 1 or not counts_here):
            # What one device finds holds for all of them and for the counters, and only the host hears of all.
            if update.is_skipped(self.first_nonfinite(params) is not None):
                return
            skip = False
        tables = self._tables
        if len(tables) > 1:
            # The device of the counters comes last: the others read the same counts before it.
            tables = sorted(tables, key=lambda table: table.device == device)
        for table in tables:
            counts = table.device == device
            read = counters
            if not counts:
                read = tuple(table.counters[: len(counters)])
                for copy, counter in zip(read, counters, strict=True):
                    copy.copy_(counter, non_blocking=True)
            stream = self._stream(table)
            if skip:
                self.start_first_nonfinite(table, stream)
                if update.reduce_flag is not None:
                    update.reduce_flag(table.nonfinite)
            paces = table.paces_of(update, read)
            self.start_update(table, paces, update.advance if counts else 0, skip, stream)
        for counter in counters if update.advance and not counts_here else ():
            counter.add_(update.advance)

    def exchange(self, wanted: bool) -> None:
        """Let every param and the averaged module's tensor have changed places, or not, in place.

        The kernel looks up on the device whether they have, so that an interrupt cannot come between.
        """
        for table in self._tables:
            self.start_exchange(table, wanted, self._stream(table))

    def draw(self, params: Sequence[Tensor], sample: Sample) -> None:
        for table in self._tables:
            refuse_capture(table.device, "a sample, whose coefficients the host computes,")
            with torch.inference_mode(False), allowed_to_wait():
                coefficients = torch.tensor(sample.coefficients, dtype=torch.float32, device=table.device)
            self.start_draw(table, sample, coefficients, self._stream(table))

    def first_nonfinite(self, params: Sequence[Tensor]) -> int | None:
        for table in self._tables:
            refuse_capture(table.device, "a search for NaNs whose result the host reads")
        for table in self._tables:
            self.start_first_nonfinite(table, self._stream(table))
        found = []
        for table in self._tables:
            with allowed_to_wait():
                from_the_end = int(table.nonfinite)
            if from_the_end:
                found.append(table.indices[-from_the_end])
        return min(found, default=None)

    def _stream(self, table: Table) -> int:
        stream = current_raw_stream(table.device)
        if stream != table.stream and table.device.type == "cuda":
            # The table's memory may be handed out again once this stream is done with it, not before.
            for words in (table.words, *([table.rings] if table.has_spread else [])):
                words.record_stream(torch.cuda.current_stream(table.device))
        return stream
