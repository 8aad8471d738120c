"""The PTX that nvcc and Triton make of the kernels, in libraries that run it on a CPU."""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.native_build import COMPILER, CSRC, built_once, compile_object, run
from tests.planting import Plant, read_plants
from tests.ptx.read import read_kernels
from tests.ptx.translate import translate
from tests.shim_library import build_shim_library
from tests.test_machine_code import NVCC, compile_ptx

#: g++ takes 5 s for 15,000 instructions with these, and half of that with -O0, where the tests take longer.
FLAGS = ("-O1", "-w", "-fwrapv")


def nvcc_library(folder: Path, bugs: Sequence[Plant] = ()) -> Path:
    """Build the native library with the CUDA kernels as nvcc's PTX has them, and the host code as its source has it.

    ``shim_bug`` in it switches one of the bugs on, 1 being the first.
    """
    ptx = compile_ptx(CSRC, folder / "launch.ptx")
    source = folder / "launch_ptx.cpp"
    source.write_text(translate(read_kernels(ptx), has_source=True, edits=[edits_of(bug, ptx) for bug in bugs]))
    return build_shim_library(folder, {source: FLAGS})


def triton_library(folder: Path, bugs: Sequence[Plant] = ()) -> Path:
    """Build a library of the Triton kernels as Triton's PTX has them, with bugs as in :func:`nvcc_library`."""
    from tests.test_triton_code import KERNELS, Variant, compile_variants  # needs Triton

    code = compile_variants(folder, {"triton": Variant(KERNELS)})["triton"]
    # One text, so that a line has one number: the numbers of a file's lines begin where those before it end.
    ptx = "\n".join(code[kernel].ptx for kernel in KERNELS)
    shared = max(code[kernel].shared for kernel in KERNELS)
    return build_translated(folder, "triton", ptx, shared, [edits_of(bug, ptx) for bug in bugs])


def build_translated(
    folder: Path, name: str, ptx: str, extern_nbytes: int = 0, edits: Sequence[Mapping[int, str]] = ()
) -> Path:
    """Build a library of the kernels in a text, for ``shim_launch`` of ``tests/native/shim/ptx.h``."""
    source, library = folder / f"{name}.cpp", folder / f"lib{name}_ptx.so"
    source.write_text(translate(read_kernels(ptx, extern_nbytes), has_source=False, edits=edits))
    compiled = compile_object(source, folder / f"{name}.o", [*FLAGS, "-fPIC", "-fvisibility=hidden"])
    run([*COMPILER, "-shared", str(compiled), "-o", str(library)])
    return library


BUILDS = {"cuda": nvcc_library, "triton": triton_library}
_NEEDS = {
    "cuda": [(NVCC is not None, "nvcc")],
    "triton": [(importlib.util.find_spec("triton") is not None, "Triton")],
}


def edits_of(bug: Plant, ptx: str) -> dict[int, str]:
    """Return what a bug makes of the lines that have its pattern, in the kernels that its scope names.

    With a number after the name, as in ``update_kernel 2``, it is the second of these lines alone.
    """
    name, _, turn = bug.scope.partition(" ")
    kernel, edits = "", {}
    for number, line in enumerate(ptx.splitlines(), 1):
        if ".entry" in line:
            kernel = line
        changed = bug.apply_everywhere(line) if name in kernel else line
        if changed != line:
            edits[number] = changed
    if turn:
        edits = dict([*edits.items()][int(turn) - 1 : int(turn)])
    assert edits, f"{bug.name}: {bug.old!r} is not in the PTX of {bug.scope}: plant it another way"
    return edits


def build_once(backend: str, shared: Path) -> Path:
    """Build a backend's library, with the bugs of its table, below a folder that test processes share.

    The test is skipped where a compiler is not there.
    """
    for need, name in ((bool(COMPILER), "a C++ compiler"), *_NEEDS[backend]):
        if not need:
            pytest.skip(f"needs {name}")
    return built_once(shared / f"{backend}_ptx", lambda folder: BUILDS[backend](folder, read_plants(f"{backend}_ptx")))


class LaunchedKernel:
    """A kernel of a library of :func:`triton_library`, launched as Triton's own: ``kernel[programs](*arguments)``."""

    def __init__(self, library: ctypes.CDLL, name: str, source: Any) -> None:
        self._library, self._name = library, name
        self.fn = source.fn

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: int, **named: int) -> None:
            words_of = inspect.signature(self.fn)
            given = {name: value for name, value in named.items() if name in words_of.parameters}
            bound = words_of.bind(*arguments, **given).args
            words = (ctypes.c_longlong * len(bound))(*bound)
            status = self._library.shim_launch(self._name.encode(), *grid, words, len(bound))
            assert status == 0, f"the PTX of {self._name} does not have {len(bound)} params"

        return launch


def launched_kernels(loaded: ctypes.CDLL, kernels: ModuleType) -> Any:
    """Return what stands in the place of the module of the Triton kernels, and runs their PTX."""
    named = {name: value for name, value in vars(kernels).items() if name.endswith("_kernel")}
    launched = {name: LaunchedKernel(loaded, name, kernel) for name, kernel in named.items()}
    return SimpleNamespace(VERSION=kernels.VERSION, **launched)
