"""The kernel test (``tests/native``): built with the host's compiler, run under sanitizers, and shown to fail.

It fails with each way of spoiling what the library is handed (``--plant``), and with each of the mutants below: copies
of ``csrc`` with one bug in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.native_build import (
    COMPILER,
    CSRC,
    NATIVE,
    SANITIZE,
    UNITS,
    Finished,
    compile_object,
    execute,
    mutated_csrc,
    needs_compiler,
    openmp_flags,
    run,
    two_at_a_time,
)

pytestmark = needs_compiler

#: The units that are of use to one instruction set alone.
ISAS = ("generic", "avx2", "avx512")

PLANTS = (
    *("long-chunk", "short-chunk", "dropped-chunk", "doubled-chunk", "wrong-dtype", "wrong-format"),
    *("shifted-plane", "swapped-planes", "stale-weight", "truncated-far", "shifted-index", "wrong-key"),
    *("wrong-first-index", "wrong-index-step", "dropped-follower", "another-pace"),
)


@dataclass(frozen=True)
class Mutant:
    """One bug: ``old`` becomes ``new`` where it first stands in ``file``, and ``unit`` is built from that."""

    name: str
    unit: str
    file: str
    old: str
    new: str
    openmp: bool = False  # whether only a build with OpenMP shows it


MUTANTS = (
    Mutant("tail stops short", "generic", "cpu/span.h", "for (; i < numel; ++i)", "for (; i + 1 < numel; ++i)"),
    Mutant("vectors overrun", "avx2", "cpu/span.h", "i + V::kLanes <= numel;", "i + V::kLanes <= numel + 1;"),
    Mutant("second vector twice", "avx512", "cpu/span.h", "param + i + V::kLanes)", "param + i)"),
    Mutant("rounds half down", "generic", "element.h", "bits + 0x8000u", "bits + 0x7fffu"),
    Mutant("half ties away", "generic", "element.h", "+ 0xfffu + odd)", "+ 0x1000u)"),
    Mutant("half overflows late", "generic", "element.h", "0x477ff000u", "0x48000000u"),
    Mutant(
        "not fused",
        "generic",
        "element.h",
        "fmaf(blend.factor, param - average,",
        "(blend.factor * (param - average) +",
    ),
    Mutant("far at one half", "launch", "element.h", "blend.weight < 0.5f", "blend.weight <= 0.5f"),
    Mutant("lerps at weight 1", "launch", "element.h", "blend.weight == 1.0f ? Blend::kCopy :", ""),
    Mutant("stale pair is NaN", "avx2", "cpu/avx2.cpp", "_mm256_castsi256_ps(high), stale)", "value, stale)"),
    Mutant("borrow forgotten", "avx2", "cpu/avx2.cpp", "_mm256_srai_epi16(low, 15)", "zero"),
    Mutant("packed rounds down", "avx512", "cpu/avx512.cpp", "_mm512_srli_epi16(low, 15)", "zero"),
    Mutant(
        "packed NaN unseen",
        "avx512",
        "cpu/avx512.cpp",
        "(value0, value1, _CMP_UNORD_Q)",
        "(value0, value0, _CMP_UNORD_Q)",
    ),
    Mutant(
        "packed NaN ends it",
        "avx2",
        "cpu/avx2.cpp",
        "i < 2 * kLanes; i += kLanes) {\n        const",
        "i < kLanes; i += kLanes) {\n        const",
    ),
    Mutant("NaN payload kept", "avx512", "cpu/avx512.cpp", "(bits, nan, sign", "(bits, 0, sign"),
    Mutant("written half unseen", "avx512", "cpu/avx512.cpp", "(average, written, half)", "(average, 0, half)"),
    Mutant("first chunk dropped", "launch", "cpu/launch.cpp", "++i) body(i)", "++i) if (i > 0) body(i)", openmp=True),
    Mutant("32-bit offset", "launch", "cpu/launch.cpp", "void* base, int64_t nbytes", "void* base, int32_t nbytes"),
    Mutant("last tensor unchecked", "launch", "table.h", "i < num_tensors; ++i", "i + 1 < num_tensors; ++i"),
    Mutant("counts by one", "launch", "cpu/launch.cpp", "num_averaged += advance", "num_averaged += 1"),
    Mutant("threads after fork", "launch", "cpu/launch.cpp", "in_forked_child.store(true);", "", openmp=True),
    Mutant("a bf16 infinity is finite", "generic", "cpu/span.h", "<uint16_t, 0x7f80u>", "<uint16_t, 0x7fffu>"),
    Mutant("first seen wins", "launch", "cpu/launch.cpp", "chunk.tensor >= first.load(", "num_tensors > first.load("),
    Mutant("last tensor is finite", "launch", "cpu/launch.cpp", "first{num_tensors}", "first{num_tensors - 1}"),
    Mutant("exchanged again", "launch", "cpu/launch.cpp", "if (*exchanged == wanted) return SWAFAST_OK;", ""),
    Mutant("32-bit index", "launch", "cpu/box.h", "uint64_t index_stride;", "uint32_t index_stride;"),
    Mutant("joined by memory alone", "launch", "cpu/box.h", "outer.index_stride == size", "size"),
    Mutant("carry forgotten", "launch", "cpu/box.h", "line.move(axes_[d], -axes_[d].size);", ""),
    Mutant("checksum tail dropped", "avx512", "cpu/span.h", "i < numel; ++i, start", "i + 1 < numel; ++i, start"),
    Mutant("another shift", "avx2", "checksum.h", "x >> 27", "x >> 26"),
    Mutant("last chunk alone counts", "launch", "cpu/launch.cpp", "total.fetch_add(partial", "total.store(partial"),
    # What element.h and random.h say of the further formats has its mutants in test_cuda_source.py.
    Mutant(
        "largest is infinite",
        "avx512",
        "cpu/avx512.cpp",
        "_mm512_cmpeq_epi32_mask(_mm512_and_si512(up",
        "0 & _mm512_cmpeq_epi32_mask(_mm512_and_si512(up",
    ),
    Mutant(
        "compensated infinity",
        "avx512",
        "cpu/avx512.cpp",
        "_mm256_mask_mov_ps(left_over, nonfinite, _mm256_setzero_ps())",
        "left_over",
    ),
    Mutant("random bits too few", "generic", "cpu/span.h", "(32 - Format::kRandomBits)", "(33 - Format::kRandomBits)"),
    Mutant(
        "lane without its step", "avx512", "cpu/avx512.cpp", "_mm512_mullo_epi32(lane, all(draws.index_step))", "lane"
    ),
    Mutant(
        "vector without its step",
        "avx2",
        "cpu/avx2.cpp",
        "static_cast<uint32_t>(i) * index_step",
        "static_cast<uint32_t>(i)",
    ),
    Mutant("wrong key", "launch", "cpu/launch.cpp", "draw_of(tensor.key,", "draw_of(tensor.key + 1,"),
    Mutant("draw of another count", "launch", "cpu/launch.cpp", "moves.counts[tensor.pace]", "moves.counts[0]"),
    Mutant("pace of another row", "launch", "cpu/launch.cpp", "moves.blends[tensor.pace]", "moves.blends[0]"),
    Mutant("follower dropped", "launch", "cpu/launch.cpp", "k <= tensor->followers", "k < tensor->followers || k == 0"),
    Mutant("first pace alone counts", "launch", "cpu/launch.cpp", "k < num_paces; ++k) *", "k < 1; ++k) *"),
    Mutant("negative pace", "launch", "table.h", "tensors[i].pace < 0 || ", ""),
    Mutant("negative followers", "launch", "table.h", "first.followers < 0 || ", ""),
    Mutant("exchange window", "generic", "cpu/span.h", "done += kWindow)", "done += 2 * kWindow)"),
)


@dataclass
class Kit:
    """The built objects of the library and of the test, with and without sanitizers, from which mutants are linked."""

    folder: Path
    openmp: list[str]
    objects: dict[str, dict[str, Path]] = field(default_factory=dict)  # variant -> unit -> object

    def compile_unit(self, csrc: Path, unit: str, variant: str, out: Path) -> Path:
        flags = ["-O3"] if variant == "plain" else ["-O1", *SANITIZE]
        return compile_object(csrc / "cpu" / f"{unit}.cpp", out, [*self.openmp, *flags, *UNITS[unit]], csrc)

    def link(self, objects: Mapping[str, Path], variant: str, out: Path) -> Path:
        flags = [] if variant == "plain" else SANITIZE
        run([*COMPILER, *self.openmp, *flags, *map(str, objects.values()), "-o", str(out), "-pthread"])
        return out


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with two_at_a_time() as pool:
        yield pool


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory, pool: ThreadPoolExecutor) -> Kit:
    folder = tmp_path_factory.mktemp("kit")
    kit = Kit(folder, openmp_flags(folder))
    test = NATIVE / "kernel_test.cpp"
    futures: dict[str, dict[str, Future[Path]]] = {}
    # The test program itself is not instrumented, which halves the time; it still marks its buffers' surroundings.
    for variant, flags in (("sanitized", ["-O2", "-DSWAFAST_TEST_ASAN=1"]), ("plain", ["-O2"])):
        futures[variant] = {
            "test": pool.submit(compile_object, test, folder / f"test-{variant}.o", [*kit.openmp, *flags])
        }
        for unit in UNITS:
            out = folder / f"{unit}-{variant}.o"
            futures[variant][unit] = pool.submit(kit.compile_unit, CSRC, unit, variant, out)
    kit.objects = {v: {unit: made.result() for unit, made in units.items()} for v, units in futures.items()}
    return kit


@pytest.fixture(scope="module")
def programs(kit: Kit) -> dict[str, Path]:
    return {variant: kit.link(objects, variant, kit.folder / variant) for variant, objects in kit.objects.items()}


@pytest.fixture(scope="module")
def mutants(kit: Kit, pool: ThreadPoolExecutor) -> dict[str, Future[Finished]]:
    """All of them under way, two at a time: alone each would wait for its compiler."""
    return {mutant.name: pool.submit(run_mutant, kit, mutant) for mutant in MUTANTS}


def run_mutant(kit: Kit, mutant: Mutant) -> Finished:
    folder = kit.folder / mutant.name.replace(" ", "-")
    csrc = mutated_csrc(folder, mutant.file, mutant.old, mutant.new)
    made = kit.compile_unit(csrc, mutant.unit, "sanitized", folder / "mutant.o")
    program = kit.link({**kit.objects["sanitized"], mutant.unit: made}, "sanitized", folder / "program")
    return execute(program, *(("--isa", mutant.unit) if mutant.unit in ISAS else ()))


@pytest.fixture(scope="module")
def healthy(programs: dict[str, Path], pool: ThreadPoolExecutor) -> dict[str, Finished]:
    """What each program said when nothing was spoiled."""
    return dict(zip(programs, pool.map(execute, programs.values()), strict=True))


@pytest.mark.parametrize("variant", ["sanitized", "plain"])
def test_kernels_pass(healthy: dict[str, Finished], variant: str) -> None:
    assert healthy[variant].returncode == 0, healthy[variant].stderr
    assert "every check passed: generic " in healthy[variant].stdout


@pytest.mark.parametrize("variant", ["sanitized", "plain"])
@pytest.mark.parametrize("plant", PLANTS)
def test_a_spoiled_call_is_seen(programs: dict[str, Path], variant: str, plant: str) -> None:
    done = execute(programs[variant], "--plant", plant)
    assert done.returncode not in (0, 2), f"{plant} was not seen: {done.stdout}{done.stderr}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_killed(
    kit: Kit, healthy: dict[str, Finished], mutants: dict[str, Future[Finished]], mutant: Mutant
) -> None:
    if mutant.unit in ISAS and f" {mutant.unit} " not in healthy["plain"].stdout:
        pytest.skip(f"needs a processor with {mutant.unit}")
    if mutant.openmp and not kit.openmp:
        pytest.skip("needs OpenMP")
    done = mutants[mutant.name].result()
    assert done.returncode not in (0, 2), f"{mutant.name} lives: {done.stdout}{done.stderr}"
