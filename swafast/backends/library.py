"""The native library: where it is, its C interface (``csrc/swafast.h``) by ctypes, and pairs as its structures.

It needs neither torch's headers nor Python's, so one file serves every version of both. It loads at first use.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..bucket import is_dense, same_order, whole_runs
from ..draws import runs_of
from ..formats import COMPACT, COMPENSATED, EXACT, FLOAT32, HALF, MIRRORED
from ..rules import KernelTerms, Rule
from . import Pair, Unavailable

#: Changes with any structure or function of csrc/swafast.h.
_ABI = 6

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BYTES = 3
_FORMATS = {FLOAT32: 0, EXACT: 1, MIRRORED: 2, COMPACT: 4, COMPENSATED: 5, HALF: 6}
_COPIED = 3

#: The most averages that one launch moves over one read of the params: ``SWAFAST_MAX_PACES``.
MAX_PACES = 16


class KernelRule(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int64), ("terms", ctypes.c_double * 4))


class Pace(ctypes.Structure):
    """A rule and its counter: ``swafast_pace``."""

    _fields_ = (("rule", KernelRule), ("num_averaged", ctypes.c_void_p))


class TensorRow(ctypes.Structure):
    """One pair: ``swafast_tensor``."""

    _fields_ = (
        ("param", ctypes.c_void_p),
        ("planes", ctypes.c_void_p * 2),
        ("numel", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("key", ctypes.c_uint64),
        ("pace", ctypes.c_int32),
        ("followers", ctypes.c_int32),
    )


class TableHead(ctypes.Structure):
    """One launch's tables on a GPU: ``swafast_table``."""

    _fields_ = (
        ("tensors", ctypes.c_void_p),
        ("chunks", ctypes.c_void_p),
        ("num_tensors", ctypes.c_int64),
        ("num_chunks", ctypes.c_int64),
        ("state", ctypes.c_void_p),
        ("device", ctypes.c_int32),
        ("num_blocks", ctypes.c_int32),
    )


