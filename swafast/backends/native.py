"""The ``cpu`` backend: the native library through its C interface (``csrc/swafast.h``), by ctypes.

The library needs neither torch's headers nor Python's, so one file serves every version of both. It loads at first use.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..bucket import CPU_CHUNK_NUMEL, cut_chunks, is_dense, same_order
from ..formats import EXACT, FLOAT32, MIRRORED
from ..rules import KernelTerms, Rule
from . import Pair

name = "cpu"

#: Changes with any structure or function of csrc/swafast.h.
_ABI = 3

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BYTES = 3
_FORMATS = {FLOAT32: 0, EXACT: 1, MIRRORED: 2}
_COPIED = 3

#: Below this many elements a second thread costs more than it brings, as in torch's own kernels.
_NUMEL_PER_THREAD = 32 * 2**10


class _Rule(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int64), ("terms", ctypes.c_double * 4))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("param", ctypes.c_void_p),
        ("planes", ctypes.c_void_p * 2),
        ("numel", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("format", ctypes.c_int32),
    )


def _candidates() -> list[Path]:
    """Give the places of the library, likeliest first.

    Run from a clone, the folder ``swafast/`` shadows the installed package, which is the one with the library.
    """
    file = (
        "swafast.dll" if os.name == "nt" else "libswafast.dylib" if os.uname().sysname == "Darwin" else "libswafast.so"
    )
    named = os.environ.get("SWAFAST_LIBRARY")
    if named:
        return [Path(named)]
    places = [Path(__file__).parents[1] / "lib" / file]
    try:
        installed = importlib.metadata.distribution("swafast").locate_file(f"swafast/lib/{file}")
        places.append(Path(str(installed)))
    except importlib.metadata.PackageNotFoundError:
        pass
    return places


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Give the library and its path, or None and why it did not load."""
    places = _candidates()
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        for place in places:
            reason = place.parent / "not_built.txt"
            if reason.is_file():
                return None, reason.read_text().strip()
        return None, f"no native library at {' or '.join(map(str, places))}"
    try:
        library = ctypes.CDLL(str(path))
        library.swafast_abi.restype = ctypes.c_int32
        abi = library.swafast_abi()
    except (OSError, AttributeError) as error:
        return None, f"{path} did not load: {error}"
    if abi != _ABI:
        return None, f"{path} has interface {abi}, this swafast needs {_ABI}: install it again"
    _declare(library)
    return library, str(path)


def _declare(library: ctypes.CDLL) -> None:
    # Pointers go as plain integers: converting them to pointer objects costs more than the call.
    address, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    table = (address, i64, address, i64)
    library.swafast_build.restype = ctypes.c_char_p
    library.swafast_cpu_isa.restype = ctypes.c_char_p
    library.swafast_cpu_use_isa.argtypes = (ctypes.c_char_p,)
    library.swafast_weight.restype = ctypes.c_double
    library.swafast_weight.argtypes = (ctypes.POINTER(_Rule), i64)
    library.swafast_cpu_update.argtypes = (*table, ctypes.POINTER(_Rule), address, i64, i32)
    library.swafast_cpu_want_large_pages.argtypes = (address, i64)
    library.swafast_cpu_want_large_pages.restype = None
    library.swafast_cpu_exchange.argtypes = (*table, i32, ctypes.POINTER(i64))
    library.swafast_cpu_first_nonfinite.argtypes = (*table, i32, ctypes.POINTER(i64))


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"the cpu backend is not available: {reason}")
    return library


def unavailable() -> str | None:
    library, reason = _load()
    return None if library is not None else reason


def describe() -> str:
    """Say which file was loaded, how it was built and which instruction set it chose."""
    library, path = _load()
    if library is None:
        return path
    return f"{path} ({library.swafast_build().decode()}; {library.swafast_cpu_isa().decode()})"


def use_isa(isa: str) -> None:
    """Use the instruction set ``isa`` (``avx512``, ``avx2`` or ``generic``) from now on, for tests.

    Raises:
        ValueError: this processor or this build lacks it.
    """
    if _library().swafast_cpu_use_isa(isa.encode()):
        raise ValueError(f"isa must be one that this machine has, got {isa!r}")


def current_isa() -> str:
    return _library().swafast_cpu_isa().decode()


