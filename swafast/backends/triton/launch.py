"""The ``triton`` backend: kernels in Triton (``kernels.py``), compiled at first use.

With ``TRITON_INTERPRET=1`` in the environment, Triton's interpreter runs the same kernels on CPU tensors, slowly.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import inspect
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...terms.capturing import allowed_to_wait
from ...terms.samples import Sample
from .. import Unavailable, library
from ..contract import Pair
from ..gpu import DeviceLaunch, Table, warn_unusable
from ..rows import kernels_serve

name = "triton"
#: The interpreter serves CPU tensors, and only where this backend was asked for by name.
device_types = frozenset({"cuda"})
exchanges = True

#: Programs of 256 threads at 64 registers each: as many as a multiprocessor of any current GPU holds.
_PROGRAMS_PER_MULTIPROCESSOR = 4
_PROGRAM_THREADS = 256
#: So few that chunks outnumber them in a test.
_INTERPRETED_PROGRAMS = 3
_PACE_WORDS = ctypes.sizeof(library.Pace) // 8
#: The kernels by name, each ``<name>_kernel``, which states its own arguments: a launch passes them by theirs.
KERNELS = ("pace", "update", "exchange", "nonfinite", "forget_nonfinite")
#: Those of pairs with a spread, beside them: nobody else waits for their compilation.
SPREAD_KERNELS = ("spread", "draw")


@functools.cache
def is_interpreted() -> bool:
    """Return whether Triton interprets. These are the values that Triton reads as yes."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def unavailable() -> Unavailable | None:
    if importlib.util.find_spec("triton") is None:
        return Unavailable("Triton is not installed", expected=True)
    if not is_interpreted() and not torch.cuda.is_available():
        return Unavailable("torch finds no CUDA device", expected=True)
    kernels = _load()
    return kernels if isinstance(kernels, Unavailable) else None


@functools.cache
def _load() -> ModuleType | Unavailable:
    """Return the module of the kernels, or why it does not load. This imports Triton."""
    try:
        from . import kernels
    except Exception as error:  # whatever a broken install, or an environment variable of Triton's, may raise
        return Unavailable(f"Triton is installed and did not load: {type(error).__name__}: {error}")
    if kernels.interpreted != {is_interpreted()}:
        return Unavailable("TRITON_INTERPRET was changed after Triton was imported or first asked for")
    return kernels


def _kernels() -> ModuleType:
    """Return the module of the kernels, for a caller that knows that it loads."""
    kernels = _load()
    if isinstance(kernels, Unavailable):
        raise RuntimeError(f"the triton backend is not available: {kernels.reason}")
    return kernels


def describe() -> str:
    """Describe Triton in one line: its version, and programs on each device."""
    version = _kernels().VERSION
    if is_interpreted():
        return f"Triton {version}, interpreted on CPU tensors"
    devices = range(torch.cuda.device_count())
    programs = "; ".join(f"device {i}: {_num_programs(i)}" for i in devices)
    return f"Triton {version} (programs on {programs})"


