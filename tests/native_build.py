"""What the tests of the C++ and CUDA sources share: compiler and flags, and programs to run, with bugs or without."""

from __future__ import annotations

import fcntl
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.planting import Plant, read_sources, switch_on, write_sources

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
NATIVE = ROOT / "tests" / "native"
#: Of the files in csrc.
SUFFIXES = (".h", ".cuh", ".cpp", ".cu")
#: Its cuda_runtime.h lets a host compiler build the CUDA source, and a CPU run it.
SHIM = NATIVE / "shim"
#: Put before it, it has that run all blocks at once.
AT_ONCE = NATIVE / "at_once"
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
    out.parent.mkdir(parents=True, exist_ok=True)
    shim = ["-I", str(SHIM)]
    language = ["-x", "c++"] if source.suffix == ".cu" else []
    run([*COMPILER, *FLAGS, *flags, *shim, "-I", str(csrc), "-c", *language, str(source), "-o", str(out)])
    return out


def openmp_flags(folder: Path) -> list[str]:
    """Return the compiler's flag for OpenMP, where it has that."""
    source = folder / "openmp.cpp"
    source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    command = [*COMPILER, "-fopenmp", str(source), "-o", str(folder / "openmp")]
    return ["-fopenmp"] if subprocess.run(command, capture_output=True, timeout=300).returncode == 0 else []


def execute(program: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> Finished:
    # The library keeps no memory of its own, and the leak checker does not run under every debugger and container.
    # A waiting OpenMP thread that spins takes the time of the one it waits for, where cores are shared.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "OMP_WAIT_POLICY": "passive"}
    env = {**os.environ, **options, **environment}
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=240, env=env)


def built_once(folder: Path, build: Callable[[Path], Path]) -> Path:
    """Return what ``build`` makes in a folder that test processes share: the first builds, the others wait for it."""
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / "path.txt"
        if not path.exists():
            path.write_text(str(build(folder)))
        return Path(path.read_text())


@contextmanager
def two_at_a_time() -> Iterator[ThreadPoolExecutor]:
    """Wait for compilers two at a time; drop what is still to come when a test fails."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)


def said(done: Finished) -> str:
    return f"ended with {done.returncode}: {done.stdout}{done.stderr}"


class Kit:
    """A test program in its variants: "sanitized" and "plain", and each of them with all bugs, to be switched on.

    A build "switched sanitized" or "switched plain" has all bugs, and without a number none of them is on.
    """

    def __init__(
        self,
        folder: Path,
        pool: ThreadPoolExecutor,
        test: str,
        units: Mapping[str, Sequence[str]],  # path in csrc -> its own flags
        variants: Mapping[str, Sequence[str]],  # "sanitized" and "plain" -> flags of all units
        bugs: Sequence[Plant],
        switched: Sequence[str] = ("sanitized",),  # the variants that are built with bugs, too
        flags: Sequence[str] = (),  # of everything
        sources: Mapping[str, str] | None = None,  # what stands in csrc, where it is not as it is
    ) -> None:
        self._folder, self._pool, self._bugs, self._flags = folder, pool, bugs, flags
        healthy = CSRC if sources is None else write_sources(folder / "healthy", sources)
        spoiled = switch_on(sources or read_sources(CSRC, *SUFFIXES), bugs, "(planted_bug == {})")
        planted = write_sources(folder / "csrc", spoiled)
        self._test, self._units, self._variants = NATIVE / test, units, variants
        self._sources: dict[str, tuple[Path, list[str]]] = {variant: (healthy, []) for variant in variants}
        for variant in switched:
            self._sources[f"switched {variant}"] = (planted, ["-include", str(NATIVE / "planted.h")])
        self._tests: dict[str, Future[Path]] = {}
        self._programs: dict[str, Path] = {}

    def _program(self, build: str) -> Path:
        """Return a build's program, which is compiled when it is first asked for."""
        if build not in self._programs:
            variant, (csrc, more) = build.removeprefix("switched "), self._sources[build]
            # The test itself is not instrumented, which halves the time; it still marks its buffers' surroundings.
            own = {"sanitized": ["-O2", "-DSWAFAST_TEST_ASAN=1"], "plain": ["-O2"]}.get(variant, ["-O1"])
            if variant not in self._tests:
                out = self._folder / variant / "test.o"
                self._tests[variant] = self._pool.submit(compile_object, self._test, out, [*self._flags, *own])
            objects = [self._tests[variant]]
            for unit, of_unit in self._units.items():
                options = [*self._flags, *self._variants[variant], *more, *of_unit]
                out = self._folder / build / f"{unit}.o"
                objects.append(self._pool.submit(compile_object, csrc / unit, out, options, csrc))
            self._programs[build] = self._link(build, [it.result() for it in objects])
        return self._programs[build]

    def _link(self, build: str, objects: Sequence[Path]) -> Path:
        out = self._folder / build / "program"
        runtime = SANITIZE if build.endswith("sanitized") else []
        run([*COMPILER, *self._flags, *runtime, *map(str, objects), "-o", str(out), "-pthread"])
        return out

    def start(self, build: str, *arguments: str, **environment: str) -> Future[Finished]:
        return self._pool.submit(execute, self._program(build), arguments, environment)

    def start_bug(
        self, bug: Plant, *arguments: str, variant: str = "sanitized", **environment: str
    ) -> Future[Finished]:
        number = str(self._bugs.index(bug) + 1)
        return self.start(f"switched {variant}", "--bug", number, *arguments, **environment)
