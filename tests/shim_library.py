"""The whole native library, with the CUDA source compiled for the CPU: its kernels run on host memory.

``SWAFAST_LIBRARY`` names it to the package. ``tests/native/shim/cuda_runtime.h`` says what a test may set in it, by
``ctypes.c_int.in_dll(library, "shim_capturing")`` and the like.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.native_build import COMPILER, CSRC, UNITS, compile_object, openmp_flags, run, two_at_a_time


def build_shim_library(folder: Path, more: Mapping[Path, Sequence[str]] | None = None) -> Path:
    """Build it in ``folder``, with more sources and their own flags, in some seconds. Needs a C++ compiler."""
    openmp = openmp_flags(folder)
    flags = ["-O2", "-fPIC", "-fvisibility=hidden", "-DSWAFAST_CUDA=1", '-DSWAFAST_CUDA_ARCHITECTURES="shim"', *openmp]
    sources = {CSRC / "cpu" / f"{unit}.cpp": [*flags, *own] for unit, own in UNITS.items()}
    sources[CSRC / "cuda" / "launch.cu"] = flags
    sources |= {source: [*flags, *own] for source, own in (more or {}).items()}
    with two_at_a_time() as pool:
        made = [
            pool.submit(compile_object, source, folder / f"{source.parent.name}-{source.stem}.o", own)
            for source, own in sources.items()
        ]
        objects = [str(future.result()) for future in made]
    library = folder / "libswafast.so"
    run([*COMPILER, "-shared", *openmp, *objects, "-o", str(library), "-pthread"])
    return library
