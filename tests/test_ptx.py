"""The translator of PTX: what each instruction gives, what ends a kernel, and what is refused.

By ``pytest -m kernels``, ``tests/test_backends.py`` holds the translated kernels to the reference, and
``tests/test_ptx_bugs.py`` plants bugs in their PTX.
"""

from __future__ import annotations

import ctypes
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.native_build import COMPILER, compile_object, needs_compiler, run
from tests.ptx.instructions import MEANINGS
from tests.ptx.library import FLAGS, build_translated
from tests.ptx.read import PtxError, read_kernels
from tests.ptx.translate import translate

# Instructions, one kernel each

HEAD = """
.version 9.0
.target sm_90
.address_size 64
"""


def kernel_of(name: str, *statements: str, num_threads: int = 32) -> str:
    """Return a kernel whose param is an address; %r9 is the thread's index, and %rd9 the address of its word."""
    return "\n".join(
        [
            f".visible .entry {name}(",
            f"  .param .u64 {name}_param_0",
            f")\n.reqntid {num_threads}\n{{",
            "  .reg .pred %p<9>;\n  .reg .b16 %rs<9>;\n  .reg .b32 %r<10>;\n  .reg .b64 %rd<10>;",
            "  .shared .align 16 .b8 kept[16];",
            f"  ld.param.u64 %rd8, [{name}_param_0];",
            "  mov.u32 %r9, %tid.x;",
            "  mad.wide.u32 %rd9, %r9, 8, %rd8;",
            *(f"  {statement};" for statement in statements),
            "  ret;\n}",
        ]
    )


