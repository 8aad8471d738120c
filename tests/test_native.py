"""The native CPU backend against ``reference``, bit for bit; only a NaN's sign and payload are its own.

``tests/native`` holds the same kernels to an oracle without torch.
"""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swafast.backends import cpu, library, reference
from swafast.backends.contract import Launch, Pair
from swafast.op.launches import draws_of
from swafast.terms.formats import EXACT, FLOAT32, Format, decode_exact, encode_exact
from swafast.terms.rules import EqualAverage, ExponentialAverage, Rule
from tests.conftest import NO_LIBRARY
from tests.kernels import (
    DTYPES,
    EXCHANGED,
    FORMATS,
    INT64_MAX,
    PAIRS,
    RULES,
    check_exchange,
    clone,
    differing,
    make_pair,
    same_bits,
    sizes_around,
    update,
)

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{NO_LIBRARY}: {cpu.unavailable()}")

ROOT = Path(__file__).parents[1]
WEIGHTS = (1.0, 0.0, 1e-3, 0.3, 0.5, 0.9)


@pytest.fixture(params=["generic", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.current_isa()
    try:
        cpu.use_isa(request.param)
    except ValueError:
        pytest.skip(f"needs a processor with {request.param}")
    yield request.param
    cpu.use_isa(before)


@pytest.fixture(params=[64, 100])
def chunk_numel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cpu, "CPU_CHUNK_NUMEL", request.param)
    return request.param


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch, chunk_numel: int) -> Iterator[int]:
    """As many threads, however small the tensors are: two for the shorter chunks, one for the others."""
    number = 2 if chunk_numel == 64 else 1
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu, "_NUMEL_PER_THREAD", 1)
    torch.set_num_threads(number)
    yield number
    torch.set_num_threads(before)


def check_updates(
    pairs: Sequence[Pair],
    weights: Sequence[float] = WEIGHTS,
    plant: Callable[[cpu.NativeLaunch], None] = lambda launch: None,
) -> None:
    """Hold updates of both backends together: by each weight from the same averages, each with a counter of its own.

    ``plant`` spoils the native tables, for a test of this check.
    """
    assert all(map(cpu.serves, pairs))
    initial, expected = clone(pairs), clone(pairs)
    launch = cpu.prepare(pairs)
    plant(launch)
    launches: tuple[Launch, Launch] = (launch, reference.prepare(expected))
    counters = torch.tensor(1), torch.tensor(1)
    for weight in weights:
        rule = ExponentialAverage(1.0 - weight)
        for each, on, counter in zip(launches, (pairs, expected), counters, strict=True):
            for pair, start in zip(on, initial, strict=True):
                for plane, value in zip(pair.planes, start.planes, strict=True):
                    plane.copy_(value)
            update(each, on, [rule], [counter])
        assert differing(pairs, expected) == [], f"weight {weight}"
        assert torch.equal(*counters)


@PAIRS
def test_updates_equal_the_reference(isa: str, chunk_numel: int, threads: int, dtype: torch.dtype, fmt: Format) -> None:
    check_updates([make_pair(n, dtype, fmt, offset) for n in sizes_around(chunk_numel) for offset in (0, 1, 6)])


def _shorten_a_chunk(launch: cpu.NativeLaunch) -> None:
    launch._chunks[0, 2] -= 1


def _repeat_a_chunk(launch: cpu.NativeLaunch) -> None:
    launch._chunks[1] = launch._chunks[0]


def _mistake_the_dtype(launch: cpu.NativeLaunch) -> None:
    launch._tensors[0].dtype = 2


def _mistake_the_plane(launch: cpu.NativeLaunch) -> None:
    launch._tensors[0].planes[1] = launch._tensors[0].planes[0]


@pytest.mark.parametrize("plant", [_shorten_a_chunk, _repeat_a_chunk, _mistake_the_dtype, _mistake_the_plane])
def test_the_check_of_updates_sees_a_spoiled_table(
    isa: str, small_chunks: int, plant: Callable[[cpu.NativeLaunch], None]
) -> None:
    with pytest.raises(AssertionError, match="weight"):
        check_updates([make_pair(3 * small_chunks, torch.bfloat16, EXACT)], plant=plant)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float64])
