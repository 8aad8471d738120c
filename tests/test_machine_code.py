"""What nvcc makes of ``csrc/cuda``: wide loads under way together, no local memory, arithmetic that rounds correctly.

Read from the machine code, because no test of results sees it; nothing here needs a GPU. The readers are shown to fail,
on planted texts and on copies of ``csrc`` with one bug in them.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.native_build import CSRC, SUFFIXES, run, two_at_a_time
from tests.planting import Plant, read_plants, read_sources, write_sources

pytestmark = pytest.mark.kernels

NVCC = shutil.which("nvcc")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
FLAGS = ("-std=c++17", "-O3", "--fmad=false")


@dataclass(frozen=True)
class Tile:
    """What the loop over the tiles of one dtype and format does for a thread, on sm_90."""

    loads: int  # of 16 bytes, all of them in flight at once
    stores: int
    numel: int  # elements
    most_instructions: float  # an element


#: By dtype and format. An H200 issues 29e12 instructions a second, 4 a cycle for 32 threads on each of 132
#: multiprocessors at 1.755 GHz. Beside a copy's 4.3 TB/s these are 82 for an element of 12 bytes, 41 for one of 6.
UPDATE_TILES = {
    "float32 float32": Tile(8, 4, 16, 5.2),
    "float32 exact": Tile(4, 2, 8, 17.5),
    "float32 mirrored": Tile(5, 3, 8, 14.5),
    "float32 compact": Tile(7, 3, 16, 34),
    "float32 compensated": Tile(6, 4, 8, 26),
    "float32 half": Tile(6, 2, 16, 24.5),
    **{
        f"{dtype} {fmt}": tile
        for dtype in ("bfloat16", "float16")
        for fmt, tile in {
            "float32": Tile(6, 4, 16, 5.5),
            "exact": Tile(6, 4, 16, 17.5),
            "mirrored": Tile(4, 3, 8, 14.5),
            "compact": Tile(5, 3, 16, 34),
            "compensated": Tile(5, 4, 8, 26.5),
            "half": Tile(4, 2, 16, 25),
        }.items()
    },
    "bytes": Tile(4, 4, 64, 0.4),
}
#: Those that move a spread, beside those that move its average. Their six stores are two of the variance and four of a
#: column: as float32, bfloat16 or float16, of which one runs. An average in float64 takes half a group; beside 16-bit
#: params it has fewer loads than LOADS_UNDER_WAY, and is not held here. An H200 issues 164 beside a copy of 24 bytes.
COLLECT_TILES = {
    "float32 float32, spread": Tile(6, 6, 8, 21.5),
    "float32 exact, spread": Tile(6, 6, 8, 27),
    "float32 mirrored, spread": Tile(7, 6, 8, 31.5),
    "float32 compact, spread": Tile(5, 6, 8, 29.5),
    "float32 compensated, spread": Tile(4, 2, 4, 39.5),
    "float32 half, spread": Tile(5, 6, 8, 22.5),
    **{
        f"{dtype} {fmt}, spread": tile
        for dtype in ("bfloat16", "float16")
        for fmt, tile in {
            "float32": Tile(5, 6, 8, 24),
            "exact": Tile(5, 6, 8, 30),
            "mirrored": Tile(6, 6, 8, 32.5),
            "compact": Tile(4, 6, 8, 30.5),
            "half": Tile(4, 6, 8, 25),
        }.items()
    },
}
#: Those that add four columns to eight elements of a sample: instructions for an element of a column.
DRAW_TILES = {
    "float32 columns": Tile(8, 0, 32, 2.3),
    "bfloat16 columns": Tile(4, 0, 32, 3.2),
    "float16 columns": Tile(4, 0, 32, 3.2),
}
#: The most instructions of a draw for an element, on sm_90 and on the longest way: beside every other format, the noise
#: of eight elements with a block of random bits each. Where two blocks serve all eight, it is 50 fewer.
MOST_OF_A_DRAW = 210
#: The tiles of each kernel that are told apart.
TILES_OF = {
    "update_kernel": UPDATE_TILES,
    "collect_kernel": {**UPDATE_TILES, **COLLECT_TILES},
    "draw_kernel": DRAW_TILES,
}
#: Each kernel's unrolled loops.
TILES = {"exchange_kernel": 3, "nonfinite_kernel": 3, **{kernel: len(tiles) for kernel, tiles in TILES_OF.items()}}
#: Of those, the ones that work in float64: a product and a sum for each element, rounded one by one.
DOUBLE_TILES = {"update_kernel": 3, "collect_kernel": 3}
#: They have arrays of one and of four bytes an element in a group, and read addresses of columns in the loop.
MIXED_WIDTHS = ("collect_kernel", "draw_kernel")
#: What a block reads before it says that it has begun, and writes after that, if it is the last one. Other blocks must
#: see the two in this order: MEMBAR waits for what was read, and CCTL drops what the first-level cache holds. Both come
#: of the word acq_rel. A test on a CPU cannot see them.
_BEGINS = (r"MEMBAR\.\S+\.GPU", r"ATOMG\.E\.ADD\.64\.STRONG\.GPU", r"CCTL\.IVALL", r"STG\.E\.64\.STRONG\.GPU")
_READS = r"LDG\.E\.64\.STRONG\.GPU"
#: The first chunk's descriptor arrives before a barrier, and so does each next one.
_WAITS = (r"LDGSTS\.E\.128", r"DEPBAR\.LE SB0, 0x0", r"BAR\.SYNC") * 2
#: By kernel, instructions in their order.
ORDERS = {
    "update_kernel": ((_READS, r"BAR\.SYNC", *_BEGINS), _WAITS),
    "exchange_kernel": ((_READS, *_BEGINS), _WAITS),
    "nonfinite_kernel": (_WAITS,),
    "collect_kernel": ((_READS, r"BAR\.SYNC", *_BEGINS), _WAITS),
    "draw_kernel": (_WAITS,),
}
#: Of 16 bytes: 64 bytes for each thread keep the memory of a GPU busy.
LOADS_UNDER_WAY = 4
#: 65536 registers for 4 blocks of 256 threads.
MOST_REGISTERS = 64


def _find_cuobjdump() -> str | None:
    """Return CUDA's own, or the one that comes with triton."""
    spec = importlib.util.find_spec("triton")
    folders = spec.submodule_search_locations if spec is not None else None
    bundled = [str(Path(folder) / "backends" / "nvidia" / "bin") for folder in folders or ()]
    return shutil.which("cuobjdump") or next(filter(None, (shutil.which("cuobjdump", path=p) for p in bundled)), None)