#: An instruction without its result, and the bits that PTX says it gives. %p1 is true, and %p2 false.
CASES = """
mov.b32 7 = 0x7
cvta.to.global.u64 0x123456789a = 0x123456789a
add.s32 0x7fffffff, 1 = 0x80000000
add.s16 0xffff, 2 = 0x1
add.rn.f32 0f3F800000, 0f33800000 = 0x3f800000
sub.s64 0, 1 = 0xffffffffffffffff
sub.rn.f64 0d3FF0000000000000, 0d3FF0000000000000 = 0x0
mul.lo.s32 0x10001, 0x10001 = 0x20001
mul.lo.s16 0xffff, 0xffff = 0x1
mul.rn.f32 0f3F800001, 0f3F800001 = 0x3f800002
mul.hi.u32 0xffffffff, 0xfffffffe = 0xfffffffd
mul.wide.u16 0x1ffff, 2 = 0x1fffe
mul.wide.u32 0xffffffff, 2 = 0x1fffffffe
mul.wide.s32 -1, 2 = 0xfffffffffffffffe
mad.lo.s32 3, 5, -16 = 0xffffffff
mad.wide.s16 -1, 2, 3 = 0x1
mad.wide.u32 0xffffffff, 2, 3 = 0x200000001
mad.wide.s32 -1, 2, 3 = 0x1
fma.rn.f32 0f3F800001, 0f3F800001, 0fBF800002 = 0x28800000
div.rn.f64 0d3FF0000000000000, 0d4008000000000000 = 0x3fd5555555555555
rcp.rn.f64 0d4008000000000000 = 0x3fd5555555555555
sqrt.rn.f32 0f40000000 = 0x3fb504f3
sqrt.rn.f64 0d4000000000000000 = 0x3ff6a09e667f3bcd
rem.s64 -7, 3 = 0xffffffffffffffff
rem.u32 0xfffffff9, 3 = 0x0
neg.s64 1 = 0xffffffffffffffff
neg.f32 0f00000000 = 0x80000000
min.s32 -1, 1 = 0xffffffff
min.u32 -1, 1 = 0x1
max.s64 -1, 1 = 0x1
min.f64 0d7FF8000000000000, 0d3FF0000000000000 = 0x3ff0000000000000
max.f32 0fBF800000, 0f7FC00000 = 0xbf800000
and.b64 0xff00ff00ff, 0xffff0000ff = 0xff000000ff
or.b16 0xf0, 0x0f = 0xff
xor.b32 0xff, 0x0f = 0xf0
and.pred %p1, %p2 = 0x0
or.pred %p1, %p2 = 0x1
not.b32 0xff = 0xffffff00
not.pred %p1 = 0x0
shl.b32 1, 31 = 0x80000000
shl.b32 1, 32 = 0x0
shl.b16 0xffff, 8 = 0xff00
shr.u32 0x80000000, 31 = 0x1
shr.u64 0x8000000000000000, 64 = 0x0
shr.s32 0x80000000, 4 = 0xf8000000
shr.s64 0x8000000000000000, 70 = 0xffffffffffffffff
shf.l.wrap.b32 0x80000000, 1, 33 = 0x3
selp.b32 5, 6, %p1 = 0x5
selp.f64 0d3FF0000000000000, 0d7FF0000000000001, %p2 = 0x7ff0000000000001
setp.eq.s32 -1, 0xffffffff = 0x1
setp.eq.f32 0f00000000, 0f80000000 = 0x1
setp.ne.b64 1, 0x100000001 = 0x1
setp.lt.s32 -1, 1 = 0x1
setp.lt.u32 -1, 1 = 0x0
setp.lt.f32 0f7FC00000, 0f3F800000 = 0x0
setp.le.s64 2, 1 = 0x0
setp.gt.u64 0x8000000000000000, 1 = 0x1
setp.gt.s64 0x8000000000000000, 1 = 0x0
setp.ge.f64 0d3FF0000000000000, 0d3FF0000000000000 = 0x1
setp.ne.f32 0f7FC00000, 0f3F800000 = 0x0
setp.equ.f32 0f7FC00000, 0f3F800000 = 0x1
setp.neu.f32 0f7FC00000, 0f7FC00000 = 0x1
setp.neu.f32 0f00000000, 0f80000000 = 0x0
setp.ltu.f32 0f7FC00000, 0f3F800000 = 0x1
setp.leu.f32 0f40000000, 0f3F800000 = 0x0
setp.gtu.f32 0f40000000, 0f3F800000 = 0x1
setp.geu.f32 0f00000000, 0f3F800000 = 0x0
setp.nan.f32 0f3F800000, 0f7FC00000 = 0x1
setp.num.f64 0d3FF0000000000000, 0d7FF8000000000000 = 0x0
cvt.u32.u16 0x18001 = 0x8001
cvt.s32.s8 0x1ff = 0xffffffff
cvt.u32.u8 0x1ff = 0xff
cvt.s64.s32 0x80000000 = 0xffffffff80000000
cvt.u64.u32 0x80000000 = 0x80000000
cvt.u16.u32 0x12345 = 0x2345
cvt.f64.f32 0f3F800001 = 0x3ff0000020000000
cvt.f64.f16 0x8001 = 0xbe70000000000000
cvt.f32.f16 0x7bff = 0x477fe000
cvt.f32.f16 1 = 0x33800000
cvt.rn.f16.f32 0f477FEFFF = 0x7bff
cvt.rn.f16.f32 0f477FF000 = 0x7c00
cvt.rn.f16.f32 0f33000000 = 0x0
cvt.rn.f32.f64 0d3FF0000010000000 = 0x3f800000
cvt.rn.f32.f64 0d3FF0000010000001 = 0x3f800001
cvt.rn.f64.s64 -2 = 0xc000000000000000
cvt.rn.f64.u64 0x8000000000000000 = 0x43e0000000000000
cvt.rn.f32.s32 0x1000001 = 0x4b800000
cvt.rn.f16x2.f32 0f3F800000, 0f40000000 = 0x3c004000
cvt.rmi.f32.f32 0fBF000000 = 0xbf800000
cvt.rmi.f64.f64 0d3FE0000000000000 = 0x0
cvt.rzi.s32.f32 0fBFC00000 = 0xffffffff
cvt.rzi.s32.f32 0f4F000000 = 0x7fffffff
cvt.rzi.s32.f32 0f7FC00000 = 0x0
cvt.rzi.s32.f64 0d7FF8000000000000 = 0x80000000
cvt.rzi.s64.f32 0f7FC00000 = 0x8000000000000000
cvt.rzi.s64.f64 0dC3E0000000000001 = 0x8000000000000000
cvt.rzi.s64.f64 0d43E0000000000000 = 0x7fffffffffffffff
prmt.b32 0x33221100, 0x77665544, 0x7632 = 0x77663322
prmt.b32 0x33221180, 0x77665544, 0x5418 = 0x554411ff
brev.b32 0xd = 0xb0000000
bfe.s64 0xff000000, 24, 8 = 0xffffffffffffffff
bfe.u32 0xff000000, 24, 4 = 0xf
bfe.s32 0x80000000, 28, 8 = 0xfffffff8
bfe.s32 0x80000000, 31, 0 = 0x0
bfi.b64 0x3, 0xff00ff00ff00ff00, 32, 32 = 0x3ff00ff00
bfi.b32 0xabcd, 0xffffffff, 8, 4 = 0xfffffdff
bfi.b32 0xff, 0x0, 28, 8 = 0xf0000000
createpolicy.fractional.L2::evict_first.b64 1.0 = 0x0
shfl.sync.bfly.b32 %r9, 8, 31, -1 = 0x8
redux.sync.add.u32 %r9, -1 = 0x1f0
redux.sync.min.s32 %r9, -1 = 0x0
redux.sync.max.s32 %r9, -1 = 0x1f
"""
WIDTHS = {"16": "rs", "32": "r", "64": "rd"}


