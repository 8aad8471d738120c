"""The machine code of the Triton kernels, compiled ahead of time for an H200 as a launch would have them compiled.

No GPU is needed. The compiler runs in a process of its own, as this one may have Triton's interpreter on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from swafast.backends.triton import launch as backend
from tests.planting import read_plants
from tests.triton_source import ROOT, read_kernels

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

pytestmark = pytest.mark.kernels

KERNELS = (*backend.KERNELS, *backend.SPREAD_KERNELS)

COMPILE = """
import json, pathlib, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from swafast.backends.triton import launch as backend
from tests.triton_source import import_kernels

tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

for request in json.loads(sys.stdin.read()):
    folder, target = pathlib.Path(request["folder"]), GPUTarget(*request["target"])
    kernels = import_kernels(folder, request["sources"])["kernels"]
    for name in request["kernels"]:
        kernel = getattr(kernels, f"{name}_kernel")
        # What a launch makes of its arguments: whatever the integer, it stands for no code of its own.
        bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(target))
        types = {tuple(bind(*[value] * len(kernel.params))[1]) for value in (0, 1, 16, -3, 2**40, 2**62)}
        assert len(types) == 1, f"a value could make it compile anew: {types}"
        # Releases before 3.3 list the types alone, and after them what they would specialise on.
        bound = [kind if isinstance(kind, tuple) else (kind, None) for kind in types.pop()]
        signature = {
            param.name: kind for param, (kind, attribute) in zip(kernel.params, bound, strict=True) if attribute is None
        }
        options = {**backend.launch_options(target.backend), **request["options"]}
        made = triton.compile(ASTSource(kernel, signature), target=target, options=options)
        code = {"signature": signature, "shared": made.metadata.shared}
        if target.backend == "cuda":
            cubin = folder / f"{name}.cubin"
            cubin.write_bytes(made.asm["cubin"])
            show = lambda what: subprocess.run([tool, what, cubin], check=True, capture_output=True, text=True).stdout
            code |= {"ptx": made.asm["ptx"], "sass": show("-sass"), "resources": show("-res-usage")}
        else:
            code |= {"assembly": made.asm["amdgcn"]}
        (folder / f"{name}.json").write_text(json.dumps(code))