CUOBJDUMP = _find_cuobjdump()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
needs_cuobjdump = pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump")


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str  # without its predicate
    is_conditional: bool = False

    @property
    def mnemonic(self) -> str:
        return self.text.split()[0]

    @property
    def target(self) -> int | None:
        """The address that a branch goes to."""
        found = re.search(r"\b0x([0-9a-f]+)$", self.text)
        return int(found[1], 16) if found and self.mnemonic.startswith("BRA") else None


def parse_sass(text: str) -> dict[str, list[Instruction]]:
    """Return the instructions of each function that ``cuobjdump -sass`` prints."""
    pattern = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([^;]*?)\s*;", re.MULTILINE)
    functions = {}
    for part in text.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        functions[name.strip()] = [
            Instruction(int(address, 16), code, bool(predicate)) for address, predicate, code in pattern.findall(body)
        ]
    return functions


def all_loops(code: list[Instruction]) -> list[list[Instruction]]:
    spans = [(it.target, it.address) for it in code if it.target is not None and it.target < it.address]
    return [[it for it in code if first <= it.address <= last] for first, last in spans]


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    spans = [(loop[0].address, loop[-1].address, loop) for loop in all_loops(code)]
    return [
        loop
        for first, last, loop in spans
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b, _ in spans)
    ]


