"""The native library by itself: which tensors it serves, its instruction sets, threads and weights."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from swafast.backends import cpu, library
from swafast.backends.contract import Pair
from swafast.terms.formats import EXACT, FLOAT32
from swafast.terms.rules import Rule
from swafast.terms.samples import Sample
from swafast.terms.spread import Spread
from tests.conftest import NO_LIBRARY
from tests.kernels import (
    DTYPES,
    FORMATS,
    INT64_MAX,
    RULES,
    by_weights,
    check_updates,
    clone,
    differing,
    make_pair,
)
from tests.spreads import drawn, make_spread_pair

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{NO_LIBRARY}: {cpu.unavailable()}")


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


def test_an_unknown_instruction_set_changes_nothing() -> None:
    before = cpu.current_isa()
    with pytest.raises(ValueError, match="isa must be one that this machine has, got 'sse9'"):
        cpu.use_isa("sse9")
    assert cpu.current_isa() == before
    assert before in cpu.describe()


def test_launches_of_several_threads_do_not_meet(small_chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_NUMEL_PER_THREAD", 1)  # torch has two threads, or more
    batches = [[make_pair(20_000, dtype, fmt) for dtype in DTYPES for fmt in FORMATS] for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda pairs: check_updates(cpu.prepare, pairs, by_weights(1.0, 0.3, 0.9)), batches))


def test_a_sample_of_more_columns_than_there_are_changes_nothing() -> None:
    pair = drawn(make_spread_pair(40, torch.float32, FLOAT32, Spread(2)))
    launch, before = cpu.prepare([pair]), clone([pair])
    with pytest.raises(ValueError, match="a sample must not have more coefficients than an average has columns, got 3"):
        launch.draw([pair.param], Sample(0, (1.0, 1.0, 1.0), 1.0))
    assert differing([pair], before) == []
    with pytest.raises(AssertionError, match="refused"):  # it has no spread
        cpu.prepare([drawn(make_pair(40, torch.float32, FLOAT32))]).draw([pair.param], Sample())


def native_weight(rule: Rule, num_averaged: int) -> float:
    terms = rule.kernel_terms()
    assert terms is not None
    native_rule = library.KernelRule(terms.kind, terms.terms)
    return library.loaded().swafast_weight(ctypes.byref(native_rule), num_averaged)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_weights_equal_those_of_python(rule: Rule) -> None:
    counts = [*range(10_001), *(10**k + d for k in range(4, 13) for d in (-1, 0, 1)), 2**53 + 1, INT64_MAX]
    assert [n for n in counts if native_weight(rule, n) != rule.weight(n)] == []
