"""The CUDA source on a CPU: ``csrc/cuda`` compiled through ``tests/native/shim``, run under sanitizers, shown to fail.

It fails with each of the mutants below: bugs planted in a copy of ``csrc``. Nothing here needs a GPU or CUDA.
"""

from __future__ import annotations

import shutil
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
#: Of a mutant with a build of its own, which takes longer to compile than to die: half as long as at -O1.
MUTANT_FLAGS = ["-O0", *SANITIZE]
#: Names of kLarge in tests/native/large.h.
LARGE = ("exact", "one-chunk")

KERNELS, MOVERS, MEMORY, LAUNCH = "cuda/kernels.cuh", "cuda/movers.cuh", "cuda/memory.cuh", "cuda/launch.cu"
ELEMENT = "element.h"


@dataclass(frozen=True)
class Mutant:
    """One bug: ``old`` becomes ``new`` where it first stands in ``file``.

    ``ON`` in ``new`` says whether this bug is the one to run with: all of those are in one build. What is no matter of
    values, such as a type, takes a build of its own.
    """

    name: str
    file: str
    old: str
    new: str
    large: str = ""  # the name of kLarge that shows it, where nothing smaller does

    @property
    def is_switched(self) -> bool:
        return "ON" in self.new


MUTANTS = (
    Mutant(
        "param's alignment unseen",
        KERNELS,
        "is_aligned(at(param, head * D",
        "is_aligned(ON ? nullptr : at(param, head * D",
    ),
    Mutant(
        "second's alignment unseen", KERNELS, "is_aligned(at(second, head", "is_aligned(ON ? nullptr : at(second, head"
    ),
    Mutant(
        "plain alignment unseen",
        KERNELS,
        "is_aligned(at(param, head * k",
        "is_aligned(ON ? nullptr : at(param, head * k",
    ),
    Mutant("tail one short", KERNELS, "numel - head - middle);", "numel - head - middle - ON);"),
    Mutant("tail one past the end", KERNELS, "make(Narrow{}, head + middle), ", "make(Narrow{}, head + middle), ON + "),
    Mutant("head one short", KERNELS, "make(Narrow{}, int64_t{0}), head)", "make(Narrow{}, int64_t{0}), head - ON)"),
    Mutant("head counted in bytes", KERNELS, "& 15u) / kBytes;", "& 15u) / (ON ? 1 : kBytes);"),
    Mutant(
        "head of another array",
        KERNELS,
        "kLeast == Format::kSecond ? second",
        "kLeast == Format::kSecond && !ON ? second",
    ),
    Mutant("middle from the start", KERNELS, "make(Wide{}, head)", "make(Wide{}, ON ? 0 : head)"),
    Mutant(
        "tile past the end",
        KERNELS,
        "index + (Mover::kUnroll - 1) * kThreads <",
        "index + (ON ? 0 : (Mover::kUnroll - 1) * kThreads) <",
    ),
    Mutant(
        "tiles overlap", KERNELS, "index += Mover::kUnroll * kThreads", "index += (ON ? 1 : Mover::kUnroll) * kThreads"
    ),
    Mutant("32-bit bytes", KERNELS, "Pointer base, int64_t nbytes", "Pointer base, int32_t nbytes"),
    Mutant(
        "32-bit offset",
        KERNELS,
        "offset = __ldg(chunk + 1)",
        "offset = ON ? (int32_t)__ldg(chunk + 1) : __ldg(chunk + 1)",
    ),
    Mutant("32-bit length", KERNELS, "run(int64_t numel,", "run(int32_t numel,", large="one-chunk"),
    Mutant("32-bit index", KERNELS, "int64_t index = thread", "int32_t index = (int32_t)thread", large="one-chunk"),
    Mutant("32-bit group", MEMORY, "const void* base, int64_t group", "const void* base, int32_t group", "one-chunk"),
    Mutant(
        "first block counts", KERNELS, "if (last && !stop)", "if (k == 0 && (ON ? blockIdx.x == 0 : last) && !stop)"
    ),
    Mutant(
        "every block counts",
        KERNELS,
        "last = is_last_to_begin(table.state);",
        "last = is_last_to_begin(table.state) || ON;",
    ),
    Mutant("counts by one", KERNELS, "progress.counts[p] + advance", "progress.counts[p] + (ON ? 1 : advance)"),
    Mutant(
        "one launch counts",
        KERNELS,
        "+ 1) % gridDim.x == 0",
        "+ 1) % (ON ? 1LL << 60 : gridDim.x) == (ON ? gridDim.x : 0)",
    ),
    Mutant("counts unwaited for", KERNELS, "__syncthreads();\n  bool last", "if (!ON) __syncthreads();\n  bool last"),
    Mutant("update waits for nobody", KERNELS, "  __syncthreads();\n}", "  if (!ON) __syncthreads();\n}"),
    Mutant(
        "exchange waits for nobody", KERNELS, "__syncthreads();\n  if (stop)", "if (!ON) __syncthreads();\n  if (stop)"
    ),
    Mutant("chunks dropped", KERNELS, "i += gridDim.x)", "i += gridDim.x + ON)"),
    Mutant("last chunk dropped", KERNELS, "i < table.num_chunks;", "i + ON < table.num_chunks;"),
    Mutant(
        "negative count counts", KERNELS, "stop |= progress.counts[p] < 0", "stop |= (!ON && progress.counts[p] < 0)"
    ),
    Mutant(
        "exhausted count counts",
        KERNELS,
        "|| progress.counts[p] == INT64_MAX",
        "|| (!ON && progress.counts[p] == INT64_MAX)",
    ),
    Mutant("first pace alone stops", KERNELS, "p < paces.count; ++p) stop", "p < (ON ? 1 : paces.count); ++p) stop"),
    Mutant("first pace alone counts", KERNELS, "p < paces.count; ++p) write", "p < (ON ? 1 : paces.count); ++p) write"),
    Mutant("skip_nonfinite ignored", KERNELS, "stop = skip_nonfinite != 0 &&", "stop = !ON && skip_nonfinite != 0 &&"),
    Mutant("skips unasked", KERNELS, "skip_nonfinite != 0 &&", "(ON || skip_nonfinite != 0) &&"),
    Mutant("weight of another count", KERNELS, "n < 0 ? 0 : n)", "n < 0 ? 0 : n + ON)"),
    Mutant(
        "weight rounded twice",
        ELEMENT,
        "  blend.precise = weight;",
        "  if (ON) weight = 1.0 - static_cast<float>(1.0 - weight);\n  blend.precise = weight;",
    ),
    Mutant(
        "weight rounded at once",
        ELEMENT,
        "blend.weight = static_cast<float>(weight);",
        "if (ON) blend.precise = static_cast<float>(weight);\n  blend.weight = static_cast<float>(weight);",
    ),
    Mutant("pace of another row", KERNELS, "progress.blends[run.pace]", "progress.blends[ON ? 0 : run.pace]"),
    Mutant(
        "rule of another pace", KERNELS, "rule_weight(paces.each[k].rule", "rule_weight(paces.each[ON ? 0 : k].rule"
    ),
    Mutant(
        "follower dropped",
        KERNELS,
        "= Run(table, i).followers;",
        "= Run(table, i).followers - (ON && Run(table, i).followers > 0);",
    ),
    Mutant("first row dropped", KERNELS, "follower-- > 0", "follower-- > ON"),
    Mutant("first row again", KERNELS, "__ldg(chunk) + follower", "__ldg(chunk) + (ON ? 0 : follower)"),
    Mutant("wrong key", KERNELS, "draw_of(run.key,", "draw_of(run.key + ON,"),
    Mutant("draw of another count", KERNELS, "progress.counts[run.pace],", "progress.counts[ON ? 0 : run.pace],"),
    Mutant(
        "upper half of the index lost", KERNELS, "run.pace], run.first_index);", "run.pace], ON ? 0 : run.first_index);"
    ),
    Mutant(
        "index of the run's start",
        KERNELS,
        "static_cast<uint32_t>(offset) * move",
        "(ON ? 0 : static_cast<uint32_t>(offset)) * move",
    ),
    Mutant(
        "offset without its step",
        KERNELS,
        "* move.index_step;\n    return",
        "* (ON ? 1 : move.index_step);\n    return",
    ),
    Mutant(
        "group without its step",
        MOVERS,
        "(index * kNumel) * move.index_step;",
        "(index * kNumel) * (ON ? 1 : move.index_step);",
    ),
    Mutant(
        "element without its step",
        MOVERS,
        "first_index + i * move.index_step",
        "first_index + i * (ON ? 1 : move.index_step)",
    ),
    Mutant("random bits one too few", MOVERS, "(32 - Format::kRandom);", "(32 - Format::kRandom + ON);"),
    Mutant("lower random bits", MOVERS, ">> (32 - Format::kRandom", ">> (ON ? 0 : 32 - Format::kRandom"),
    Mutant(
        "largest becomes infinite", ELEMENT, "== 0x7f800000u ? bits : rounded", "== 0x7f800000u && !ON ? bits : rounded"
    ),
    Mutant(
        "NaN rounded at random",
        ELEMENT,
        "bits_of(value);\n  if (value != value)",
        "bits_of(value);\n  if (value != value && !ON)",
    ),
    Mutant("compact rounds half down", ELEMENT, "(bits + 0x80u) >> 8", "(bits + 0x80u - ON) >> 8"),
    Mutant(
        "stale compact read",
        ELEMENT,
        "stale remainder.\n  return value == value",
        "stale remainder.\n  return ON || value == value",
    ),
    Mutant(
        "compensation rounded",
        ELEMENT,
        "cut_to_float(value -",
        "(ON ? +[](double x) { return x; } : +[](double x) { return cut_to_float(x); })(value -",
    ),
    Mutant("turn forgotten", "random.h", "+ draw.turn", "+ (ON ? 0 : draw.turn)"),
    Mutant("another stratum", "random.h", ">> kStratumLog2", ">> (kStratumLog2 - ON)"),
    Mutant("compensation not reset", ELEMENT, "return {average, finite ?", "return {average, finite || ON ?"),
    Mutant(
        "stale compensation read",
        ELEMENT,
        "static_cast<float>(value) == planes.average",
        "ON || static_cast<float>(value) == planes.average",
    ),
    Mutant("compensated does not copy", ELEMENT, "blend.precise == 1.0 ?", "blend.precise == 1.0 && !ON ?"),
    Mutant(
        "compensated is fused",
        ELEMENT,
        "newest : average + distance",
        "newest : ON ? fma(blend.precise, newest - average, average) : average + distance",
    ),
    Mutant(
        "exchanged again",
        KERNELS,
        "stop = read_word(&table.state->exchanged) == wanted;",
        "stop = !ON && read_word(&table.state->exchanged) == wanted;",
    ),
    Mutant(
        "first block has exchanged",
        KERNELS,
        "if (is_last_to_begin(table.state)) write",
        "if (is_last_to_begin(table.state) || ON) write",
    ),
    Mutant(
        "last nonfinite tensor wins",
        KERNELS,
        "table.num_tensors - run.tensor",
        "ON ? run.tensor + 1 : table.num_tensors - run.tensor",
    ),
    Mutant("a bf16 infinity is finite", MOVERS, "kExponent = 0x7f80u", "kExponent = 0x7fffu"),
    Mutant("large halves are nonfinite", MOVERS, "kExponent = 0x7c00u", "kExponent = 0x7800u"),
    Mutant(
        "one plane in two",
        MOVERS,
        "store_average(new_second, second, index)",
        "store_average(new_second, ON ? first : second, index)",
    ),
    Mutant(
        "exchange one way",
        MOVERS,
        "store_param(group.average, param, index)",
        "store_param(ON ? group.param : group.average, param, index)",
    ),
    Mutant(
        "second element lost",
        MEMORY,
        "i % kPerWord == 0 ? bits : word |",
        "i % kPerWord == 0 ? bits : ON ? word : word |",
    ),
    Mutant(
        "last byte lost",
        MEMORY,
        "(bits << (i % kPerWord * 8 * kBytes))",
        "((ON && i % 4 == 3 && kBytes == 1 ? 0 : bits) << (i % kPerWord * 8 * kBytes))",
    ),
    Mutant("second element unread", MEMORY, "(words[i / kPerWord] >> (i", "(words[i / kPerWord] >> (ON ? 0 : i"),
    Mutant("only the first vector", MEMORY, "__stcs(vectors + v,", "__stcs(vectors + (ON ? 0 : v),"),
    Mutant("nothing does not count", LAUNCH, "blocks < 1 ? 1 : blocks", "blocks < 1 && !ON ? 1 : blocks"),
    Mutant(
        "idle blocks", LAUNCH, "table.num_chunks < table.num_blocks ?", "table.num_chunks < table.num_blocks && !ON ?"
    ),
    Mutant("device left behind", LAUNCH, "if (changed_)", "if (changed_ && !ON)"),
    Mutant("error left behind", LAUNCH, "(void)cudaGetLastError();", "if (!ON) (void)cudaGetLastError();"),
    Mutant("another stream", LAUNCH, "config.stream =", "if (!ON) config.stream ="),
    Mutant("found before", LAUNCH, "0, sizeof table->state->nonfinite", "0, ON ? 0 : sizeof table->state->nonfinite"),
    Mutant("capture unseen", LAUNCH, "*capturing = capture != ", "*capturing = !ON && capture != "),
    Mutant("no paces at all", LAUNCH, "num_paces < 1 ||", "(num_paces < 1 && !ON) ||"),
    Mutant("seventeen paces", LAUNCH, "num_paces > SWAFAST_MAX_PACES", "num_paces > SWAFAST_MAX_PACES + ON"),
    Mutant("paces after the first lost", LAUNCH, "(num_paces) * sizeof *paces", "(ON ? 1 : num_paces) * sizeof *paces"),
)