def most_executed(loop: list[Instruction]) -> int:
    """Return the instructions on the longest way through a loop: the compiler makes copies of it for some weights."""
    ahead: dict[int, int] = {}
    following = 0
    for it in reversed(loop):
        branch = ahead.get(it.target, 0) if it.target is not None else None
        if branch is None:
            following += 1
        else:
            following = 1 + (max(following, branch) if it.is_conditional else branch)
        ahead[it.address] = following
    return following


def accesses(loop: list[Instruction]) -> str:
    """Return its loads and stores in their order: ``L`` and ``S`` for 16 bytes, ``l`` and ``s`` for fewer."""
    kinds = {"LDG": "L", "STG": "S"}
    letters = ((it, kinds.get(it.mnemonic.split(".")[0], "")) for it in loop)
    return "".join(letter if ".128" in it.mnemonic else letter.lower() for it, letter in letters)


def wide_loops(code: list[Instruction]) -> list[str]:
    """Return what :func:`accesses` gives for each innermost loop with wide ones, as in ``LLLLSS``."""
    return [loop for loop in map(accesses, innermost_loops(code)) if loop != loop.lower()]


def faults_of_doubles(code: list[Instruction], num_tiles: int) -> list[str]:
    """Return where a loop over averages in float64 rounds once what is to be rounded twice."""
    loops = [
        [it.mnemonic for it in loop] for loop in innermost_loops(code) if accesses(loop).count("L") >= LOADS_UNDER_WAY
    ]
    loops = [loop for loop in loops if any(name.startswith(("DMUL", "DFMA")) for name in loop)]
    faults = [] if len(loops) >= num_tiles else [f"{len(loops)} of {num_tiles} loops multiply in float64"]
    if any(name.startswith("DFMA") for loop in loops for name in loop):
        faults.append("a fused product in float64")
    return faults


def faults_of_tiles(code: list[Instruction], expected: Mapping[str, Tile], *, count: bool) -> list[str]:
    """Return which tiles have other loads and stores than expected; with ``count``, which have more instructions.

    Machine code has no names. So tiles of one shape are compared in the order of their instructions.
    """
    found: dict[tuple[int, int], list[int]] = {}
    for loop in innermost_loops(code):
        shape = accesses(loop).count("L"), accesses(loop).count("S")
        if shape[0] >= LOADS_UNDER_WAY:
            found.setdefault(shape, []).append(most_executed(loop))
    wanted: dict[tuple[int, int], list[tuple[float, str]]] = {}
    for name, tile in expected.items():
        wanted.setdefault((tile.loads, tile.stores), []).append((tile.most_instructions * tile.numel, name))
    faults = []
    for shape in sorted(found.keys() | wanted.keys()):
        numbers, limits = sorted(found.get(shape, [])), sorted(wanted.get(shape, []))
        if len(numbers) != len(limits):
            faults.append(f"{len(numbers)} of {len(limits)} tiles have {shape[0]} loads and {shape[1]} stores")
            continue
        faults += [
            f"{name}: {number} instructions for {expected[name].numel} elements"
            for number, (limit, name) in zip(numbers, limits, strict=True)
            if count and number > limit
        ]
    return faults


def faults_of_draw(code: list[Instruction]) -> list[str]:
    """Return what is wrong with the loop over the groups of a draw: the innermost one that stores 16 bytes."""
    loops = [loop for loop in all_loops(code) if "S" in accesses(loop)]
    if not loops:
        return ["no loop stores 16 bytes"]
    number = most_executed(min(loops, key=len))
    return [f"a draw: {number} instructions for 8 elements"] if number > 8 * MOST_OF_A_DRAW else []


