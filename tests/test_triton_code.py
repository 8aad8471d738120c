"""The machine code of the Triton kernels, compiled ahead of time for an H200 as a launch would have them compiled.

No GPU is needed. The compiler runs in a process of its own, as this one may have Triton's interpreter on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from swafast.backends import triton as backend

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

ROOT = Path(__file__).parents[1]
KERNELS = ("update", "exchange", "nonfinite", "forget_nonfinite")

COMPILE = """
import importlib.util, json, pathlib, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from swafast.backends import triton as backend

request = json.loads(sys.argv[1])
folder = pathlib.Path(request["folder"])
source = pathlib.Path("swafast/backends/triton_kernels.py").read_text()
for old, new in request["edits"]:
    assert old in source, f"not there: {old!r}"
    source = source.replace(old, new)
path = folder / "kernels.py"
path.write_text(source)
spec = importlib.util.spec_from_file_location("swafast.backends.kernels", path)
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
target = GPUTarget(*request["target"])
tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for name in request["kernels"]:
    kernel = getattr(kernels, f"{name}_kernel")
    # What a launch makes of its arguments: whatever the integer, it stands for no code of its own.
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(target))
    types = {tuple(bind(*[value] * len(kernel.params))[1]) for value in (0, 1, 16, -3, 2**40, 2**62)}
    assert len(types) == 1, f"a value could make it compile anew: {types}"
    signature = {param.name: kind for param, (kind, attribute) in zip(kernel.params, types.pop()) if attribute is None}
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
    def wide_blocks(self) -> Counter[tuple[int, int]]:
        """How many blocks of the PTX have this many (loads, stores) of 16 bytes: one for each wide tile."""
        blocks = re.split(r"^\$L__BB\S+:", self.ptx, flags=re.MULTILINE)
        counts = ((len(re.findall(WIDE_LOAD, block)), len(re.findall(WIDE_STORE, block))) for block in blocks)
        return Counter(count for count in counts if count != (0, 0))

    @property
    def loads_in_flight(self) -> list[int]:
        """How many loads of 16 bytes a thread starts before each run of stores of 16 bytes."""
        runs = re.findall(r"L+(?=S)", "".join(kind[0] for kind in re.findall(r"\b(LDG|STG)\S*\.128\b", self.sass)))
        return list(map(len, runs))

    @property
    def registers(self) -> int:
        return int(re.findall(r"REG:(\d+)", self.resources)[0])


WIDE_LOAD, WIDE_STORE = (rf"\b{op}\.global[\w.:]*\.v4\.b32\b" for op in ("ld", "st"))

#: Edits of the source, as (old, new).
Edits = tuple[tuple[str, str], ...]


def compile_kernels(
    folder: Path, target: tuple[str, int | str, int], kernels: tuple[str, ...], edits: Edits = (), **options: object
) -> dict[str, Code]:
    request = {"folder": str(folder), "target": target, "kernels": kernels, "edits": edits, "options": options}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-c", COMPILE, json.dumps(request)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    fields = dict.fromkeys(Code.__dataclass_fields__, "")
    return {name: Code(**{**fields, **json.loads((folder / f"{name}.json").read_text())}) for name in kernels}


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Code]:
    return compile_kernels(tmp_path_factory.mktemp("hopper"), ("cuda", 90, 32), KERNELS)


@cache
def expected_wide_blocks(kernel: str) -> Counter[tuple[int, int]]:
    """Give (loads, stores) of 16 bytes a thread for each pair of a dtype and a format, of 16 elements in each array."""
    if kernel == "exchange":
        return Counter({(8, 8): 3})
    if kernel == "nonfinite":
        return Counter({(4, 0): 3})
    if kernel == "forget_nonfinite":
        return Counter()
    formats = ((4,), (2, 2), (2, 4))  # bytes of an element in each plane
    pairs = ((param + sum(planes), sum(planes)) for param in (4, 2, 2) for planes in formats)
    return Counter([*pairs, (4, 4)])  # and bytes, 64 a thread


def check_wide(kernel: str, code: Code) -> None:
    assert code.wide_blocks == expected_wide_blocks(kernel)
    wide = Counter(re.findall(r"\b(LDG|STG)\S*\.128\b", code.sass))
    loads, stores = (sum(block[i] * n for block, n in expected_wide_blocks(kernel).items()) for i in (0, 1))
    assert wide["LDG"] >= loads
    assert wide["STG"] >= stores
    assert min(code.loads_in_flight, default=4) >= 4


