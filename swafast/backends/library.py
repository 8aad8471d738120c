"""The native library: where it is, and its C interface (``csrc/swafast.h``) by ctypes.

It needs neither torch's headers nor Python's, so one file serves every version of both. It loads at first use. This
module imports no torch: files are averaged without it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import Unavailable

#: Changes with any structure, function or rule of csrc/swafast.h.
_ABI = 10

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


class SamplePoint(ctypes.Structure):
    """A point near an average: ``swafast_sample``."""

    _fields_ = (
        ("coefficients", ctypes.c_void_p),
        ("num_columns", ctypes.c_int32),
        ("index", ctypes.c_uint32),
        ("noise", ctypes.c_float),
    )


class TableHead(ctypes.Structure):
    """One launch's tables on a GPU: ``swafast_table``."""

    _fields_ = (
        ("descriptors", ctypes.c_void_p),
        ("num_chunks", ctypes.c_int64),
        ("num_tensors", ctypes.c_int64),
        ("state", ctypes.c_void_p),
        ("device", ctypes.c_int64),
    )


class LaunchGrid(ctypes.Structure):
    """The blocks of one launch: ``swafast_grid``."""

    _fields_ = (("num_blocks", ctypes.c_int32), ("num_threads", ctypes.c_int32))


class BoxWords(ctypes.Structure):
    """The words of a box of a tensor: ``swafast_box``."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("word_size", ctypes.c_int64),
        ("ndim", ctypes.c_int64),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("index_strides", ctypes.POINTER(ctypes.c_int64)),
        ("first_index", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Signature:
    """The arguments and the result of one function of the C interface."""

    arguments: dict[str, Any] = field(default_factory=dict)
    result: Any = ctypes.c_int32  # a status, of the enum in csrc/swafast.h


# Pointers go as plain integers: converting them to pointer objects costs more than the call.
_ADDRESS, _I64, _I32, _F64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double
_TEXT, _OUT64, _OUT32 = ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_int32)
_TABLE = {"tensors": _ADDRESS, "num_tensors": _I64, "chunks": _ADDRESS, "num_chunks": _I64}
_PACES = {"paces": ctypes.POINTER(Pace), "num_paces": _I64, "advance": _I64}
_SAMPLE = {"sample": ctypes.POINTER(SamplePoint)}
_HEAD, _GRID = {"table": ctypes.POINTER(TableHead)}, {"grid": ctypes.POINTER(LaunchGrid)}
#: The functions of csrc/swafast.h that Python calls; those of CUDA are missing from a library built without it.
FUNCTIONS = {
    "swafast_build": Signature(result=_TEXT),
    "swafast_check": Signature({"tensors": _ADDRESS, "num_tensors": _I64, "exchange": _I32}),
    "swafast_weight": Signature({"rule": ctypes.POINTER(KernelRule), "num_averaged": _I64}, ctypes.c_double),
    "swafast_cpu_isa": Signature(result=_TEXT),
    "swafast_cpu_use_isa": Signature({"name": _TEXT}),
    "swafast_cpu_update": Signature({**_TABLE, **_PACES, "num_threads": _I32}),
    "swafast_cpu_draw": Signature({**_TABLE, **_SAMPLE, "num_threads": _I32}),
    "swafast_cpu_want_large_pages": Signature({"start": _ADDRESS, "nbytes": _I64}, None),
    "swafast_cpu_exchange": Signature({**_TABLE, "num_threads": _I32, "wanted": _I64, "exchanged": _OUT64}),
    "swafast_cpu_first_nonfinite": Signature({**_TABLE, "num_threads": _I32, "tensor": _OUT64}),
    "swafast_cpu_checksum": Signature({"box": ctypes.POINTER(BoxWords), "num_threads": _I32, "sum": _OUT64}),
    "swafast_cpu_accumulate": Signature(
        {"sums": _ADDRESS, "elements": _ADDRESS, "numel": _I64, "element": _I32, "coefficient": _F64, "begin": _I32}
    ),
    "swafast_cpu_finish": Signature(
        {"sums": _ADDRESS, "out": _ADDRESS, "numel": _I64, "element": _I32, "divisor": _F64, "nonfinite": _OUT64}
    ),
    "swafast_cuda_build": Signature(result=_TEXT),
    "swafast_cuda_error": Signature(result=_TEXT),
    "swafast_cuda_blocks": Signature({"device": _I32, "num_threads": _I32, "num_blocks": _OUT32}),
    "swafast_cuda_update": Signature(
        {
            **_HEAD,
            **_PACES,
            "skip_nonfinite": _I32,
            "has_spread": _I32,
            **_GRID,
            "capturing": _OUT32,
            "stream": _ADDRESS,
        }
    ),
    "swafast_cuda_draw": Signature({**_HEAD, **_SAMPLE, **_GRID, "stream": _ADDRESS}),
    "swafast_cuda_exchange": Signature({**_HEAD, "wanted": _I64, **_GRID, "stream": _ADDRESS}),
    "swafast_cuda_first_nonfinite": Signature({**_HEAD, **_GRID, "stream": _ADDRESS}),
}


def _candidates() -> list[Path]:
    """Return the paths where the library may be, likeliest first.

    Run from a clone, the folder ``swafast/`` hides the installed package, which is the one with the library.
    """
    named = os.environ.get("SWAFAST_LIBRARY")
    if named:
        return [Path(named).absolute()]
    paths = [Path(__file__).parents[1] / "lib" / "libswafast.so"]
    try:
        installed = importlib.metadata.distribution("swafast").locate_file("swafast/lib/libswafast.so")
        paths.append(Path(str(installed)))
    except importlib.metadata.PackageNotFoundError:
        pass
    return paths


def path() -> Path:
    """Return where the library is, or the likeliest place if it is nowhere."""
    paths = _candidates()
    return next((each for each in paths if each.is_file()), paths[0])


@functools.cache
def load() -> ctypes.CDLL | Unavailable:
    """Return the library, or why it did not load."""
    found = _load()
    is_named = isinstance(found, Unavailable) and bool(os.environ.get("SWAFAST_LIBRARY"))
    return Unavailable(f"SWAFAST_LIBRARY: {found}", named=True) if is_named else found


def _load() -> ctypes.CDLL | Unavailable:
    paths = _candidates()
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        for candidate in paths:
            reason = candidate.parent / "not_built.txt"
            if reason.is_file():
                return Unavailable(reason.read_text().strip())
        return Unavailable(f"no native library at {' or '.join(map(str, paths))}: install swafast again")
    missing = _missing_bytes(path)
    if missing:  # a process that reads there is killed
        return Unavailable(f"{path} is cut short, its last {missing} bytes are missing: install it again")
    try:
        library = ctypes.CDLL(str(path))
        library.swafast_abi.restype = ctypes.c_int32
        abi = library.swafast_abi()
        if abi != _ABI:
            return Unavailable(f"{path} has interface {abi}, this swafast needs {_ABI}: install it again")
        _declare(library, cuda=False)
        if has_cuda(library):
            _declare(library, cuda=True)
    except (OSError, AttributeError) as error:
        return Unavailable(f"{path} did not load: {error}")
    return library


def _missing_bytes(path: Path) -> int:
    """Return how much shorter an ELF file is than its header says; 0 for a whole file, and for one that is no ELF."""
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian
        return 0  # the loader refuses it without harm
    start, size, count = struct.unpack_from("<Q", head, 40)[0], *struct.unpack_from("<HH", head, 58)
    return max(0, start + size * count - path.stat().st_size)  # the section headers stand at the end


def loaded() -> ctypes.CDLL:
    """Return the library, which a caller knows to be there."""
    library = load()
    if isinstance(library, Unavailable):
        raise RuntimeError(f"the native library is not available: {library.reason}")
    return library


def has_cuda(library: ctypes.CDLL) -> bool:
    """Return whether the library was built with a CUDA compiler."""
    return hasattr(library, "swafast_cuda_update")


def _declare(library: ctypes.CDLL, *, cuda: bool) -> None:
    for name, signature in FUNCTIONS.items():
        if name.startswith("swafast_cuda_") == cuda:
            declared = getattr(library, name)
            declared.restype, declared.argtypes = signature.result, tuple(signature.arguments.values())
