"""Ranks that make different calls are told so, and may go on."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch import nn

from swafast import ShardedAveragedModel
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def different_calls() -> list[str]:
    model = nn.Linear(3, 2)
    for param in model.parameters():
        dist.broadcast(param.detach(), 0)
    averaged = ShardedAveragedModel(model)
    told = []
    for calls in (
        (averaged.state_dict, averaged.full_state_dict),
        (lambda: averaged.copy_to(model), averaged.state_dict),
        (lambda: averaged.load_state_dict({}), averaged.full_state_dict),
    ):
        with pytest.raises(RuntimeError, match="all ranks must make the same call") as caught:
            calls[dist.get_rank()]()
        told.append(str(caught.value))
    assert averaged.full_state_dict().keys() == {"n_averaged", "module.weight", "module.bias"}
    return told


def test_different_calls_are_named_on_every_rank() -> None:
    first, second = run_ranks(2, different_calls)
    assert first == second
    assert "state_dict of average 0 on rank 0, full_state_dict of average 0 on rank 1" in first[0]
