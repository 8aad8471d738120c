"""What the tests of the C++ and CUDA sources share: compiler and flags, bugs to plant, and programs to run."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
NATIVE = ROOT / "tests" / "native"
#: Its cuda_runtime.h lets a host compiler build the CUDA source, and a CPU run it.
SHIM = NATIVE / "shim"
#: The command that starts it, or nothing.
COMPILER = shlex.split(os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), ""))

needs_compiler = pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")

FLAGS = ["-std=c++17", "-ffp-contract=off", "-fno-math-errno"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
#: The flags that CMakeLists.txt gives each file of csrc/cpu.
UNITS: dict[str, list[str]] = {"launch": [], "generic": [], "avx2": [], "avx512": []}
if platform.machine() in ("x86_64", "AMD64"):
    UNITS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    UNITS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]

Finished = subprocess.CompletedProcess[str]


def run(command: Sequence[str]) -> Finished:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    return done


def compile_object(source: Path, out: Path, flags: Sequence[str], csrc: Path = CSRC) -> Path:
    """Compile a C++ file, or a CUDA one through the shim."""
    shim = ["-I", str(SHIM)]
    language = ["-x", "c++"] if source.suffix == ".cu" else []
    run([*COMPILER, *FLAGS, *flags, *shim, "-I", str(csrc), "-c", *language, str(source), "-o", str(out)])
    return out


def openmp_flags(folder: Path) -> list[str]:
    """Give the compiler's flag for OpenMP, where it has that."""
    source = folder / "openmp.cpp"
    source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    command = [*COMPILER, "-fopenmp", str(source), "-o", str(folder / "openmp")]
    return ["-fopenmp"] if subprocess.run(command, capture_output=True, timeout=300).returncode == 0 else []


def mutated_csrc(folder: Path, file: str, old: str, new: str) -> Path:
    """Copy ``csrc`` into ``folder`` and let ``old`` become ``new`` where it first stands in ``file``."""
    csrc = Path(shutil.copytree(CSRC, folder / "csrc"))
    text = (csrc / file).read_text()
    assert old in text, f"{file} has no {old!r} any more: plant this bug another way"
    (csrc / file).write_text(text.replace(old, new, 1))
    return csrc


def execute(program: Path, *arguments: str) -> Finished:
    # The library keeps no memory of its own, and the leak checker does not run under every debugger and container.
    # A waiting OpenMP thread that spins takes the time of the one it waits for, where cores are shared.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "OMP_WAIT_POLICY": "passive"}
    env = {**os.environ, **options}
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=240, env=env)


@contextmanager
def two_at_a_time() -> Iterator[ThreadPoolExecutor]:
    """Compilers are waited for two at a time; what is still to come is dropped when a test fails."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)