def faults_of_code(code: list[Instruction], num_tiles: int, stores: bool) -> list[str]:
    """Return what is wrong with a kernel: which has this many unrolled loops, and stores averages or not."""
    names = [it.mnemonic.split(".")[0] for it in code]
    faults = [f"{wrong} instruction" for wrong in ("LD", "ST", "LDL", "STL") if wrong in names]
    wide = {name for it, name in zip(code, names, strict=True) if ".128" in it.mnemonic}
    faults += [f"no {kind} of 128 bits" for kind in ("LDG", "STG")[: 2 if stores else 1] if kind not in wide]
    loops = wide_loops(code)
    faults += [f"narrow accesses among wide ones: {loop}" for loop in loops if loop != loop.upper()]
    tiles = [loop for loop in loops if loop.count("L") >= LOADS_UNDER_WAY]
    if len(tiles) < num_tiles:
        faults.append(f"{len(tiles)} of {num_tiles} loops have {LOADS_UNDER_WAY} wide loads: {loops}")
    faults += [
        f"a store before the last load: {tile}" for tile in tiles if "L" in tile[tile.find("S") :] and "S" in tile
    ]
    return faults


def faults_of_order(code: list[Instruction], expected: Sequence[str]) -> list[str]:
    """Return the first of these instructions that does not come after the ones before it."""
    rest = iter(code)
    for pattern in expected:
        if not any(re.match(pattern, it.text) for it in rest):
            return [f"no {pattern} in its place"]
    return []


def faults_of_ptxas(log: str) -> list[str]:
    """Return which entry of ``ptxas -v`` spills, has a stack or takes too many registers."""
    entries = re.split(r"Compiling entry function '", log)[1:]
    faults = [] if entries else ["no entry function"]
    functions = log.count("Function properties for ")
    if functions > len(entries):
        faults.append(f"{functions - len(entries)} functions are called, not inlined")
    for entry in entries:
        name = entry.partition("'")[0]
        nbytes = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        if nbytes is None or registers is None:
            faults.append(f"{name}: nothing said about stack and registers")
        elif any(map(int, nbytes.groups())):
            faults.append(f"{name}: {nbytes[0]}")
        elif int(registers[1]) > MOST_REGISTERS:
            faults.append(f"{name}: {registers[0]}")
    return faults


def faults_of_ptx(ptx: str) -> list[str]:
    """Return where the arithmetic is not what the source says: fused, approximate or flushed to zero."""
    wrong = (r"fma\.rn\.f64", r"div\.approx", r"div\.full", r"rcp\.approx", r"\.ftz\b")
    faults = [found[0] for found in (re.search(pattern, ptx) for pattern in wrong) if found]
    return faults if "div.rn.f64" in ptx else [*faults, "no div.rn.f64"]


def compile_cubin(csrc: Path, architecture: str, out: Path, *flags: str) -> str:
    """Compile the kernels for one architecture and give what ptxas says."""
    command = (str(NVCC), *FLAGS, *flags, f"-arch={architecture}", "-Xptxas", "-v", "-cubin", "-o", str(out))
    return run((*command, str(csrc / "cuda" / "launch.cu"))).stderr


def compile_ptx(csrc: Path, out: Path, *flags: str) -> str:
    run((str(NVCC), *FLAGS, *flags, "-arch=sm_90", "-ptx", "-o", str(out), str(csrc / "cuda" / "launch.cu")))
    return out.read_text()


@cache  # two tests read what takes a second to print
def disassemble(cubin: Path) -> dict[str, list[Instruction]]:
    try:
        return parse_sass(run((str(CUOBJDUMP), "-sass", str(cubin))).stdout)
    except AssertionError as error:
        if "Cannot decode architecture" not in str(error):
            raise
        pytest.skip(f"needs an nvdisasm that decodes {cubin.stem}")