def test_copies_equal_the_reference(isa: str, chunk_numel: int, dtype: torch.dtype) -> None:
    check_updates([make_pair(n, dtype, None, offset) for n in sizes_around(chunk_numel) for offset in (0, 1)])


def test_one_launch_serves_many_tensors_of_all_kinds(isa: str, threads: int) -> None:
    pairs = [make_pair(n % 7, dtype, fmt, n % 3) for n in range(60) for dtype in DTYPES for fmt in FORMATS] + [
        make_pair(n % 7, torch.int32, None) for n in range(60)
    ]
    check_updates(pairs, (0.3,))


@PAIRS
def test_dense_layouts_equal_the_reference(isa: str, chunk_numel: int, dtype: torch.dtype, fmt: Format) -> None:
    views = (
        lambda flat: flat.view(5, 7, 3, 4).permute(0, 3, 1, 2),  # channels_last
        lambda flat: flat.view(20, 21).t(),
        lambda flat: flat.view(4, 15, 7).permute(2, 0, 1),
        lambda flat: flat.view(1, 420, 1),
        lambda flat: flat[0],
        lambda flat: flat[:0].view(0, 4),
    )
    flat = [make_pair(420, dtype, fmt) for _ in views]
    pairs = [
        Pair(str(i), param, tuple(map(view, pair.planes)), fmt, draws_of(0, str(i), param, fmt))
        for i, (view, pair) in enumerate(zip(views, flat, strict=True))
        for param in (view(pair.param),)
    ]
    assert pairs[0].param.is_contiguous(memory_format=torch.channels_last)
    check_updates(pairs)


def test_only_dense_tensors_in_one_order_are_served() -> None:
    matrix, cube = torch.randn(6, 4), torch.randn(2, 3, 4)
    assert cpu.serves(Pair("", matrix, (torch.randn(6, 4),), FLOAT32))
    for param, average in (
        (matrix[:, ::2], torch.randn(6, 2)),
        (matrix, torch.randn(4, 6).t()),
        (matrix.t(), torch.randn(4, 6)),
        (torch.randn(6, 1).expand(6, 4), matrix),
        (cube.transpose(0, 1), torch.randn(3, 2, 4)),
        (matrix.double(), matrix.double()),
        (matrix.to(torch.complex64), matrix.to(torch.complex64)),
    ):
        assert not cpu.serves(Pair("", param, (average,), FLOAT32))
    assert not cpu.serves(Pair("", matrix, (matrix.bfloat16(), torch.zeros(4, 6, dtype=torch.int16).t()), EXACT))
    assert not cpu.serves(Pair("", torch.randn(3), (torch.randn(3).double(),), None))


@pytest.mark.parametrize("weight", [1e-8, 0.25, 0.49999997, 0.5, 0.75, 1 - 2**-24, 1 - 1e-12])
def test_weights_round_as_the_reference_rounds_them(isa: str, weight: float) -> None:
    check_updates([make_pair(5000, dtype, fmt) for dtype in DTYPES for fmt in FORMATS], (weight,))


def test_a_first_update_copies_every_bit(isa: str) -> None:
    pair = make_pair(1000, torch.float32, FLOAT32)
    update(cpu.prepare([pair]), [pair], [ExponentialAverage(0.9)], [torch.tensor(0)])
    assert torch.equal(pair.average.view(torch.int32), pair.param.view(torch.int32))


def test_a_negative_count_leaves_everything_as_it_was() -> None:
    pairs = [make_pair(1000, torch.bfloat16, EXACT), make_pair(9, torch.int64, None)]
    before, counter = clone(pairs), torch.tensor(-1)
    with pytest.raises(ValueError, match="n_averaged must be >= 0"):
        update(cpu.prepare(pairs), pairs, [EqualAverage()], [counter])
    assert differing(pairs, before) == []
    assert counter.item() == -1