def case_of(line: str) -> tuple[str, str, int]:
    """Return (mnemonic, operands, bits)."""
    mnemonic, operands, bits = re.fullmatch(r"(\S+) (.*) = (\w+)", line).groups()  # type: ignore[union-attr]
    return mnemonic, operands, int(bits, 16)


EACH_CASE = [case_of(line) for line in CASES.strip().splitlines()]


def kernel_of_case(name: str, mnemonic: str, operands: str) -> str:
    before, result = ["setp.eq.s32 %p1, 0, 0", "setp.ne.s32 %p2, 0, 0"], MEANINGS[mnemonic].result
    if result == "pred":
        run = [f"{mnemonic} %p3, {operands}", "selp.b64 %rd1, 1, 0, %p3"]
    else:
        width = result[1:]
        register = f"%{WIDTHS[width]}1"
        run = [f"{mnemonic} {register}, {operands}"]
        run += [] if width == "64" else [f"cvt.u64.u{width} %rd1, {register}"]
    return kernel_of(name, *before, *run, "st.global.b64 [%rd9], %rd1")


OTHERS = {
    "jumps": [
        "bra $L2;\n$L1:\n st.global.b64 [%rd9], 1; bra.uni $L3;\n$L2:\n mov.u32 %r1, 1; brx.idx %r1, TABLE;\n"
        "TABLE:\n .branchtargets\n $L3,\n $L1;\n$L3:\n setp.eq.s32 %p1, 0, 0; @!%p1 st.global.b64 [%rd9], 2"
    ],
    "vectors": [
        "mov.b64 %rd1, 0x100000002; mov.b64 {%r1, %r2}, %rd1; st.shared.v2.u32 [kept+8], {%r2, %r1};\n"
        "mov.u32 %r3, kept; ld.shared::cta.b64 %rd2, [ %r3 + 8 ]; mov.b32 {%rs1, _}, %r1; mov.b32 %r4, {%rs1, %rs1};\n"
        "cvt.u64.u32 %rd3, %r4; add.s64 %rd2, %rd2, %rd3; st.global.cs.b64 [%rd9], {%rd2}"
    ],
    "atomics": [
        "st.global.b64 [%rd9], 5; atom.global.gpu.acq_rel.add.u64 %rd1, [%rd9], %rd9;\n"
        "red.global.min.u64 [%rd9], %rd1; atom.global.max.s64 %rd2, [%rd9], -1;\n"
        "atom.relaxed.gpu.global.exch.b64 %rd3, [%rd9], 9"
    ],
    "laps": [
        "st.global.b64 [%rd9], 2; atom.global.inc.u32 %r1, [%rd9], 3; atom.global.inc.u32 %r2, [%rd9], 3;\n"
        "mul.wide.u32 %rd1, %r1, 16; mul.wide.u32 %rd2, %r2, 1; add.s64 %rd1, %rd1, %rd2;\n"
        "ld.global.u32 %rd2, [%rd9]; shl.b64 %rd2, %rd2, 8; add.s64 %rd1, %rd1, %rd2; st.global.b64 [%rd9], %rd1"
    ],
    "copies": [
        "cvt.u64.u32 %rd1, %r9; st.global.b64 [%rd9], %rd1; bar.sync 0; mov.u32 %r1, kept;\n"
        "cp.async.ca.shared.global [%r1], [%rd8+16], 16; cp.async.wait_all; bar.sync 0;\n"
        "ld.shared.b64 %rd1, [kept+8]; st.global.b64 [%rd9], %rd1"
    ],
    "unwaited": [
        "st.global.b64 [%rd9], 7; bar.sync 0; mov.u32 %r1, kept; cp.async.ca.shared.global [%r1], [%rd8+16], 16;\n"
        "bar.sync 0; ld.shared.b64 %rd1, [kept+8]; st.global.b64 [%rd9], %rd1"
    ],
    # Warps do not wait for each other at an exchange: the first one does not see what the second one writes before.
    "apart": [
        "setp.eq.s32 %p1, %r9, 32; @%p1 st.shared.b32 [kept], 7; shfl.sync.bfly.b32 %r1, %r9, 1, 31, -1;\n"
        "ld.shared.u32 %rd1, [kept]; st.global.b64 [%rd9], %rd1"
    ],
    "exchange": [
        "mov.u32 %r1, 100; add.s32 %r1, %r1, %r9; bar.sync 0; shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;\n"
        "shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1; cvt.u64.u32 %rd1, %r3; st.global.b64 [%rd9], %rd1"
    ],
}


