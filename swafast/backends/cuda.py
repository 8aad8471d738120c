"""The ``cuda`` backend: the native library's kernels for NVIDIA GPUs (``csrc/cuda/``)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..terms.capturing import allowed_to_wait
from ..terms.grids import SIDE, WHOLE
from ..terms.samples import Sample
from . import Unavailable, library
from .contract import Pair
from .gpu import DeviceLaunch, Table, warn_unusable
from .rows import kernels_serve

name = "cuda"
device_types = frozenset({"cuda"})
exchanges = True


def unavailable() -> Unavailable | None:
    if "cuda" in device_types:
        if torch.version.cuda is None:
            return Unavailable("this torch is built without CUDA", expected=True)
        if not torch.cuda.is_available():
            return Unavailable("torch finds no CUDA device", expected=True)
    native = library.load()
    if isinstance(native, Unavailable):
        return native
    if not library.has_cuda(native):
        path, build = native._name, native.swafast_build().decode()
        return Unavailable(f"{path} was built without them ({build})", expected="did not work" not in build)
    return None


def describe() -> str:
    """Describe the library in one line: file, build, and blocks on each device."""
    native = library.loaded()
    devices = range(torch.cuda.device_count()) if "cuda" in device_types else range(1)
    blocks = "; ".join(f"device {i}: {num_blocks(i)}" for i in devices)
    return f"{native._name} ({native.swafast_cuda_build().decode()}; blocks on {blocks})"


def num_blocks(device_index: int, num_threads: int = WHOLE.num_threads) -> int | Unavailable:
    """Return how many blocks of so many threads run on a device at once, or why none does now.

    No failure is taken as permanent: the GPU's memory may be full, or something may be capturing. The next plan asks
    again, in microseconds.
    """
    try:
        return _load_kernels(device_index, num_threads)
    except RuntimeError as error:
        return Unavailable(str(error))


@functools.cache
def _load_kernels(device_index: int, num_threads: int) -> int:
    """Load all kernels onto a device, and return how many blocks of the update run there. A failure is not cached."""
    count = ctypes.c_int32()
    with allowed_to_wait():
        status = library.loaded().swafast_cuda_blocks(device_index, num_threads, ctypes.byref(count))
    if status:
        raise RuntimeError(_last_error())
    return count.value


def _last_error() -> str:
    return library.loaded().swafast_cuda_error().decode()


def serves(pair: Pair) -> bool:
    return kernels_serve(pair, device_types) and _is_usable(pair.param.device)


def _is_usable(device: torch.device) -> bool:
    for grid in (WHOLE, SIDE):  # each now: a capture must not ask
        blocks = num_blocks(device.index or 0, grid.num_threads)
        if isinstance(blocks, Unavailable):
            warn_unusable("CUDA", str(device), blocks.reason)
            return False
    return True


class CudaLaunch(DeviceLaunch):
    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._native = library.loaded()
        super().__init__(pairs)

    def num_blocks(self, device: torch.device, num_threads: int) -> int:
        blocks = num_blocks(device.index or 0, num_threads)
        assert not isinstance(blocks, Unavailable), "serves() refuses the pairs of such a device"
        return blocks

    def start_update(
        self, table: Table, paces: ctypes.Array[library.Pace], advance: int, skip_nonfinite: bool, stream: int
    ) -> None:
        capturing = ctypes.c_int32()
        head, grid, out = ctypes.byref(table.head), ctypes.byref(self.grid(table)), ctypes.byref(capturing)
        how = skip_nonfinite, table.has_spread
        _check(self._native.swafast_cuda_update(head, paces, len(paces), advance, *how, grid, out, stream))
        self.captured |= bool(capturing.value)

    def start_exchange(self, table: Table, wanted: bool, stream: int) -> None:
        grid = ctypes.byref(self.grid(table))
        _check(self._native.swafast_cuda_exchange(ctypes.byref(table.head), int(wanted), grid, stream))

    def start_draw(self, table: Table, sample: Sample, coefficients: Tensor, stream: int) -> None:
        address, count = coefficients.data_ptr(), len(sample.coefficients)
        point = library.SamplePoint(address, count, sample.index, sample.noise)
        head, grid = ctypes.byref(table.head), ctypes.byref(self.grid(table))
        _check(self._native.swafast_cuda_draw(head, ctypes.byref(point), grid, stream))

    def start_first_nonfinite(self, table: Table, stream: int) -> None:
        grid = ctypes.byref(self.grid(table))
        _check(self._native.swafast_cuda_first_nonfinite(ctypes.byref(table.head), grid, stream))


prepare = CudaLaunch


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"a CUDA launch of swafast failed: {_last_error()}")