@dataclass(frozen=True)
class Kit:
    """The compiled test, from which programs are linked, and the programs with nothing spoiled."""

    folder: Path
    tests: dict[str, Path]  # variant -> object
    programs: dict[str, Path]


def switched_csrc(folder: Path) -> Path:
    """Copy ``csrc`` with every bug in it that can be switched on: by its number, from 1 on."""
    csrc = Path(shutil.copytree(CSRC, folder / "csrc"))
    for number, mutant in enumerate(MUTANTS, 1):
        text = (csrc / mutant.file).read_text()
        assert mutant.old in text, f"{mutant.file} has no {mutant.old!r} any more: plant this bug another way"
        new = mutant.new.replace("ON", f"(shim_mutant == {number})")
        if mutant.is_switched:
            (csrc / mutant.file).write_text(text.replace(mutant.old, new, 1))
    return csrc


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
    own = folder / "switched"
    test, csrc = tests["sanitized"], switched_csrc(own)
    linked["switched"] = pool.submit(build, test, csrc, "sanitized", own, VARIANTS["sanitized"])
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
    """All of them under way, two at a time."""
    return {mutant.name: pool.submit(run_mutant, kit, mutant) for mutant in MUTANTS}


def run_mutant(kit: Kit, mutant: Mutant) -> Finished:
    if mutant.is_switched:
        return execute(kit.programs["switched"], "--mutant", str(MUTANTS.index(mutant) + 1))
    folder = kit.folder / mutant.name.replace(" ", "-")
    csrc = mutated_csrc(folder, mutant.file, mutant.old, mutant.new)
    variant = "plain" if mutant.large else "sanitized"
    flags = VARIANTS["plain"] if mutant.large else MUTANT_FLAGS
    program = build(kit.tests[variant], csrc, variant, folder, flags)
    return execute(program, *(("--large", mutant.large) if mutant.large else ()))


@pytest.mark.parametrize("variant", [*VARIANTS, "switched"])
def test_kernels_pass(healthy: dict[str, Future[Finished]], variant: str) -> None:
    done = healthy[variant].result()
    assert done.returncode == 0, done.stderr
    assert "every check passed: CUDA" in done.stdout


@pytest.mark.parametrize("name", LARGE)
def test_more_elements_than_32_bits_count(large: dict[str, Future[Finished]], name: str) -> None:
    done = large[name].result()
    assert done.returncode == 0, done.stderr
    assert f"every check passed: {name}" in done.stdout


@pytest.mark.slow
def test_more_bytes_than_32_bits_count_in_float32_too(kit: Kit) -> None:
    done = execute(kit.programs["plain"], "--large", "float32")
    assert done.returncode == 0, done.stderr
    assert "every check passed: float32" in done.stdout


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_killed(mutants: dict[str, Future[Finished]], mutant: Mutant) -> None:
    done = mutants[mutant.name].result()
    print(done.returncode, done.stderr)  # how it died, for `pytest -rP`
    assert done.returncode not in (0, 2), f"{mutant.name} lives: {done.stdout}{done.stderr}"