def faults_of_cubin(cubin: Path) -> list[str]:
    functions = disassemble(cubin)
    faults = []
    for kernel, num_tiles in TILES.items():
        found = [code for name, code in functions.items() if kernel in name]
        assert len(found) == 1, f"{kernel} is there {len(found)} times"
        seen = faults_of_code(found[0], num_tiles, kernel != "nonfinite_kernel")
        if kernel in MIXED_WIDTHS:
            seen = [it for it in seen if not it.startswith("narrow accesses")]
        if kernel in TILES_OF:
            seen += faults_of_tiles(found[0], TILES_OF[kernel], count=cubin.stem == "sm_90")
        if kernel == "draw_kernel" and cubin.stem == "sm_90":
            seen += faults_of_draw(found[0])
        seen += [fault for order in ORDERS[kernel] for fault in faults_of_order(found[0], order)]
        faults += [f"{kernel}: {it}" for it in [*seen, *faults_of_doubles(found[0], DOUBLE_TILES.get(kernel, 0))]]
    return faults


BUGS = read_plants("machine")


@dataclass(frozen=True)
class Compiled:
    cubin: Path
    log: str


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with two_at_a_time() as pool:
        yield pool


def _compiled(csrc: Path, architecture: str, folder: Path) -> Compiled:
    cubin = folder / f"{architecture}.cubin"
    return Compiled(cubin, compile_cubin(csrc, architecture, cubin))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, pool: ThreadPoolExecutor) -> dict[str, Future[Compiled]]:
    """One call of nvcc for each architecture that it knows, two at a time."""
    known = subprocess.run([str(NVCC), "--list-gpu-code"], capture_output=True, text=True, timeout=60).stdout.split()
    folder = tmp_path_factory.mktemp("cubins")
    return {arch: pool.submit(_compiled, CSRC, arch, folder) for arch in ARCHITECTURES if arch in known}


@pytest.fixture(scope="module")
def with_bugs(
    compiled: object, tmp_path_factory: pytest.TempPathFactory, pool: ThreadPoolExecutor
) -> dict[str, Future[Compiled]]:
    folder = tmp_path_factory.mktemp("bugs")

    def compile_bug(bug: Plant) -> Compiled:
        csrc = write_sources(folder / bug.name.replace(" ", "-"), bug.apply(read_sources(CSRC, *SUFFIXES)))
        return _compiled(csrc, "sm_90", csrc)

    return {bug.name: pool.submit(compile_bug, bug) for bug in BUGS}


def _of(compiled: dict[str, Future[Compiled]], architecture: str) -> Compiled:
    if architecture not in compiled:
        pytest.skip(f"needs an nvcc that knows {architecture}")
    return compiled[architecture].result()


@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wide_accesses_and_no_local_memory(compiled: dict[str, Future[Compiled]], architecture: str) -> None:
    assert faults_of_cubin(_of(compiled, architecture).cubin) == []


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_for_the_blocks_and_no_stack(compiled: dict[str, Future[Compiled]], architecture: str) -> None:
    log = _of(compiled, architecture).log
    assert log.count("Compiling entry function") == len(TILES)
    assert faults_of_ptxas(log) == []


@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_weight_divides_in_double(compiled: dict[str, Future[Compiled]], architecture: str) -> None:
    functions = disassemble(_of(compiled, architecture).cubin)
    (code,) = (code for name, code in functions.items() if "update_kernel" in name)
    # An estimate, refined by fused steps until it rounds correctly.
    assert {"MUFU.RCP64H", "DFMA"} <= {it.mnemonic for it in code}


@needs_nvcc
def test_nothing_is_fused_or_approximate(tmp_path: Path) -> None:
    assert faults_of_ptx(compile_ptx(CSRC, tmp_path / "launch.ptx")) == []


@needs_nvcc
def test_a_build_that_fuses_is_seen(tmp_path: Path) -> None:
    assert faults_of_ptx(compile_ptx(CSRC, tmp_path / "launch.ptx", "--fmad=true")) == ["fma.rn.f64"]


