"""Sums of a chunk's elements in float64, and their one rounding: by the native library, by numpy or by torch.

The native library is the fastest, and needs neither of the others. All of them give the same bits, but for
those of a NaN.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..backends import Unavailable, library
from .checkpoints import AVERAGED_DTYPES, ITEMSIZES

#: Elements that are summed at a time. 64 Ki to 256 Ki take the same time, and the sums stay in the second-level cache.
CHUNK_NUMEL = 128 * 1024

#: The numbers of csrc/swafast.h.
_ELEMENTS = {"F32": 0, "BF16": 1, "F16": 2, "F64": 3}
#: Significant bits, and the exponent of the smallest normal number.
_ROUNDED = {"BF16": (8, -126), "F16": (11, -14)}


class Summing(Protocol):
    """The sums of one chunk at a time. Each thread has its own."""

    buffer: memoryview  # to read a chunk's bytes into; the results are there too

    def add(self, dtype: str, numel: int, coefficient: float, *, begin: bool) -> None:
        """Add ``coefficient`` times the elements in the buffer to the sums, or begin them."""

    def finish(self, dtype: str, numel: int, divisor: float) -> int | None:
        """Divide the sums and round them into the buffer. Return the index of the first NaN or infinity, if any."""


class NativeSumming:
    """:class:`Summing` by the native library."""

    def __init__(self) -> None:
        self._library = library.loaded()
        # Memory of whole pages, which a kernel reads into a little faster.
        self._sums = mmap.mmap(-1, 8 * CHUNK_NUMEL)
        self._elements = mmap.mmap(-1, 8 * CHUNK_NUMEL)
        self.buffer = memoryview(self._elements)
        self._addresses = [
            ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in (self._sums, self._elements)
        ]
        self._nonfinite = ctypes.c_int64()

    def add(self, dtype: str, numel: int, coefficient: float, *, begin: bool) -> None:
        sums, elements = self._addresses
        status = self._library.swafast_cpu_accumulate(sums, elements, numel, _ELEMENTS[dtype], coefficient, begin)
        assert status == 0

    def finish(self, dtype: str, numel: int, divisor: float) -> int | None:
        sums, elements = self._addresses
        out = ctypes.byref(self._nonfinite)
        status = self._library.swafast_cpu_finish(sums, elements, numel, _ELEMENTS[dtype], divisor, out)
        assert status == 0
        return None if self._nonfinite.value < 0 else self._nonfinite.value


class NumpySumming:
    """:class:`Summing` by numpy."""

    def __init__(self) -> None:
        import numpy as np

        self._np = np
        self._sums = np.empty(CHUNK_NUMEL, np.float64)
        memory = bytearray(8 * CHUNK_NUMEL)
        self.buffer = memoryview(memory)
        self._elements = np.frombuffer(memory, np.uint8)

    def _typed(self, dtype: str, numel: int) -> Any:
        name = {"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "uint16"}[dtype]
        return self._elements[: numel * ITEMSIZES[dtype]].view(name)

    def add(self, dtype: str, numel: int, coefficient: float, *, begin: bool) -> None:
        np, values, sums = self._np, self._typed(dtype, numel), self._sums[:numel]
        if dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(all="ignore"):  # what is not finite is found at the end
            products = np.multiply(values, coefficient, dtype=np.float64)
            if begin:
                sums[:] = products
            else:
                sums += products

    def finish(self, dtype: str, numel: int, divisor: float) -> int | None:
        np, out = self._np, self._typed(dtype, numel)
        with np.errstate(all="ignore"):
            values = self._sums[:numel] / divisor
            if dtype in _ROUNDED:
                values = _rounded(values, *_ROUNDED[dtype], np.int64, np.float64)
            if dtype == "BF16":
                values = values.astype(np.float32)
                out[:] = values.view(np.uint32) >> 16
            else:
                out[:] = values
        finite = np.isfinite(values if dtype == "BF16" else out)
        return None if finite.all() else int(finite.argmin())


class TorchSumming:
    """:class:`Summing` by torch, where there is nothing else."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._sums = torch.empty(CHUNK_NUMEL, dtype=torch.float64)
        memory = bytearray(8 * CHUNK_NUMEL)
        self.buffer = memoryview(memory)
        self._elements = torch.frombuffer(memory, dtype=torch.uint8)

    def _typed(self, dtype: str, numel: int) -> Any:
        name = {"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16"}[dtype]
        return self._elements[: numel * ITEMSIZES[dtype]].view(getattr(self._torch, name))

    def add(self, dtype: str, numel: int, coefficient: float, *, begin: bool) -> None:
        products = self._typed(dtype, numel).double() * coefficient
        if begin:
            self._sums[:numel] = products
        else:
            self._sums[:numel] += products

    def finish(self, dtype: str, numel: int, divisor: float) -> int | None:
        values, out = self._sums[:numel] / divisor, self._typed(dtype, numel)
        if dtype in _ROUNDED:
            values = _rounded(values, *_ROUNDED[dtype], self._torch.int64, self._torch.float64)
        out.copy_(values)
        finite = out.isfinite()
        return None if bool(finite.all()) else int(finite.int().argmin())


def _rounded(values: Any, bits: int, lowest: int, int64: Any, float64: Any) -> Any:
    """Round float64 values once to so many significant bits, as ``rounded_to`` of csrc/cpu/sums.h."""
    words = values.view(int64)
    exponents = ((words >> 52) & 0x7FF).clip(1023 + lowest, 1023 + 512)
    magic = (((exponents + (53 - bits)) << 52) | (1 << 51)).view(float64)
    rounded = (values + magic) - magic
    return (rounded.view(int64) | (words & (-1 << 63))).view(float64)


def choose_summing() -> tuple[Callable[[], Summing], str]:
    """Return what makes a thread's sums on this machine, and its name for a report."""
    load_openmp_of_torch()
    found = library.load()
    if not isinstance(found, Unavailable):
        return NativeSumming, f"the native library ({found.swafast_cpu_isa().decode()})"
    if importlib.util.find_spec("numpy") is not None:
        return NumpySumming, f"numpy, since {found.reason}"
    if importlib.util.find_spec("torch") is None:
        raise RuntimeError(f"averages need the native library, numpy or torch: install numpy ({found.reason})")
    return TorchSumming, f"torch, since there is no numpy, and {found.reason}"


def load_openmp_of_torch() -> None:
    """Load the OpenMP runtime that torch brings, unless torch is loaded or brings none.

    The native library binds whichever runtime is loaded first. If that were the system's, a torch that is imported
    later would run on it too.
    """
    if "torch" in sys.modules:
        return
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(folder, "lib").glob("libgomp*.so*")):
            try:
                ctypes.CDLL(os.fspath(path), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue  # of another machine; the system's serves
            return


assert set(_ELEMENTS) == set(AVERAGED_DTYPES)