"""


@dataclass(frozen=True)
class Code:
    """One kernel as the compiler left it."""

    ptx: str
    sass: str
    resources: str
    signature: dict[str, str]
    shared: int  # bytes
    assembly: str  # of an AMD GPU

    @property
    def wide_blocks(self) -> Counter[tuple[int, int, int, int]]:
        """How many blocks of the PTX have this many (loads, stores) of 16 bytes and of 8: one for each wide tile."""
        blocks = re.split(r"^\$L__BB\S+:", self.ptx, flags=re.MULTILINE)
        counts = (tuple(len(re.findall(access, block)) for access in WIDE) for block in blocks)
        return Counter(count for count in counts if any(count))

    @property
    def blocks_with_stores(self) -> list[str]:
        """The machine code between branches, where it stores."""
        return [block for block in re.split(r"\bBRA\b", self.sass) if "STG" in block]

    @property
    def loads_in_flight(self) -> list[int]:
        """How many loads of 16 bytes a thread starts before each run of stores of 16 bytes."""
        runs = re.findall(r"L+(?=S)", "".join(kind[0] for kind in re.findall(r"\b(LDG|STG)\S*\.128\b", self.sass)))
        return list(map(len, runs))

    @property
    def registers(self) -> int:
        return int(re.findall(r"REG:(\d+)", self.resources)[0])


WIDE = [rf"\b{op}\.global[\w.:]*\.{width}\.b32\b" for width in ("v4", "v2") for op in ("ld", "st")]


@dataclass(frozen=True)
class Variant:
    """What to compile."""

    kernels: tuple[str, ...] = ("update",)
    bugs: tuple[str, ...] = ()
    options: tuple[tuple[str, object], ...] = ()
    target: tuple[str, int | str, int] = ("cuda", 90, 32)


def compile_variants(folder: Path, variants: dict[str, Variant]) -> dict[str, dict[str, Code]]:
    """Compile in one process: to start it takes as long as to compile half of a kernel."""
    edits, requests = {plant.name: plant for plant in read_plants("triton_code")}, []
    for name, variant in variants.items():
        sources = read_kernels()
        for bug in variant.bugs:
            sources = edits[bug].apply(sources)
        request = {"kernels": variant.kernels, "options": dict(variant.options), "target": variant.target}
        requests.append({**request, "sources": sources, "folder": str(folder / name)})
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "cache")}
    environment["TRITON_HIP_LLD_PATH"] = str(shutil.which("true"))  # older releases link by it; nobody reads the result
    command, text = [sys.executable, "-c", COMPILE], json.dumps(requests)
    done = subprocess.run(command, cwd=ROOT, env=environment, input=text, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    fields = dict.fromkeys(Code.__dataclass_fields__, "")
    return {
        name: {
            kernel: Code(**{**fields, **json.loads((folder / name / f"{kernel}.json").read_text())})
            for kernel in variant.kernels
        }
        for name, variant in variants.items()
    }


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Code]:
    return compile_variants(tmp_path_factory.mktemp("code"), {"hopper": Variant(KERNELS)})["hopper"]


@cache
def expected_wide_blocks(kernel: str) -> Counter[tuple[int, int, int, int]]:
    """Return how many blocks have how many (loads, stores) of 16 and of 8 bytes: one for each dtype and format."""
    if kernel == "exchange":
        return Counter({(8, 8, 0, 0): 3})
    if kernel == "nonfinite":
        return Counter({(4, 0, 0, 0): 3})
    if kernel == "draw":
        return Counter({(4, 0, 0, 0): 1, (0, 0, 8, 0): 2})  # columns of 4 bytes and of 2, under way at once
    if kernel not in ("update", "spread"):
        return Counter()
    blocks = [(4, 4, 0, 0)]  # bytes, 64 a thread
    for param in (4, 2, 2):
        for planes in ((4,), (2, 2), (2, 4), (2,)):  # bytes of an element in each plane, 16 elements a thread
            blocks.append((param + sum(planes), sum(planes), 0, 0))
        blocks.append((param + 2, 2, 2, 2))  # `compact`: a plane of bytes, 8 elements at a time
        blocks.append(((param + 8) // 2, 4, 0, 0))  # `compensated`: 8 elements a thread
    if kernel == "spread":
        blocks += [(6, 4, 0, 0), (5, 3, 0, 0)]  # float32 and `exact`, beside their variance and a column
    return Counter(blocks)


def check_wide(kernel: str, code: Code) -> None:
    assert not expected_wide_blocks(kernel) - code.wide_blocks, "paths are not wide"
    # Where dtypes are told apart at each access, a tile is in many blocks.
    assert kernel in backend.SPREAD_KERNELS or code.wide_blocks == expected_wide_blocks(kernel), "more paths"
    wide = Counter(re.findall(r"\b(LDG|STG)\S*\.128\b", code.sass))
    loads, stores = (sum(block[i] * n for block, n in expected_wide_blocks(kernel).items()) for i in (0, 1))
    assert wide["LDG"] >= loads
    assert wide["STG"] >= stores
    assert min(code.loads_in_flight, default=4) >= 4


def check_registers(code: Code) -> None:
    """Four programs of 256 threads share a multiprocessor's 65536 registers; nothing goes to memory for want of one."""
    assert code.registers <= 64
    assert re.findall(r"\b(?:LDL|STL)\b\S*", code.sass) == [], "registers spill"
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", code.resources) == ["0", "0"]
    assert ".local" not in code.ptx


def check_no_exchange_of_threads(code: Code) -> None:
    """Elements stay with their thread: shared memory has nothing but what an atomic gives to the whole program."""
    assert code.shared <= 8, "threads exchange elements"


def check_arithmetic(code: Code) -> None:
    """Products and sums of float64 are rounded each on its own, and quotients as IEEE 754 has it."""
    operations = set(re.findall(r"\b(?:fma|mad|mul|add|sub|div|rcp|ex2|lg2)\.[\w.]*f\d+\b", code.ptx))
    wanted = {f"{op}.rn.f64" for op in ("mul", "add", "sub", "div")} | {"fma.rn.f32", "sub.rn.f32"}
    assert wanted <= operations, "operations are missing"
    assert operations <= wanted | {"add.rn.f32"}, "other operations"


def check_float64_tiles(code: Code) -> None:
    """Averages in float64 have products and sums of their own; a quotient of the weight's is made of fused ones."""
    tiles = [block for block in code.blocks_with_stores if "DMUL" in block]
    assert len(tiles) >= 2, "no products of their own"  # a wide path and a narrow one
    assert all("DADD" in block and "DFMA" not in block for block in tiles), "tiles with fused products"


def check_order(code: Code) -> None:
    """A program reads what the launch changes, then all of its threads meet, and one says that they have read."""
    assert re.findall(r"\batom\.\S+", code.ptx) == ["atom.global.gpu.acq_rel.add.u64"], "another order"
    barrier, atomic = re.search(r"\b(?:bar|barrier)(?:\.cta)?\.sync", code.ptx), code.ptx.index("atom.global")
    assert barrier is not None, "no barrier"
    assert barrier.start() < atomic, "a barrier too late"


@pytest.mark.parametrize("kernel", KERNELS)
def test_wide_paths_move_16_bytes_and_load_before_they_store(hopper: dict[str, Code], kernel: str) -> None:
    check_wide(kernel, hopper[kernel])