def test_an_unknown_instruction_set_changes_nothing() -> None:
    before = cpu.current_isa()
    with pytest.raises(ValueError, match="isa must be one that this machine has, got 'sse9'"):
        cpu.use_isa("sse9")
    assert cpu.current_isa() == before
    assert before in cpu.describe()


@pytest.mark.parametrize(("dtype", "fmt"), [*EXCHANGED, (torch.int32, None)], ids=str)
def test_an_exchange_moves_every_bit_there_and_back(
    isa: str, chunk_numel: int, threads: int, dtype: torch.dtype, fmt: Format | None
) -> None:
    pairs = [make_pair(n, dtype, fmt, offset) for n in (*sizes_around(chunk_numel), 5000) for offset in (0, 3)]
    check_exchange(cpu.prepare(pairs), pairs)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_nonfinite_param_is_found(isa: str, chunk_numel: int, threads: int, bad: float) -> None:
    numels = (3, 0, 3 * chunk_numel + 7, 1)
    copied = Pair("copied", torch.full((9,), bad), (torch.zeros(9),), None)
    pairs = [copied] + [
        Pair("", torch.randn(n).to(dtype), fmt.encode(torch.randn(n)), fmt) for n in numels for dtype, fmt in EXCHANGED
    ]
    params = [pair.param for pair in pairs]
    launches = cpu.prepare(pairs), reference.prepare(pairs)
    assert [launch.first_nonfinite(params) for launch in launches] == [None, None]
    for index in reversed(range(1, len(pairs))):
        if params[index].numel():
            params[index][-1] = bad
            assert [launch.first_nonfinite(params) for launch in launches] == [index, index]


def test_launches_of_several_threads_do_not_meet(threads: int) -> None:
    batches = [[make_pair(20_000, dtype, fmt) for dtype in DTYPES for fmt in FORMATS] for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check_updates, batches))


def native_weight(rule: Rule, num_averaged: int) -> float:
    terms = rule.kernel_terms()
    assert terms is not None
    native_rule = library.KernelRule(terms.kind, terms.terms)
    return library.loaded().swafast_weight(ctypes.byref(native_rule), num_averaged)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_weights_equal_those_of_python(rule: Rule) -> None:
    counts = [*range(10_001), *(10**k + d for k in range(4, 13) for d in (-1, 0, 1)), 2**53 + 1, INT64_MAX]
    assert [n for n in counts if native_weight(rule, n) != rule.weight(n)] == []


def check_exact_pairs(highs: Tensor, lows: Tensor) -> None:
    """Run every pair of planes from ``highs`` x ``lows`` (int16) through an update that keeps finite values."""
    high = highs.repeat_interleave(len(lows)).view(torch.bfloat16)
    low = lows.repeat(len(highs))
    value = decode_exact((high, low))
    # The weight is 0, and 0 * infinity is NaN. A param of -1 keeps the sign of a zero.
    expected = encode_exact(torch.where(value.isinf(), math.nan, value))
    pair = Pair("", torch.full((len(high),), -1.0, dtype=torch.bfloat16), (high, low), EXACT)
    update(cpu.prepare([pair]), [pair], [ExponentialAverage(1.0)], [torch.tensor(1)])
    assert same_bits(high, expected[0])
    assert torch.equal(low, expected[1])


def test_exact_reads_and_writes_planes_as_the_formula_says(isa: str) -> None:
    edges = [sign * edge for edge in (0, 1, 2, 127, 128, 255, 256, 2**14, 2**15 - 1) for sign in (1, -1)]
    lows = torch.cat([torch.tensor([*edges, -(2**15)]), torch.randint(-(2**15), 2**15, (13,))]).to(torch.int16)
    check_exact_pairs(torch.arange(-(2**15), 2**15).to(torch.int16), lows)


@pytest.mark.slow
def test_exact_reads_and_writes_all_planes_as_the_formula_says() -> None:
    lows = torch.arange(-(2**15), 2**15).to(torch.int16)
    for start in range(-(2**15), 2**15, 64):
        check_exact_pairs(torch.arange(start, start + 64).to(torch.int16), lows)