@functools.cache
def _num_programs(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count * _PROGRAMS_PER_MULTIPROCESSOR


def serves(pair: Pair) -> bool:
    if is_interpreted():
        # The interpreter follows the addresses in the tables by itself, so they must be the host's.
        return kernels_serve(pair, {"cpu"})
    if not kernels_serve(pair, device_types):
        return False
    device = pair.param.device
    return _is_usable(device) and (not pair.spread_planes or _is_usable(device, SPREAD_KERNELS))


def _is_usable(device: torch.device, names: tuple[str, ...] = KERNELS) -> bool:
    """Return whether every one of these kernels is compiled and loaded on the device. Warn if that has failed."""
    try:
        failure = _load_kernels(device, names)
    except RuntimeError as error:
        failure = _described(error)
    if failure is not None:
        warn_unusable("Triton", str(device), failure)
    return failure is None


@functools.cache
def _load_kernels(device: torch.device, names: tuple[str, ...]) -> str | None:
    """Compile every one of these kernels and load it on the device, by launches without chunks; return what has failed.

    A capture allows neither. If there is no compiler, this finds out before the first update. Such a failure is
    permanent, and is not tried again: it may take seconds.

    Raises:
        RuntimeError: the GPU's memory is full, or something is capturing. The next plan tries again.
    """
    try:
        kernels, options = _kernels(), launch_options("hip" if torch.version.hip else "cuda")
        with _on_device(device), allowed_to_wait():
            words = torch.zeros(16, dtype=torch.int64, device=device)
            state, paces = words.data_ptr(), words[-_PACE_WORDS:].data_ptr()
            addresses = {"descriptors": state, "state": state, "paces": paces}
            for name in names:
                kernel = getattr(kernels, f"{name}_kernel")
                arguments = {word: addresses.get(word, 0) for word in inspect.signature(kernel.fn).parameters}
                kernel[(1,)](**arguments, **options)
            torch.cuda.current_stream(device).synchronize()
    except Exception as error:  # whatever a compiler, a cache folder or a driver may raise
        if isinstance(error, RuntimeError) and any(words in str(error) for words in ("out of memory", "captur")):
            raise
        return _described(error)
    return None


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def launch_options(target: str) -> Mapping[str, Any]:
    """Return the compiler's options for ``"cuda"`` or ``"hip"``: 256 threads, and no fused operations of its own."""
    # A loop's iterations are not overlapped: the loads of one tile fill the registers.
    options = {"num_stages": 1, "enable_fp_fusion": False}
    if target == "hip":
        return {**options, "num_warps": 4}  # of 64 threads
    return {**options, "num_warps": 8, "maxnreg": 64}


def _on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the current one: Triton launches there, on its current stream."""
    if device.type == "cpu":
        import numpy as np  # the interpreter computes with it, and a NaN is no reason to warn

        return np.errstate(all="ignore")
    if device.index in (None, torch.cuda.current_device()):
        return contextlib.nullcontext()
    return torch.cuda.device(device)


class _Paces:
    """The paces of a table's updates, in its device's memory, written there when a rule or a counter changes.

    A kernel writes them: nothing waits for a copy from the host. Other paces get other words, since a launch of another
    thread, or a graph, may be about to read those that are there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        #: The last paces with their words, and the stream of these. One assignment publishes all three.
        self._made: tuple[object, Tensor | None, int] = (None, None, 0)
        self._captured: list[Tensor] = []  # graphs read them

    def get(
        self, paces: ctypes.Array[library.Pace], capturing: bool, stream: int, write: Callable[..., None]
    ) -> Tensor:
        """Return the words of ``paces``, as a pace cache gives them: the same object for what is the same.

        ``write(their address, index of a pace, *its words)`` starts the kernel that writes them.
        """
        made, words, of = self._made
        if words is None or paces is not made:
            with torch.inference_mode(False):
                words = torch.empty(library.MAX_PACES * _PACE_WORDS, dtype=torch.int64, device=self._device)
            for index, pace in enumerate(paces):
                write(words.data_ptr(), index, *struct.unpack(f"<{_PACE_WORDS}q", pace))
            if not capturing:  # else they are there once the graph has run, and so for the graph alone
                self._made = paces, words, stream
        elif stream != of and self._device.type == "cuda":
            words.record_stream(torch.cuda.current_stream(self._device))  # as the table's own words
        if capturing:
            self._captured.append(words)
        return words


class TritonLaunch(DeviceLaunch):
    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._kernels = _kernels()
        self._options = launch_options("hip" if torch.version.hip else "cuda")
        super().__init__(pairs)
        self._paces = {table.device: _Paces(table.device) for table in self._tables}

    def num_blocks(self, device: torch.device, num_threads: int) -> int:
        if device.type == "cpu":
            programs = _INTERPRETED_PROGRAMS
        else:
            programs = _num_programs(device.index if device.index is not None else torch.cuda.current_device())
        return max(1, programs * _PROGRAM_THREADS // num_threads)

    def start_update(
        self, table: Table, paces: ctypes.Array[library.Pace], advance: int, skip_nonfinite: bool, stream: int
    ) -> None:
        with _on_device(table.device):
            capturing = table.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            self.captured |= capturing
            words = self._paces[table.device].get(paces, capturing, stream, self._write_pace)
            pace = {"paces": words.data_ptr(), "num_paces": len(paces), "advance": advance}
            kernel, state = "spread" if len(table.rings) else "update", table.head.state
            self._start(kernel, table, state=state, **pace, skip_nonfinite=int(skip_nonfinite))

    def _write_pace(self, *arguments: int) -> None:
        self._kernels.pace_kernel[(1,)](*arguments, **self._options)

    def start_exchange(self, table: Table, wanted: bool, stream: int) -> None:
        with _on_device(table.device):
            self._start("exchange", table, state=table.head.state, wanted=int(wanted))

    def start_draw(self, table: Table, sample: Sample, coefficients: Tensor, stream: int) -> None:
        (noise,) = struct.unpack("<i", struct.pack("<f", sample.noise))
        point = {"coefficients": coefficients.data_ptr(), "num_columns": len(coefficients), "sample": sample.index}
        with _on_device(table.device):
            self._start("draw", table, **point, noise=noise)

    def start_first_nonfinite(self, table: Table, stream: int) -> None:
        with _on_device(table.device):
            self._kernels.forget_nonfinite_kernel[(1,)](state=table.head.state, **self._options)
            self._start("nonfinite", table, state=table.head.state, num_tensors=table.head.num_tensors)

    def _start(self, kernel: str, table: Table, **arguments: int) -> None:
        head, grid = table.head, self.grid(table)
        # A wider block is as many programs: a kernel of wider ones would be another compilation. A launch without
        # chunks still counts.
        most = grid.num_blocks * grid.num_threads // _PROGRAM_THREADS
        programs = max(1, min(head.num_chunks, most))
        words = {"descriptors": head.descriptors, "num_chunks": head.num_chunks}
        getattr(self._kernels, f"{kernel}_kernel")[(programs,)](**words, **arguments, **self._options)


prepare = TritonLaunch