@pytest.mark.parametrize("kernel", KERNELS)
def test_four_programs_fit_on_a_multiprocessor_and_nothing_spills(hopper: dict[str, Code], kernel: str) -> None:
    assert backend._PROGRAMS_PER_MULTIPROCESSOR == 4
    check_registers(hopper[kernel])


@pytest.mark.parametrize("kernel", ["update", "exchange", "spread", "draw"])
def test_elements_stay_with_their_thread(hopper: dict[str, Code], kernel: str) -> None:
    check_no_exchange_of_threads(hopper[kernel])


def test_float64_is_rounded_operation_by_operation(hopper: dict[str, Code]) -> None:
    check_arithmetic(hopper["update"])
    check_float64_tiles(hopper["update"])


def test_normal_numbers_are_made_of_operations_that_ieee_754_rounds(hopper: dict[str, Code]) -> None:
    code = hopper["draw"].ptx
    operations = set(re.findall(r"\b(?:fma|mad|mul|add|sub|div|rcp|sqrt|rsqrt|ex2|lg2)\.[\w.]*f\d+\b", code))
    assert operations == {f"{op}.rn.f32" for op in ("fma", "mul", "add", "sqrt", "div")}


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_argument_is_64_bits_whatever_its_value(hopper: dict[str, Code], kernel: str) -> None:
    assert set(hopper[kernel].signature.values()) == {"i64"}


@pytest.mark.parametrize("kernel", ["update", "exchange", "spread"])
def test_programs_say_that_they_have_read_with_acquire_and_release(hopper: dict[str, Code], kernel: str) -> None:
    check_order(hopper[kernel])


#: An update of bf16 params alone, in the formats that planted bugs are seen in: it compiles in a fifth of the time.
FEW = ("no float32 params", "no float16 params", "no exact", "no float32", "no half")
PLANTED = {
    "nothing": Variant(bugs=FEW),
    "no hint": Variant(("exchange",), ("no hint",)),
    "no halves": Variant(bugs=(*FEW, "no halves")),
    "bytes by 16": Variant(bugs=(*FEW, "bytes by 16")),
    "beginning orders nothing": Variant(("exchange",), ("beginning orders nothing",)),
    "beginning orders a block alone": Variant(("exchange",), ("beginning orders a block alone",)),
    "fused products": Variant(bugs=FEW, options=(("enable_fp_fusion", True),)),
    "few registers": Variant(bugs=FEW, options=(("maxnreg", 32),)),
}


HAS_AMD = importlib.util.find_spec("triton.backends.amd") is not None


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Code]]:
    amd = {"amd": Variant(KERNELS, target=("hip", "gfx942", 64))} if HAS_AMD else {}
    return compile_variants(tmp_path_factory.mktemp("others"), {**PLANTED, **amd})


@pytest.mark.parametrize(
    ("bug", "check", "expected"),
    [
        ("no halves", check_no_exchange_of_threads, "threads exchange elements"),
        ("bytes by 16", check_no_exchange_of_threads, "threads exchange elements"),
        ("beginning orders nothing", check_order, "another order"),
        ("beginning orders a block alone", check_order, "another order"),
        ("fused products", check_arithmetic, "operations are missing"),
        ("fused products", check_float64_tiles, "no products of their own"),
        ("few registers", check_registers, "registers spill"),
        ("no hint", lambda code: check_wide("exchange", code), "paths are not wide"),
    ],
)
def test_a_planted_bug_is_seen(
    others: dict[str, dict[str, Code]], bug: str, check: Callable[[Code], None], expected: str
) -> None:
    (code,) = others[bug].values()
    with pytest.raises(AssertionError, match=expected):
        check(code)


def test_nothing_is_seen_where_nothing_is_planted(others: dict[str, dict[str, Code]]) -> None:
    code = others["nothing"]["update"]
    check_no_exchange_of_threads(code)
    check_arithmetic(code)
    check_float64_tiles(code)  # registers are for the whole kernel to show: ptxas shares out those of each kernel anew


@pytest.mark.skipif(not HAS_AMD, reason="this Triton has no compiler for AMD GPUs")
def test_the_kernels_compile_for_an_amd_gpu(others: dict[str, dict[str, Code]]) -> None:
    for kernel, code in others["amd"].items():
        loads = len(re.findall(r"\b(?:buffer|global)_load_dwordx4\b", code.assembly))
        assert loads >= sum(block[0] * n for block, n in expected_wide_blocks(kernel).items())
        # Scalar registers that run short go to lanes of a vector register, not to memory.
        assert set(re.findall(r"vgpr_spill_count: *(\d+)", code.assembly)) == {"0"}
        assert "scratch_" not in code.assembly