@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_seen(with_bugs: dict[str, Future[Compiled]], bug: Plant) -> None:
    faults = faults_of_cubin(with_bugs[bug.name].result().cubin)
    assert any(bug.expected in fault for fault in faults), faults


@needs_nvcc
def test_spills_are_seen(with_bugs: dict[str, Future[Compiled]]) -> None:
    assert "bytes stack frame" in str(faults_of_ptxas(with_bugs["registers for 8 blocks"].result().log))


def planted_sass(*body: str) -> list[Instruction]:
    """Return a function with one loop of these instructions, as cuobjdump prints it."""
    lines = ["MOV R1, c[0x0][0x28]", *body, "@!P0 BRA 0x10", "EXIT", "BRA 0x1000"]
    text = "\n".join(
        f"        /*{16 * i:04x}*/    {line} ;    /* 0x0 */\n    /* 0x0 */" for i, line in enumerate(lines)
    )
    ((name, code),) = parse_sass(f"\t\tFunction : planted\n\t.headerflags\n{text}\n").items()
    assert name == "planted"
    return code


LOAD, STORE = "LDG.E.EF.128 R8, desc[UR4][R2.64+0x1000]", "@P1 STG.E.EF.128 desc[UR4][R2.64], R8"


def test_a_planted_fault_in_the_code_is_seen() -> None:
    healthy = [*[LOAD] * 4, "FADD R8, R8, R9", STORE, STORE]
    assert wide_loops(planted_sass(*healthy)) == ["LLLLSS"]
    assert faults_of_code(planted_sass(*healthy), 1, stores=True) == []
    for planted in ("LDL R3, [R1+0x8]", "STL.64 [R1], R4", "LD.E.128 R8, [R2.64]", "@P0 ST.E [R2.64], R8"):
        kind = planted.removeprefix("@P0 ").split(".")[0].split()[0]
        assert faults_of_code(planted_sass(planted, *healthy), 1, stores=True) == [f"{kind} instruction"]
    early = planted_sass(*[LOAD] * 3, STORE, LOAD, STORE)
    assert faults_of_code(early, 1, stores=True) == ["a store before the last load: LLLSLS"]
    assert "0 of 1 loops" in faults_of_code(planted_sass(*[LOAD] * 3, STORE), 1, stores=True)[0]
    assert "1 of 2 loops" in faults_of_code(planted_sass(*healthy), 2, stores=True)[0]
    assert faults_of_code(planted_sass(*[LOAD] * 4), 1, stores=True) == ["no STG of 128 bits"]
    mixed = planted_sass(*[LOAD] * 4, LOAD.replace(".128", ".64"), STORE)
    assert faults_of_code(mixed, 1, stores=True) == ["narrow accesses among wide ones: LLLLlS"]
    narrow = [line.replace(".128", "") for line in healthy]
    assert "no LDG of 128 bits" in faults_of_code(planted_sass(*narrow), 0, stores=False)
    assert faults_of_code(planted_sass("LDS R2, [UR4]", "LDC R1, c[0x0]", *[LOAD] * 4), 1, stores=False) == []


def test_a_planted_fault_in_a_tile_is_seen() -> None:
    healthy = planted_sass(*[LOAD] * 4, "FADD R8, R8, R9", STORE, STORE)  # with its branch 8 instructions
    expected = {"one": Tile(4, 2, 4, 2.0)}
    assert faults_of_tiles(healthy, expected, count=True) == []
    assert faults_of_tiles(healthy, {"one": Tile(4, 2, 4, 1.9)}, count=True) == ["one: 8 instructions for 4 elements"]
    assert faults_of_tiles(healthy, {"one": Tile(4, 2, 4, 1.9)}, count=False) == []
    assert faults_of_tiles(planted_sass(*[LOAD] * 5, STORE, STORE), expected, count=True) == [
        "0 of 1 tiles have 4 loads and 2 stores",
        "1 of 0 tiles have 5 loads and 2 stores",
    ]