def weight(rule: Rule, num_averaged: int) -> float:
    """Give the weight as the kernels work it out, for a rule that has kernel terms."""
    terms = rule.kernel_terms()
    if terms is None:
        raise ValueError(f"rule must have kernel terms, got {rule!r}")
    return _library().swafast_weight(ctypes.byref(_Rule(terms.kind, terms.terms)), num_averaged)


def serves(pair: Pair) -> bool:
    """Say whether the kernels take this pair: CPU, a known dtype, both sides aligned and dense in one order."""
    param, average = pair.param, pair.average
    if param.device.type != "cpu" or any(plane.device.type != "cpu" for plane in pair.planes):
        return False
    if any(tensor.is_conj() or tensor.is_neg() for tensor in (param, average)):
        return False
    if pair.format is None:
        if param.dtype != average.dtype:
            return False
    elif pair.format not in _FORMATS or param.dtype not in _DTYPES:
        return False
    if any(tensor.data_ptr() % tensor.element_size() for tensor in (param, *pair.planes)):
        return False
    return is_dense(param.shape, param.stride()) and all(
        same_order(param.shape, param.stride(), plane.stride()) for plane in pair.planes
    )


def want_large_pages(storage: torch.UntypedStorage) -> None:
    """Ask for large pages behind a new CPU storage, before its first touch.

    An update is 4 % faster for them on two cores and 13 % on one (96 Mi float32, pages of 4 KiB otherwise).
    """
    library, _ = _load()
    if library is not None and storage.device.type == "cpu":
        library.swafast_cpu_want_large_pages(storage.data_ptr(), storage.nbytes())


def prepare(pairs: Sequence[Pair]) -> NativeLaunch:
    return NativeLaunch(pairs)


class NativeLaunch:
    """Tables of raw pointers, filled once; an update passes their addresses and nothing else."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._native = _library()
        self._tensors = (_Tensor * len(pairs))(*map(_row, pairs))
        numels = [row.numel for row in self._tensors]
        self._chunks = cut_chunks(numels, CPU_CHUNK_NUMEL)
        self._table = (ctypes.addressof(self._tensors), len(pairs), self._chunks.data_ptr(), len(self._chunks))
        self._exchanged = ctypes.c_int64(0)
        self._most_threads = max(1, sum(numels) // _NUMEL_PER_THREAD)
        self._rule: tuple[KernelTerms, _Rule] | None = None

    def _threads(self) -> int:
        return min(torch.get_num_threads(), self._most_threads)

    def _kernel_rule(self, rule: Rule) -> _Rule:
        terms = rule.kernel_terms()
        assert terms is not None, "ops.update works out the weight of a rule without terms"
        if self._rule is None or self._rule[0] != terms:
            self._rule = (terms, _Rule(terms.kind, terms.terms))
        return self._rule[1]

    def update(self, params: Sequence[Tensor], rule: Rule, num_averaged: Tensor, advance: int) -> None:
        kernel_rule = self._kernel_rule(rule)
        _check(
            self._native.swafast_cpu_update(
                *self._table, ctypes.byref(kernel_rule), num_averaged.data_ptr(), advance, self._threads()
            )
        )

    def exchange(self) -> None:
        """Exchange every param with the averaged module's tensor, in place, and turn :attr:`exchanged` over.

        Both happen in one call of C, so that no signal handler of Python's can come between them.
        """
        _check(self._native.swafast_cpu_exchange(*self._table, self._threads(), ctypes.byref(self._exchanged)))

    @property
    def exchanged(self) -> bool:
        return bool(self._exchanged.value)

    def first_nonfinite(self, params: Sequence[Tensor]) -> int | None:
        index = ctypes.c_int64()
        _check(self._native.swafast_cpu_first_nonfinite(*self._table, self._threads(), ctypes.byref(index)))
        return None if index.value < 0 else index.value


def _row(pair: Pair) -> _Tensor:
    planes = tuple(plane.data_ptr() for plane in pair.planes)
    row = _Tensor(param=pair.param.data_ptr(), planes=(*planes, *(None,) * (2 - len(planes))))
    if pair.format is None:
        row.numel, row.dtype, row.format = pair.param.nbytes, _BYTES, _COPIED
    else:
        row.numel, row.dtype, row.format = pair.param.numel(), _DTYPES[pair.param.dtype], _FORMATS[pair.format]
    return row


def _check(status: int) -> None:
    if status == 1:
        raise ValueError("n_averaged must be >= 0, got a negative count")
    assert status == 0, f"the native library refused a tensor that the cpu backend said it serves (status {status})"
