"""Spreads and samples of sharded averages: the bits of one process, on every rank; and params that come back."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch

from swafast import Spread
from swafast.sharded.parts import all_gather
from tests.ranks import run_ranks
from tests.sharded_models import WORLDS, Beside, locals_of, require
from tests.support import differing, require_same, tensors_of
from tests.test_sharded_modes import Seen

pytestmark = pytest.mark.distributed

#: dtype of the params, format asked for, deviations
Case = tuple[torch.dtype, str | None, int | Spread]

#: Fewer columns than updates, so the first ones are written again.
CASES: list[Case] = [
    (torch.float32, None, 3),
    (torch.bfloat16, None, Spread(4, dtype=torch.float32)),
    (torch.bfloat16, "compact", 2),
    (torch.float16, None, Spread(3, dtype=torch.bfloat16)),
    (torch.float32, "compensated", 0),
]

#: index, and what is given besides it
SAMPLES: list[tuple[int, dict[str, Any]]] = [(0, {}), (2**32 - 1, {"scale": 2.0, "seed": 9})]


def drawn_beside(mode: str, cases: list[Case], options: dict[str, Any]) -> None:
    """Draw samples of a model that is sharded, and of the unsharded one; compare spreads, params and what comes back."""
    all_gather.WINDOW_NBYTES = 400  # several windows
    for dtype, fmt, spread in cases:
        both = Beside(mode, dtype, format=fmt, deviations=spread, seed=5, **options)
        with Seen() as seen:
            pass
        for _ in range(5):
            both.train()
        both.require_equal((dtype, fmt))
        before, own = both.params(), locals_of(both.sharded)
        for index, given in SAMPLES:
            with (
                both.averaged.sampled_into(both.sharded, index, **given) as sample,
                both.expected.sampled_into(both.reference, index, **given),
            ):
                assert sample is both.sharded
                inside, expected = both.params(), tensors_of(both.reference)
            require_same(inside, expected, f"{dtype}, {fmt}: sample {index}")
            assert len(differing(inside, before)) > 10
            require_same(locals_of(both.sharded), own, "own part after")
            require_same(both.params(), before, "after")
        both.require_equal("a sample has moved the averages")
        both.averaged.sample_to(both.sharded, 3)
        both.expected.sample_to(both.reference, 3)
        require_same(both.params(), tensors_of(both.reference), "for good")
        both.train()
        both.require_equal()


def check_drawn(mode: str, world: int, cases: list[Case], **options: Any) -> None:
    require(mode, forward=False)
    run_ranks(world, drawn_beside, mode, cases, options)


@pytest.mark.parametrize("mode", WORLDS)
def test_x(mode: str) -> None:
    check_drawn(mode, WORLDS[mode][-1], CASES)