#: What a host compiler made of kernels, and PTX stands in the place of.
HOST = """
#include <cuda_runtime.h>
extern "C" void in_its_place(long long) {}
extern "C" void of_other_params(long long, int) {}
extern "C" void of_more_threads(long long) {}
template <class... Expected>
void launch(void (*kernel)(Expected...), unsigned num_threads, Expected... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(num_threads);
  cudaLaunchKernelEx(&config, kernel, arguments...);
}
extern "C" SHIM_SETTING int launch_from_host(const char* name, unsigned, const long long* address, long long) {
  if (!std::strcmp(name, "in_its_place")) launch(in_its_place, 32, *address);
  if (!std::strcmp(name, "of_other_params")) launch(of_other_params, 32, *address, 0);
  if (!std::strcmp(name, "of_more_threads")) launch(of_more_threads, 64, *address);
  return 0;
}
"""
IN_PLACE = {"of_other_params": "the PTX has other params", "of_more_threads": "for narrower blocks"}


@dataclass(frozen=True)
class Program:
    """Translated kernels, in a library."""

    library: Path
    function: str = "shim_launch"  # which launches them

    def launch(self, name: str, num_threads: int = 32) -> list[int]:
        """Return the words that the threads leave."""
        words = (ctypes.c_ulonglong * num_threads)()
        address = (ctypes.c_longlong * 1)(ctypes.addressof(words))
        assert ctypes.CDLL(str(self.library))[self.function](name.encode(), 1, address, 1) == 0
        return list(words)

    def fault(self, name: str) -> str:
        """Return what a process says that dies of a kernel."""
        script = (
            "import ctypes, sys; words = (ctypes.c_ulonglong * 64)();"
            "address = (ctypes.c_longlong * 1)(ctypes.addressof(words));"
            "ctypes.CDLL(sys.argv[1])[sys.argv[2]](sys.argv[3].encode(), 1, address, 1)"
        )
        command = [sys.executable, "-c", script, str(self.library), self.function, name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == -signal.SIGABRT, done
        return done.stderr


FAULTS = {
    "add.s64 %rd1, %rd8, 4; ld.global.b64 %rd2, [%rd1]": "misaligned address",
    "mov.b64 %rd1, 4; ld.shared.b64 %rd1, [kept+16]": "outside shared memory",
    "shfl.sync.bfly.b32 %r1, %r9, 1, 31, 3": "some threads of a warp",
    "shfl.sync.bfly.b32 %r1, %r9, 1, 15, -1": "parts of a warp",
    "setp.eq.s32 %p1, %r9, 3; @%p1 bra $A; shfl.sync.bfly.b32 %r1, %r9, 1, 31, -1;\n$A:\n": "thread of the warp",
    "setp.eq.s32 %p1, %r9, 3; @%p1 bra $A; bar.sync 0;\n$A:\n": "not every thread",
    "setp.eq.s32 %p1, %r9, 3; @%p1 bra $A; redux.sync.add.u32 %r1, 1, -1; bra $B;\n$A:\n"
    "redux.sync.add.u32 %r1, 1, -1;\n$B:\n": "at two exchanges",
    "mov.u32 %r1, 1; brx.idx %r1, TABLE;\nTABLE:\n.branchtargets $A;\n$A:\n": "a branch to nowhere",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    kernels = [kernel_of_case(f"case_{i}", mnemonic, at) for i, (mnemonic, at, _) in enumerate(EACH_CASE)]
    kernels += [kernel_of(name, *statements, num_threads=64) for name, statements in OTHERS.items()]
    kernels += [kernel_of(f"fault_{i}", statements) for i, statements in enumerate(FAULTS)]
    return Program(build_translated(tmp_path_factory.mktemp("program"), "cases", HEAD + "\n".join(kernels)))


@needs_compiler
@pytest.mark.parametrize("index", range(len(EACH_CASE)), ids=[f"{name} {at}" for name, at, _ in EACH_CASE])
def test_an_instruction_gives_what_ptx_says(program: Program, index: int) -> None:
    assert hex(program.launch(f"case_{index}")[0]) == hex(EACH_CASE[index][2])


def test_every_expression_has_a_case() -> None:
    tested = {MEANINGS[mnemonic].expression for mnemonic, _, _ in EACH_CASE}
    assert {meaning.expression for meaning in MEANINGS.values()} - tested == set()


@needs_compiler
def test_statements_do_what_ptx_says(program: Program) -> None:
    assert program.launch("jumps", 64) == [1] * 64
    assert program.launch("vectors", 64) == [0x200000001 + 0x20002] * 64
    assert program.launch("atomics", 64) == [9] * 64
    assert program.launch("laps", 64) == [0x023] * 64
    assert program.launch("copies", 64) == [3] * 64
    assert program.launch("unwaited", 64) == [0] * 64
    assert program.launch("apart", 64) == [0xABABABAB] * 32 + [7] * 32
    assert program.launch("exchange", 64) == [100 + (thread ^ 17) for thread in range(64)]


@needs_compiler
@pytest.mark.parametrize("index", range(len(FAULTS)), ids=FAULTS.values())
def test_a_fault_ends_the_program_with_a_reason(program: Program, index: int) -> None:
    assert [*FAULTS.values()][index] in program.fault(f"fault_{index}")


@pytest.fixture(scope="module")
def in_place(tmp_path_factory: pytest.TempPathFactory) -> Program:
    kernels = [kernel_of(name, "st.global.b64 [%rd9], 7") for name in ("in_its_place", *IN_PLACE)]
    folder = tmp_path_factory.mktemp("in_place")
    sources = {"host": HOST, "ptx": translate(read_kernels(HEAD + "\n".join(kernels)), has_source=True)}
    objects = []
    for name, source in sources.items():
        path = folder / f"{name}.cpp"
        path.write_text(source)
        objects.append(str(compile_object(path, folder / f"{name}.o", [*FLAGS, "-fPIC", "-fvisibility=hidden"])))
    run([*COMPILER, "-shared", *objects, "-o", str(folder / "libin_place.so")])
    return Program(folder / "libin_place.so", "launch_from_host")


@needs_compiler
def test_a_launch_of_the_source_runs_the_ptx(in_place: Program) -> None:
    assert in_place.launch("in_its_place") == [7] * 32


@needs_compiler
@pytest.mark.parametrize("name", IN_PLACE)
def test_ptx_that_does_not_fit_the_source_ends_the_program(in_place: Program, name: str) -> None:
    assert IN_PLACE[name] in in_place.fault(name)


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        (
            "add.u128 %rd1, %rd2, 1",
            r"a_kernel, line 18: unknown instruction 'add.u128 %rd1, %rd2, 1': say in tests/ptx",
        ),
        ("add.f32 %r1, %r1, %r1", "unknown instruction 'add.f32"),
        ("add.s32 %r1, %r1", "unknown instruction 'add.s32 %r1, %r1'"),
        ("ld.volatile.global.u32 %r1, [%rd1]", "unknown instruction 'ld.volatile"),
        ("ld.u32 %r1, [%rd1]", "unknown instruction 'ld.u32"),
        ("ld.global.v2.u32 %r1, [%rd1]", "unknown instruction 'ld.global.v2.u32"),
        ("st.global.u32 [a_kernel_param_0], %r1", "unknown address"),
        ("mov.u32 %r1, %clock", "unknown operand '%clock'"),
        ("mov.u32 %q1, 3", "unknown operand '%q1'"),
        ("brx.idx %r1, NOWHERE", "unknown instruction 'brx.idx"),
        ("bar.sync 1", "unknown instruction 'bar.sync 1'"),
        (".local .b8 depot[8]", r"line 18: unknown directive '.local .b8 depot\[8\]'"),
        # What ptxas refuses, or reads in another way than the translator would
        ("mov.f32 %r1, 0d3FF0000000000000", "'0d3FF0000000000000' has 64 bits, and the instruction asks for 32"),
        ("mul.rn.f64 %rd1, %rd2, 0f3F800000", "'0f3F800000' has 32 bits, and the instruction asks for 64"),
        ("add.rn.f32 %r1, %r2, 1", "unknown operand '1'"),
        ("mov.u32 %r1, 010", "unknown operand '010'"),
        ("mov.u32 %r1, 0b11", "unknown operand '0b11'"),
        ("mov.b64 %rd1, 99999999999999999999999", "'99999999999999999999999' has more than 64 bits"),
        ("add.s32 %rd1, %r1, 1", "'%rd1' has 64 bits, and the instruction asks for 32"),
        ("add.s64 %rd1, %r1, 1", "'%r1' has 32 bits, and the instruction asks for 64"),
        ("add.s32 %r1, %r1, %p1", "'%p1' has 1 bits, and the instruction asks for 32"),
        ("setp.eq.s32 %r1, %r2, 0", "'%r1' has 32 bits, and the instruction asks for 1"),
        ("@%r1 mov.u32 %r2, 1", "'%r1' has 32 bits, and the instruction asks for 1"),
        ("cvt.u64.u32 %r1, %r2", "'%r1' has 32 bits, and the instruction asks for 64"),
        ("mov.u64 %rd1, %tid.x", "'%tid.x' has 32 bits, and the instruction asks for 64"),
        ("mov.b64 {%r1, %r2, %r3}, %rd1", "unknown instruction 'mov.b64 {%r1, %r2, %r3}"),
        ("mov.b32 {%rs1, %rs2, %rs3, %rs4}, %r1", "unknown instruction 'mov.b32"),
        ("mov.u32 %r10, 1", "unknown operand '%r10'"),
        ("ld.global.b32 %r1, [%r2]", "'%r2' has 32 bits, and the instruction asks for 64"),
        ("ld.global.b128 %rd1, [%rd2]", "unknown instruction 'ld.global.b128"),
        ("ld.global.v4.b64 {%rd1, %rd2, %rd3, %rd4}, [%rd8]", "unknown instruction 'ld.global.v4.b64"),
        ("ld.param.b64 %rd1, [a_kernel_param_0+8]", "is outside its param"),
        ("ld.param.b32 %r1, [a_kernel_param_0+-4]", "is outside its param"),
        ("st.param.b64 [a_kernel_param_0], %rd1", "unknown instruction 'st.param.b64"),
        ('.pragma "nounroll"; mov.b64 %rd1, 5', "line 18: unknown directive '.pragma"),
        (".maxnreg 64; mov.b64 %rd1, 5", "line 18: unknown directive '.maxnreg 64'"),
        (".loc 1 2 3; mov.b64 %rd1, 5", "line 18: unknown directive '.loc 1 2 3'"),
        ("{\n .reg .b32 %rd<4>;\n mov.b32 %rd1, 5;\n}\n", "unknown directive '.reg .b32 %rd<4>'"),
    ],
    ids=lambda value: " ".join(value.split()),
)
def test_what_is_not_known_is_refused(statement: str, says: str) -> None:
    with pytest.raises(PtxError, match=says):
        translate(read_kernels(HEAD + kernel_of("a_kernel", statement)), has_source=False)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (".version 9.0", ".version 10.1", "unknown directive '.version 10.1'; PTX 7 to 9 for sm_90 or sm_90a is known"),
        (".target sm_90", ".target sm_100", "unknown directive '.target sm_100'"),
        (".reqntid 32", ".reqntid 8, 4", "unknown directive '.reqntid 8, 4'"),
        ("ret;", "ret", "does not end"),
        (".visible .entry", ".func", "unknown directive '.func"),
        (".address_size 64", ".address_size 32", "unknown directive '.address_size 32"),
    ],
)
def test_ptx_of_another_version_is_refused(old: str, new: str, says: str) -> None:
    ptx = HEAD + kernel_of("a_kernel")
    assert len(read_kernels(ptx)) == 1
    with pytest.raises(PtxError, match=says):
        read_kernels(ptx.replace(old, new))