def test_a_planted_fault_in_the_order_is_seen() -> None:
    begins = ["LDG.E.64.STRONG.GPU R6, desc[UR8][R4.64+0x8]", "MEMBAR.ALL.GPU", "ATOMG.E.ADD.64.STRONG.GPU PT, R2"]
    begins += ["CCTL.IVALL", "STG.E.64.STRONG.GPU desc[UR8][R4.64+0x8], R8"]
    waits = ["LDGSTS.E.128 [R13], desc[UR8][R2.64]", "LDGDEPBAR", "DEPBAR.LE SB0, 0x0", "BAR.SYNC.DEFER_BLOCKING 0x0"]
    orders = ORDERS["exchange_kernel"]
    healthy = [*begins, *waits, *waits]

    def faults(*body: str) -> list[str]:
        return [fault for order in orders for fault in faults_of_order(planted_sass(*body), order)]

    assert faults(*healthy) == []
    for index, line in enumerate(healthy):
        if line != "LDGDEPBAR":
            assert len(faults(*healthy[:index], *healthy[index + 1 :])) == 1, line
    for old, new in ((".GPU", ".SM"), ("MEMBAR.ALL.GPU", "NOP"), ("64.STRONG.GPU R6", "64 R6"), ("0x0", "0x1")):
        assert faults(*(line.replace(old, new) for line in healthy)) != [], old
    assert faults(*reversed(begins), *waits, *waits) != []


def test_a_planted_fault_in_float64_is_seen() -> None:
    product, total, fused = "DMUL R8, R10, R12", "DADD R8, R8, R14", "DFMA R8, R10, R12, R14"
    healthy = planted_sass(*[LOAD] * 4, product, total, STORE)
    assert faults_of_doubles(healthy, 1) == []
    assert faults_of_doubles(healthy, 2) == ["1 of 2 loops multiply in float64"]
    assert faults_of_doubles(planted_sass(*[LOAD] * 4, fused, STORE), 1) == ["a fused product in float64"]
    assert faults_of_doubles(planted_sass(fused, *[LOAD] * 3, STORE), 0) == []


def test_a_planted_fault_in_what_ptxas_says_is_seen() -> None:
    said = (
        "ptxas info    : Compiling entry function 'kernel' for 'sm_90'\n"
        "ptxas info    : Function properties for kernel\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 64 registers, used 1 barriers\n"
    )
    assert faults_of_ptxas(said) == []
    assert faults_of_ptxas(said + said.replace("Used 64", "Used 65")) == ["kernel: Used 65 registers"]
    for old, new in (("0 bytes stack", "8 bytes stack"), ("0 bytes spill s", "4 bytes spill s")):
        assert faults_of_ptxas(said.replace(old, new))[0].startswith("kernel: ")
    assert faults_of_ptxas(said.replace("bytes", "")) == ["kernel: nothing said about stack and registers"]
    assert faults_of_ptxas("") == ["no entry function"]
    called = "ptxas info    : Function properties for a_lambda\n    0 bytes stack frame, 4 bytes spill stores\n"
    assert faults_of_ptxas(said + called) == ["1 functions are called, not inlined"]


def test_a_planted_fault_in_the_arithmetic_is_seen() -> None:
    said = "div.rn.f64 %fd1, %fd2, %fd3;\nfma.rn.f32 %f1, %f2, %f3, %f4;\nmul.rn.f64 %fd4, %fd1, %fd1;\n"
    assert faults_of_ptx(said) == []
    for wrong in ("fma.rn.f64", "div.approx", "div.full", ".ftz"):
        planted = {".ftz": "mul.ftz.f32", "fma.rn.f64": wrong}.get(wrong, f"{wrong}.f32")
        assert faults_of_ptx(f"{said}{planted} %f1, %f2, %f3;\n") == [wrong]
    assert faults_of_ptx(said.replace("div.rn.f64", "add.rn.f64")) == ["no div.rn.f64"]
