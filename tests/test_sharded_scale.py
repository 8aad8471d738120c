"""Plans of Llama-3-405B over 1024 ranks, in one process with a fake group."""

from __future__ import annotations

import pytest

from bench.sharded import llama_405b, plan_405b
from swafast.sharded.parts.flat_order import BORDER_NUMEL, FlatOrder

pytestmark = pytest.mark.distributed

RANKS = 1024


def test_no_rank_has_more_than_an_even_part() -> None:
    numels = [param.numel() for param in llama_405b().parameters()]
    assert (len(numels), sum(numels)) == (1137, 405_853_388_800)
    order = FlatOrder(numels, RANKS)
    parts = [stop - start for start, stop in map(order.bounds, range(RANKS))]
    assert sum(parts) == sum(numels)
    assert max(parts) <= sum(numels) // RANKS + BORDER_NUMEL


def test_planning_is_quick_and_small() -> None:
    planned = plan_405b(RANKS, some=(0,))
    assert [row.mode for row in planned] == ["replicated", "FSDP2"]
    for row in planned:
        assert row.share <= 1.001, row
        assert row.seconds < 0.5, row
        assert row.peak_bytes < 20e6, row