def run_script(script: str) -> None:
    """Run Python in a process of its own, so that a crash or a hang of it fails one test."""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stdout}{done.stderr}"


GUARD_PAGES = """
import ctypes, mmap, os, resource, signal
import torch
from swafast.backends import cpu
from swafast.backends.contract import Pair
from swafast.op.launches import draws_of
from swafast.terms.rules import ExponentialAverage
from tests.kernels import DTYPES, FORMATS, any_planes, any_values, update
from tests.test_native import check_updates

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def guarded(tensor, at_end):
    # a copy whose memory ends where a page begins that nobody may touch, or begins where one ends
    if not tensor.nbytes:
        return tensor
    page = mmap.PAGESIZE
    body = -(-tensor.nbytes // page) * page
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = libc.mmap(None, body + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert base != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
    for guard in (base, base + page + body):
        assert libc.mprotect(guard, page, 0) == 0, os.strerror(ctypes.get_errno())
    start = base + page + (body - tensor.nbytes if at_end else 0)
    memory = (ctypes.c_char * tensor.nbytes).from_address(start)
    return torch.frombuffer(memory, dtype=tensor.dtype).copy_(tensor)


def guarded_pair(numel, dtype, fmt, at_end):
    tensors = (any_values(numel, dtype), *any_planes(numel, fmt))
    param, *planes = (guarded(tensor, at_end) for tensor in tensors)
    name = f"{numel} {dtype} {fmt} {at_end}"
    return Pair(name, param, tuple(planes), fmt, draws_of(0, name, param, fmt))


def crashes(dtype, fmt, plant):
    # whether an update dies of touching a guard page, in a child
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pair = guarded_pair(1000, dtype, fmt, plant == "after")
        launch = cpu.prepare([pair])
        launch._chunks[-1, 2 if plant == "after" else 1] += 1 if plant == "after" else -1
        update(launch, [pair], [ExponentialAverage(0.9)], [torch.tensor(1)])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGBUS)


torch.manual_seed(20)
best = cpu.current_isa()
for isa in ("generic", "avx2", "avx512"):
    try:
        cpu.use_isa(isa)
    except ValueError:
        continue
    for dtype in DTYPES:
        for fmt in FORMATS:
            pairs = [
                guarded_pair(numel, dtype, fmt, at_end)
                for numel in (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 1000, 4096, 5000)
                for at_end in (False, True)
            ]
            check_updates(pairs, (0.3, 0.9))
            launch = cpu.prepare(pairs)
            launch.first_nonfinite([])
            if pairs[0].param.dtype == pairs[0].average.dtype:
                launch.exchange(True)
cpu.use_isa(best)
for dtype in DTYPES:
    for fmt in FORMATS:
        for plant in ("before", "after"):
            assert crashes(dtype, fmt, plant), f"nobody saw an overrun {plant} a buffer: {dtype} {fmt}"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's mmap")
def test_no_byte_outside_the_buffers_is_touched() -> None:
    """Every buffer stands against a page that may not be touched; a chunk one element too long crashes."""
    run_script(GUARD_PAGES)


FORKED_CHILD = """
import os, signal
import torch
from swafast.backends import cpu
from swafast.terms.formats import EXACT
from tests.kernels import make_pair
from tests.test_native import check_updates

torch.set_num_threads(2)
cpu._NUMEL_PER_THREAD = 1
cpu.CPU_CHUNK_NUMEL = 64
check_updates([make_pair(10_000, torch.bfloat16, EXACT)])
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # for torch's own kernels, which hang here
    pairs = [make_pair(10_000, torch.bfloat16, EXACT)]
    cpu.NativeLaunch._threads = lambda launch: 2
    check_updates(pairs)
    os._exit(0)
signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
signal.alarm(30)
_, status = os.waitpid(child, 0)
assert status == 0, f"the child ended with status {status}"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_can_update() -> None:
    run_script(FORKED_CHILD)