class BoxRow(ctypes.Structure):
    """A part of a tensor: ``swafast_box``."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("word_size", ctypes.c_int64),
        ("ndim", ctypes.c_int64),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("index_strides", ctypes.POINTER(ctypes.c_int64)),
        ("first_index", ctypes.c_int64),
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
        return [Path(named).absolute()]
    places = [Path(__file__).parents[1] / "lib" / file]
    try:
        installed = importlib.metadata.distribution("swafast").locate_file(f"swafast/lib/{file}")
        places.append(Path(str(installed)))
    except importlib.metadata.PackageNotFoundError:
        pass
    return places


@functools.cache
def load() -> ctypes.CDLL | Unavailable:
    """Give the library, or why it did not load."""
    places = _candidates()
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        for place in places:
            reason = place.parent / "not_built.txt"
            if reason.is_file():
                return Unavailable(reason.read_text().strip())
        return Unavailable(f"no native library at {' or '.join(map(str, places))}")
    try:
        library = ctypes.CDLL(str(path))
        library.swafast_abi.restype = ctypes.c_int32
        abi = library.swafast_abi()
        if abi != _ABI:
            return Unavailable(f"{path} has interface {abi}, this swafast needs {_ABI}: install it again")
        _declare(library)
        if has_cuda(library):
            _declare_cuda(library)
    except (OSError, AttributeError) as error:
        return Unavailable(f"{path} did not load: {error}")
    return library


def loaded() -> ctypes.CDLL:
    """Give the library, which a caller knows to be there."""
    library = load()
    if isinstance(library, Unavailable):
        raise RuntimeError(f"the native library is not available: {library.reason}")
    return library


def has_cuda(library: ctypes.CDLL) -> bool:
    """Say whether the library was built with a CUDA compiler."""
    return hasattr(library, "swafast_cuda_update")


def _declare(library: ctypes.CDLL) -> None:
    # Pointers go as plain integers: converting them to pointer objects costs more than the call.
    address, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    table = (address, i64, address, i64)
    library.swafast_build.restype = ctypes.c_char_p
    library.swafast_check.argtypes = (address, i64, i32)
    library.swafast_cpu_isa.restype = ctypes.c_char_p
    library.swafast_cpu_use_isa.argtypes = (ctypes.c_char_p,)
    library.swafast_weight.restype = ctypes.c_double
    library.swafast_weight.argtypes = (ctypes.POINTER(KernelRule), i64)
    library.swafast_cpu_update.argtypes = (*table, ctypes.POINTER(Pace), i64, i64, i32)
    library.swafast_cpu_want_large_pages.argtypes = (address, i64)
    library.swafast_cpu_want_large_pages.restype = None
    library.swafast_cpu_exchange.argtypes = (*table, i32, i64, ctypes.POINTER(i64))
    library.swafast_cpu_first_nonfinite.argtypes = (*table, i32, ctypes.POINTER(i64))
    library.swafast_cpu_checksum.argtypes = (ctypes.POINTER(BoxRow), i32, ctypes.POINTER(i64))


def _declare_cuda(library: ctypes.CDLL) -> None:
    address, i64, i32, table = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.POINTER(TableHead)
    library.swafast_cuda_build.restype = ctypes.c_char_p
    library.swafast_cuda_error.restype = ctypes.c_char_p
    library.swafast_cuda_blocks.argtypes = (i32, ctypes.POINTER(i32))
    library.swafast_cuda_update.argtypes = (
        *(table, ctypes.POINTER(Pace), i64, i64, i32, ctypes.POINTER(i32), address),
    )
    library.swafast_cuda_exchange.argtypes = (table, i64, address)
    library.swafast_cuda_first_nonfinite.argtypes = (table, address)


def weight(rule: Rule, num_averaged: int) -> float:
    """Give the weight as the kernels work it out, for a rule that has kernel terms."""
    terms = rule.kernel_terms()
    if terms is None:
        raise ValueError(f"rule must have kernel terms, got {rule!r}")
    return loaded().swafast_weight(ctypes.byref(KernelRule(terms.kind, terms.terms)), num_averaged)


def kernel_terms(rule: Rule) -> KernelTerms:
    terms = rule.kernel_terms()
    assert terms is not None, "ops.update works out the weight of a rule without terms"
    return terms


class PaceCache:
    """Rules and counters as a kernel takes them, made anew only when one of them changes."""

    def __init__(self) -> None:
        self._terms: list[KernelTerms] = []
        self._addresses: list[int] = []
        self._made: ctypes.Array[Pace] = (Pace * 0)()

    def get(self, rules: Sequence[Rule], addresses: Sequence[int]) -> ctypes.Array[Pace]:
        terms = list(map(kernel_terms, rules))
        if terms != self._terms or addresses != self._addresses:
            self._terms, self._addresses = terms, list(addresses)
            paces = (Pace(KernelRule(term.kind, term.terms), to) for term, to in zip(terms, addresses, strict=True))
            self._made = (Pace * len(terms))(*paces)
        return self._made


def serves(pair: Pair, device_types: Collection[str]) -> bool:
    """Say whether kernels can take this pair: one device, a known dtype, both sides aligned and dense in one order."""
    param, average = pair.param, pair.average
    if param.device.type not in device_types or any(plane.device != param.device for plane in pair.planes):
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


class Rows:
    """Pairs as the kernels take them: a row each, those of one param one after the other.

    Only the first row of a param has runs, and so chunks: a kernel takes the rows that follow it along.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        rows = [_row(pair) for pair in pairs]
        together: dict[object, list[int]] = {}
        for index, (pair, row) in enumerate(zip(pairs, rows, strict=True)):
            together.setdefault((pair.name, row.param, row.numel, row.dtype, pair.param.stride()), []).append(index)
        groups = [
            group[start : start + MAX_PACES] for group in together.values() for start in range(0, len(group), MAX_PACES)
        ]
        #: Indices of the pairs, in the order of the rows.
        self.order = [index for group in groups for index in group]
        for group in groups:
            for followers, index in enumerate(reversed(group)):
                rows[index].followers = followers
        self.table = (TensorRow * len(pairs))(*(rows[index] for index in self.order))
        self.most_followers = max((len(group) - 1 for group in groups), default=0)
        self._firsts = [(rows[group[0]].numel, [pairs[index] for index in group]) for group in groups]

    @property
    def numel(self) -> int:
        """Elements that an update reads."""
        return sum(numel for numel, _ in self._firsts)

    def runs(self) -> Tensor:
        """Give the runs of memory to be cut into chunks, as :func:`bucket.cut_chunks` takes them."""
        places = [0]
        for _, group in self._firsts:
            places.append(places[-1] + len(group))
        runs = whole_runs([numel for numel, _ in self._firsts])
        runs[:, 0] = torch.tensor(places[:-1], dtype=torch.int64, device="cpu")
        drawn = [next((pair for pair in group if pair.draws is not None), None) for _, group in self._firsts]
        if not any(drawn):
            return runs
        parts = []
        for run, pair in zip(runs, drawn, strict=True):
            if pair is None or pair.draws is None:
                parts.append(run[None])
                continue
            of_pair = runs_of(pair.draws, pair.param.stride())
            parts.append(torch.cat((run[:1].expand(len(of_pair), 1), of_pair), dim=1))
        return torch.cat(parts)


def _row(pair: Pair) -> TensorRow:
    planes = tuple(plane.data_ptr() for plane in pair.planes)
    row = TensorRow(param=pair.param.data_ptr(), planes=(*planes, *(None,) * (2 - len(planes))), pace=pair.pace)
    if pair.format is None:
        row.numel, row.dtype, row.format = pair.param.nbytes, _BYTES, _COPIED
    else:
        row.numel, row.dtype, row.format = pair.param.numel(), _DTYPES[pair.param.dtype], _FORMATS[pair.format]
        row.key = pair.draws.key if pair.draws is not None else 0
    return row