def check_registers(code: Code) -> None:
    """Four programs of 256 threads share a multiprocessor's 65536 registers; nothing goes to memory for want of one."""
    assert code.registers <= 64
    assert re.findall(r"\b(?:LDL|STL)\b\S*", code.sass) == []
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", code.resources) == ["0", "0"]
    assert ".local" not in code.ptx


def check_no_exchange_of_threads(code: Code) -> None:
    """Elements stay with their thread: shared memory has nothing but what an atomic gives to the whole program."""
    assert code.shared <= 8


def check_arithmetic(code: Code) -> None:
    """Products and sums of float64 are rounded each on its own, and quotients as IEEE 754 has it."""
    operations = set(re.findall(r"\b(?:fma|mad|mul|add|sub|div|rcp|ex2|lg2)\.[\w.]*f\d+\b", code.ptx))
    wanted = {f"{op}.rn.f64" for op in ("mul", "add", "sub", "div")} | {"fma.rn.f32", "sub.rn.f32"}
    assert wanted <= operations
    assert operations <= wanted | {"add.rn.f32"}


@pytest.mark.parametrize("kernel", KERNELS)
def test_wide_paths_move_16_bytes_and_load_before_they_store(hopper: dict[str, Code], kernel: str) -> None:
    check_wide(kernel, hopper[kernel])


@pytest.mark.parametrize("kernel", KERNELS)
def test_four_programs_fit_on_a_multiprocessor_and_nothing_spills(hopper: dict[str, Code], kernel: str) -> None:
    assert backend._PROGRAMS_PER_MULTIPROCESSOR == 4
    check_registers(hopper[kernel])


@pytest.mark.parametrize("kernel", ["update", "exchange"])
def test_elements_stay_with_their_thread(hopper: dict[str, Code], kernel: str) -> None:
    check_no_exchange_of_threads(hopper[kernel])


def test_the_weight_is_rounded_operation_by_operation(hopper: dict[str, Code]) -> None:
    check_arithmetic(hopper["update"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_argument_is_64_bits_whatever_its_value(hopper: dict[str, Code], kernel: str) -> None:
    assert set(hopper[kernel].signature.values()) == {"i64"}


@pytest.mark.parametrize("kernel", ["update", "exchange"])
def test_programs_say_that_they_have_read_with_acquire_and_release(hopper: dict[str, Code], kernel: str) -> None:
    ptx = hopper[kernel].ptx
    assert re.findall(r"\batom\.\S+", ptx) == ["atom.global.gpu.acq_rel.add.u64"]
    barrier, atomic = re.search(r"\b(?:bar|barrier)(?:\.cta)?\.sync", ptx), ptx.index("atom.global")
    assert barrier is not None
    assert barrier.start() < atomic


HINT = ("pointer = tl.multiple_of(pointer, 16)", "pointer = pointer")
HALVES = ("if WIDE and FORMAT == 2:", "if WIDE and FORMAT == 7:")


def test_code_without_the_hint_is_seen(tmp_path: Path) -> None:
    code = compile_kernels(tmp_path, ("cuda", 90, 32), ("exchange",), (HINT,))["exchange"]
    with pytest.raises(AssertionError):
        check_wide("exchange", code)


def test_code_that_carries_elements_between_threads_is_seen(tmp_path: Path) -> None:
    code = compile_kernels(tmp_path, ("cuda", 90, 32), ("update",), (HALVES,))["update"]
    with pytest.raises(AssertionError):
        check_no_exchange_of_threads(code)


def test_fused_products_are_seen(tmp_path: Path) -> None:
    code = compile_kernels(tmp_path, ("cuda", 90, 32), ("update",), enable_fp_fusion=True)["update"]
    with pytest.raises(AssertionError):
        check_arithmetic(code)


def test_spilt_registers_are_seen(tmp_path: Path) -> None:
    code = compile_kernels(tmp_path, ("cuda", 90, 32), ("update",), maxnreg=32)["update"]
    with pytest.raises(AssertionError):
        check_registers(code)


@pytest.mark.skipif(
    importlib.util.find_spec("triton.backends.amd") is None, reason="this Triton has no compiler for AMD GPUs"
)
def test_the_kernels_compile_for_an_amd_gpu(tmp_path: Path) -> None:
    made = compile_kernels(tmp_path, ("hip", "gfx942", 64), KERNELS)
    for kernel, code in made.items():
        loads = len(re.findall(r"\b(?:buffer|global)_load_dwordx4\b", code.assembly))
        assert loads >= sum(block[0] * n for block, n in expected_wide_blocks(kernel).items())
        assert set(re.findall(r"[sv]gpr_spill_count: *(\d+)", code.assembly)) == {"0"}
        assert "scratch_" not in code.assembly
