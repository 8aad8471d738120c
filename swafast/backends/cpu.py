"""The ``cpu`` backend: the native library's kernels for the processor."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..terms.layout import CPU_CHUNK_NUMEL, cut_chunks
from ..terms.samples import Sample
from . import Unavailable, library
from .contract import Pair, Update
from .rows import Rows, kernels_serve, make_paces

name = "cpu"
device_types = frozenset({"cpu"})
exchanges = True

#: Below this many elements a second thread costs more than it brings, as in torch's own kernels.
_NUMEL_PER_THREAD = 32 * 2**10


def unavailable() -> Unavailable | None:
    native = library.load()
    return native if isinstance(native, Unavailable) else None


def describe() -> str:
    """Describe the library in one line: file, build and instruction set."""
    native = library.loaded()
    return f"{native._name} ({native.swafast_build().decode()}; {native.swafast_cpu_isa().decode()})"


def use_isa(isa: str) -> None:
    """Use the instruction set ``isa`` (``avx512``, ``avx2`` or ``generic``) from now on, for tests.

    Raises:
        ValueError: this processor or this build lacks it.
    """
    if library.loaded().swafast_cpu_use_isa(isa.encode()):
        raise ValueError(f"isa must be one that this machine has, got {isa!r}")


def current_isa() -> str:
    return library.loaded().swafast_cpu_isa().decode()


def serves(pair: Pair) -> bool:
    return kernels_serve(pair, device_types)


def want_large_pages(storage: torch.UntypedStorage) -> None:
    """Ask for large pages behind a CPU storage, best before its first touch: then nothing has to move.

    An update is 4 % faster for them on two cores and 13 % on one (96 Mi float32, pages of 4 KiB otherwise).
    """
    native = library.load()
    if not isinstance(native, Unavailable) and storage.device.type == "cpu":
        native.swafast_cpu_want_large_pages(storage.data_ptr(), storage.nbytes())


class NativeLaunch:
    """Tables of raw pointers, filled once; an update passes their addresses and nothing else."""

    captured = False

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._native = library.loaded()
        rows = Rows(pairs)
        self._tensors, self._order, self._rings = rows.table, rows.order, rows.rings
        self._chunks = cut_chunks(rows.runs(), CPU_CHUNK_NUMEL)
        self._table = (ctypes.addressof(self._tensors), len(self._tensors), self._chunks.data_ptr(), len(self._chunks))
        self._exchanged = ctypes.c_int64(0)
        self._most_threads = max(1, rows.numel // _NUMEL_PER_THREAD)
        #: The last update, with its paces. An interrupt cannot part the two.
        self._made: tuple[Update | None, ctypes.Array[library.Pace]] = (None, make_paces((), ()))

    def _threads(self) -> int:
        return min(torch.get_num_threads(), self._most_threads)

    def update(self, params: Sequence[Tensor], update: Update) -> None:
        if update.skip_nonfinite and update.is_skipped(self.first_nonfinite(params) is not None):
            return
        made, paces = self._made
        if update is not made:
            if update.device.type != "cpu":
                self._update_counted_elsewhere(update)
                return
            paces = make_paces(update.terms, update.counters)
            self._made = update, paces
        self._run(update, paces)

    def _update_counted_elsewhere(self, update: Update) -> None:
        """Update the parts on the CPU of a model that counts on a GPU."""
        counts = [counter.cpu() for counter in update.counters]
        self._run(update, make_paces(update.terms, counts))
        for counter in update.counters if update.advance else ():
            counter.add_(update.advance)

    def _run(self, update: Update, paces: ctypes.Array[library.Pace]) -> None:
        threads = self._threads()
        status = self._native.swafast_cpu_update(*self._table, paces, len(paces), update.advance, threads)
        if status:
            _refuse(status)

    def draw(self, params: Sequence[Tensor], sample: Sample) -> None:
        coefficients = (ctypes.c_float * len(sample.coefficients))(*sample.coefficients)
        point = library.SamplePoint(ctypes.addressof(coefficients), len(coefficients), sample.index, sample.noise)
        status = self._native.swafast_cpu_draw(*self._table, ctypes.byref(point), self._threads())
        if status:
            _refuse(
                status, f"a sample must not have more coefficients than an average has columns, got {len(coefficients)}"
            )

    def exchange(self, wanted: bool) -> None:
        """Let every param and the averaged module's tensor have changed places, or not, in place.

        One call of C does it and remembers it, so that no signal handler of Python's can come between.
        """
        exchanged = ctypes.byref(self._exchanged)
        status = self._native.swafast_cpu_exchange(*self._table, self._threads(), int(wanted), exchanged)
        if status:
            _refuse(status)

    def first_nonfinite(self, params: Sequence[Tensor]) -> int | None:
        index = ctypes.c_int64()
        status = self._native.swafast_cpu_first_nonfinite(*self._table, self._threads(), ctypes.byref(index))
        if status:
            _refuse(status)
        return None if index.value < 0 else self._order[index.value]


prepare = NativeLaunch


def _refuse(status: int, of_count: str = "n_averaged must be >= 0, got a negative count") -> None:
    if status == 1:
        raise ValueError(of_count)
    raise AssertionError(f"the native library refused a tensor that the cpu backend said it serves (status {status})")
