"""The CUDA source on a CPU: ``csrc/cuda`` compiled through ``tests/native/shim``, run under sanitizers, shown to fail.

It fails with each of the mutants below: copies of ``csrc`` with one bug in them. Nothing here needs a GPU or CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.native_build import (
    COMPILER,
    CSRC,
    NATIVE,
    SANITIZE,
    Finished,
    compile_object,
    execute,
    mutated_csrc,
    needs_compiler,
    run,
    two_at_a_time,
)

pytestmark = needs_compiler

#: Flags of the kernels. The plain ones take 2^31 elements: there a call for each fmaf would cost a minute.
VARIANTS = {"sanitized": ["-O1", *SANITIZE], "plain": ["-O2", "-march=native"]}
#: Of a mutant, which takes longer to compile than to die: half as long as at -O1.
MUTANT_FLAGS = ["-O0", *SANITIZE]
#: Names of kLarge in tests/native/large.h.
LARGE = ("float32", "exact", "one-chunk")

KERNELS, MOVERS, MEMORY, LAUNCH = "cuda/kernels.cuh", "cuda/movers.cuh", "cuda/memory.cuh", "cuda/launch.cu"


@dataclass(frozen=True)
class Mutant:
    """One bug: ``old`` becomes ``new`` where it first stands in ``file``."""

    name: str
    file: str
    old: str
    new: str
    large: str = ""  # the name of kLarge that shows it, where nothing smaller does


MUTANTS = (
    Mutant("param's alignment unseen", KERNELS, "is_aligned(at(param, head * Dtype::kBytes)) && is", "is"),
    Mutant("second's alignment unseen", KERNELS, "is_aligned(at(second, head * Format::kSecond))", "true"),
    Mutant("plain alignment unseen", KERNELS, "is_aligned(at(param, head * kBytes)) && ", ""),
    Mutant("tail one short", KERNELS, "numel - head - middle);", "numel - head - middle - 1);"),
    Mutant("tail one past the end", KERNELS, "numel - head - middle);", "numel - head - middle + 1);"),
    Mutant("head one short", KERNELS, "make(Narrow{}, int64_t{0}), head)", "make(Narrow{}, int64_t{0}), head - 1)"),
    Mutant("head counted in bytes", KERNELS, "& 15u) / kBytes;", "& 15u) / 1;"),
    Mutant("middle from the start", KERNELS, "make(Wide{}, head)", "make(Wide{}, int64_t{0})"),
    Mutant("tile past the end", KERNELS, "index + (Mover::kUnroll - 1) * kThreads < num_groups", "index < num_groups"),
    Mutant("tiles overlap", KERNELS, "index += Mover::kUnroll * kThreads", "index += kThreads"),
    Mutant("32-bit bytes", KERNELS, "Pointer base, int64_t nbytes", "Pointer base, int32_t nbytes"),
    Mutant("32-bit offset", KERNELS, "int64_t numel, offset, tensor;", "int64_t numel, tensor; int32_t offset;"),
    Mutant("32-bit length", KERNELS, "run(int64_t numel,", "run(int32_t numel,", large="one-chunk"),
    Mutant("32-bit index", KERNELS, "int64_t index = thread", "int32_t index = (int32_t)thread", large="one-chunk"),
    Mutant("32-bit group", MEMORY, "const void* base, int64_t group", "const void* base, int32_t group", "one-chunk"),
    Mutant("first block counts", KERNELS, "if (last && !stop)", "if (blockIdx.x == 0 && !stop)"),
    Mutant("every block counts", KERNELS, "if (last && !stop)", "if (!stop)"),
    Mutant("counts by one", KERNELS, "n + advance", "n + 1"),
    Mutant("one launch counts", KERNELS, "+ 1) % gridDim.x == 0", "+ 1) == gridDim.x"),
    Mutant(
        "update waits for nobody",
        KERNELS,
        "__syncthreads();\n  if (stop) return;\n  const",
        "if (stop) return;\n  const",
    ),
    Mutant(
        "exchange waits for nobody", KERNELS, "__syncthreads();\n  if (stop) return;\n  for", "if (stop) return;\n  for"
    ),
    Mutant("chunks dropped", KERNELS, "i += gridDim.x)", "i += gridDim.x + 1)"),
    Mutant("last chunk dropped", KERNELS, "i < table.num_chunks;", "i + 1 < table.num_chunks;"),
    Mutant("negative count counts", KERNELS, "stop = n < 0 ||", "stop ="),
    Mutant("exhausted count counts", KERNELS, "n == INT64_MAX ||", ""),
    Mutant("skip_nonfinite ignored", KERNELS, "skip_nonfinite != 0 &&", "false &&"),
    Mutant("skips unasked", KERNELS, "skip_nonfinite != 0 &&", ""),
    Mutant(
        "weight rounded twice",
        KERNELS,
        "make_step(rule_weight(rule, stop ? 0 : n))",
        "make_step(1.0 - static_cast<float>(1.0 - rule_weight(rule, n)))",
    ),
    Mutant("exchanged again", KERNELS, "stop = read_word(&table.state->exchanged) == wanted;", "stop = false;"),
    Mutant(
        "first block has exchanged",
        KERNELS,
        "if (is_last_to_begin(table.state)) write",
        "is_last_to_begin(table.state); write",
    ),
    Mutant("last nonfinite tensor wins", KERNELS, "table.num_tensors - run.tensor", "run.tensor + 1"),
    Mutant("a bf16 infinity is finite", MOVERS, "kExponent = 0x7f80u", "kExponent = 0x7fffu"),
    Mutant("large halves are nonfinite", MOVERS, "kExponent = 0x7c00u", "kExponent = 0x7800u"),
    Mutant(
        "one plane in two",
        MOVERS,
        "store_average(new_second, second, index)",
        "store_average(new_second, first, index)",
    ),
    Mutant(
        "exchange one way", MOVERS, "store_param(group.average, param, index)", "store_param(group.param, param, index)"
    ),
    Mutant(
        "odd element lost",
        MEMORY,
        "i % 2 == 0 ? bits : words[i / 2] | (bits << 16)",
        "i % 2 == 0 ? bits : words[i / 2]",
    ),
    Mutant("odd element unread", MEMORY, "(i % 2 * 16)", "0"),
    Mutant("only the first vector", MEMORY, "__stcs(vectors + v,", "__stcs(vectors,"),
    Mutant("nothing does not count", LAUNCH, "blocks < 1 ? 1 : blocks", "blocks"),
    Mutant("idle blocks", LAUNCH, "table.num_chunks < table.num_blocks ? table.num_chunks :", ""),
    Mutant("device left behind", LAUNCH, "if (changed_) (void)cudaSetDevice(before_);", ""),
    Mutant("error left behind", LAUNCH, "(void)cudaGetLastError();", ""),
    Mutant("another stream", LAUNCH, "config.stream = static_cast<cudaStream_t>(stream);", ""),
    Mutant("found before", LAUNCH, "0, sizeof table->state->nonfinite", "0, 0"),
    Mutant("capture unseen", LAUNCH, "*capturing = capture != cudaStreamCaptureStatusNone;", "*capturing = 0;"),
)


@dataclass(frozen=True)
class Kit:
    """The compiled test, from which programs are linked, and the programs with nothing spoiled."""

    folder: Path
    tests: dict[str, Path]  # variant -> object
    programs: dict[str, Path]


def build(test: Path, csrc: Path, variant: str, folder: Path, flags: list[str]) -> Path:
    kernels = compile_object(csrc / "cuda" / "launch.cu", folder / f"launch-{variant}.o", flags, csrc)
    program = folder / variant
    runtime = SANITIZE if variant == "sanitized" else []
    run([*COMPILER, *runtime, str(test), str(kernels), "-o", str(program), "-pthread"])
    return program


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with two_at_a_time() as pool:
        yield pool


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory, pool: ThreadPoolExecutor) -> Kit:
    folder = tmp_path_factory.mktemp("kit")
    # The test program itself is not instrumented, which halves the time; it still marks its buffers' surroundings.
    flags = {"sanitized": ["-O2", "-DSWAFAST_TEST_ASAN=1"], "plain": ["-O2"]}
    source = NATIVE / "cuda_test.cpp"
    made = {v: pool.submit(compile_object, source, folder / f"test-{v}.o", own) for v, own in flags.items()}
    tests = {variant: future.result() for variant, future in made.items()}
    linked = {v: pool.submit(build, tests[v], CSRC, v, folder, own) for v, own in VARIANTS.items()}
    return Kit(folder, tests, {variant: future.result() for variant, future in linked.items()})


@pytest.fixture(scope="module")
def healthy(kit: Kit, pool: ThreadPoolExecutor) -> dict[str, Future[Finished]]:
    """What each program says when nothing is spoiled."""
    return {variant: pool.submit(execute, program) for variant, program in kit.programs.items()}


@pytest.fixture(scope="module")
def large(kit: Kit, healthy: object, pool: ThreadPoolExecutor) -> dict[str, Future[Finished]]:
    return {name: pool.submit(execute, kit.programs["plain"], "--large", name) for name in LARGE}


@pytest.fixture(scope="module")
def mutants(kit: Kit, large: object, pool: ThreadPoolExecutor) -> dict[str, Future[Finished]]:
    """All of them under way, two at a time: alone each would wait for its compiler."""
    return {mutant.name: pool.submit(run_mutant, kit, mutant) for mutant in MUTANTS}


def run_mutant(kit: Kit, mutant: Mutant) -> Finished:
    folder = kit.folder / mutant.name.replace(" ", "-")
    csrc = mutated_csrc(folder, mutant.file, mutant.old, mutant.new)
    variant = "plain" if mutant.large else "sanitized"
    flags = VARIANTS["plain"] if mutant.large else MUTANT_FLAGS
    program = build(kit.tests[variant], csrc, variant, folder, flags)
    return execute(program, *(("--large", mutant.large) if mutant.large else ()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_pass(healthy: dict[str, Future[Finished]], variant: str) -> None:
    done = healthy[variant].result()
    assert done.returncode == 0, done.stderr
    assert "every check passed: CUDA" in done.stdout


@pytest.mark.parametrize("name", LARGE)
def test_more_elements_than_32_bits_count(large: dict[str, Future[Finished]], name: str) -> None:
    done = large[name].result()
    assert done.returncode == 0, done.stderr
    assert f"every check passed: {name}" in done.stdout


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_killed(mutants: dict[str, Future[Finished]], mutant: Mutant) -> None:
    done = mutants[mutant.name].result()
    print(done.returncode, done.stderr)  # how it died, for `pytest -rP`
    assert done.returncode not in (0, 2), f"{mutant.name} lives: {done.stdout}{done.stderr}"
