"""The native CPU backend against ``reference``, bit for bit; only a NaN's sign and payload are its own.

``tests/native`` holds the same kernels to an oracle without torch: every pair of planes, every byte beside a buffer,
and a forked child among it.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from swafast.backends import cpu, library, reference
from swafast.backends.contract import Launch, Pair
from swafast.op.launches import draws_of
from swafast.terms.formats import EXACT, FLOAT32, Format
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
    pairs = [
        Pair("", torch.randn(n).to(dtype), fmt.encode(torch.randn(n)), fmt) for n in numels for dtype, fmt in EXCHANGED
    ]
    pairs.insert(1, copied)
    params = [pair.param for pair in pairs]
    launches = cpu.prepare(pairs), reference.prepare(pairs)
    assert [launch.first_nonfinite(params) for launch in launches] == [None, None]
    for index in reversed(range(len(pairs))):
        if params[index].numel() and pairs[index] is not copied:
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
