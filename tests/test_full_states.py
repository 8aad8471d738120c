"""Exports, and states of whole tensors that shards load, from the first rank alone or from each."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel

from swafast import ExponentialAverage, FusedAveragedModel, FusedAverages, ShardedAveragedModel, ShardedAverages
from swafast.sharded import full_states
from tests.ranks import on_ranks
from tests.sharded_models import Beside, outcome, planes_of
from tests.support import differing, require_same

RULES = {"fast": ExponentialAverage(0.5), "slow": ExponentialAverage(0.9)}


class Tied(nn.Module):
    """A language model's head and embedding, and a buffer of two names."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("here", torch.ones(2, dtype=torch.int64))
        self.register_buffer("there", self.here)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("wrap", [FusedAveragedModel, nn.DataParallel])
def test_tied_names_of_an_export_have_one_tensor(wrap: Any, dtype: torch.dtype | None) -> None:
    model = Tied().bfloat16()
    averaged = FusedAveragedModel(model if wrap is FusedAveragedModel else wrap(model), num_averaged=1)
    exported = averaged.averaged_state_dict(dtype)
    assert exported["table.weight"] is exported["head.weight"]
    assert exported["here"] is exported["there"]
    assert len({value.data_ptr() for value in exported.values()}) == 2
    assert exported["head.weight"].data_ptr() != averaged.averaged_state_dict(dtype)["head.weight"].data_ptr()
    Tied().load_state_dict(exported)


@pytest.mark.distributed
@on_ranks(2)
def test_shards_export_and_load_whole_tensors() -> None:
    full_states.CPU_WINDOW_NBYTES = 1000  # in this rank's process: many windows, some within a param
    first = dist.get_rank() == 0
    for mode, options in (("plain", {}), ("fsdp2", {"format": "compensated"}), ("fsdp1", {"use_buffers": True})):
        both = Beside(mode, updates=2, **options)
        expected, state = both.expected.averaged_state_dict(), both.expected.state_dict()
        for rank0_only in (False, True):
            exported = both.averaged.averaged_state_dict(rank0_only=rank0_only)
            require_same(exported, expected if first or not rank0_only else {})
        assert all(exported["tied.weight"] is exported["encoder.weight"] for _ in exported)
        half = both.averaged.averaged_state_dict(torch.float16, cpu_offload=True)
        require_same(half, both.expected.averaged_state_dict(torch.float16))
        for from_rank0 in (False, True):
            both.averaged.update_parameters(both.sharded)
            given = None if from_rank0 and not first else {key: value.clone() for key, value in state.items()}
            both.averaged.load_full_state_dict(given, from_rank0=from_rank0)
            both.require_equal((mode, from_rank0))
    _refuse(both, state, first)


def _refuse(both: Beside, state: dict[str, Any], first: bool) -> None:
    before = planes_of(both.averaged)
    for key, value, words in (
        ("module.long", None, "missing"),
        ("module.table", torch.zeros(7), "shape"),
        ("module.mask", torch.zeros(2), "another format"),
        ("module.tied.weight", torch.ones(10, 10), "tied"),
        ("n_averaged", torch.tensor(-1), ">= 0"),
    ):
        wrong = {other: each for other, each in {**state, key: value}.items() if each is not None}
        for from_rank0 in (False, True):
            given = wrong if first else (None if from_rank0 else state)
            error = outcome(partial(both.averaged.load_full_state_dict, given, from_rank0=from_rank0))
            assert words in error, error
            assert ("failed on rank 0" in error) != first, error
    error = outcome(lambda: both.averaged.load_full_state_dict(state, from_rank0=first))
    assert "all ranks must make the same call" in error
    parts = both.averaged.state_dict(checksums=False)
    assert "must be a whole tensor, got a PartTensor" in outcome(lambda: both.averaged.load_full_state_dict(parts))
    assert "dtype must be" in outcome(lambda: both.averaged.averaged_state_dict(torch.int8))
    assert differing(planes_of(both.averaged), before) == []


@pytest.fixture
def process_group() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("from_rank0", [False, True])
@pytest.mark.parametrize("other", ["exact", "compensated", None])
def test_whole_tensors_of_another_format_or_class_keep_their_precision(from_rank0: bool, other: str | None) -> None:
    model = Tied().bfloat16()
    source = AveragedModel(model) if other is None else FusedAveragedModel(model, format=other)
    source.update_parameters(model)
    for format in ("float32", "exact", "compensated"):
        expected, averaged = FusedAveragedModel(model, format=format), ShardedAveragedModel(model, format=format)
        expected.load_state_dict(source.state_dict())
        averaged.load_full_state_dict(source.state_dict(), from_rank0=from_rank0)
        require_same(averaged.full_state_dict(), expected.state_dict())
        require_same(averaged.averaged_state_dict(), expected.averaged_state_dict())


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("from_rank0", [False, True])
def test_several_averages_load_whole_tensors(from_rank0: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    source, averages = FusedAverages(model, rules=RULES, num_averaged=2), ShardedAverages(model, rules=RULES)
    source["slow"].module[0].weight.data.add_(1)
    averages.load_full_state_dict(source.state_dict(), from_rank0=from_rank0)
    require_same(averages.full_state_dict(), dict(source.state_dict()))
    before = averages.full_state_dict()
    with pytest.raises(ValueError, match=r"averages\['slow'\]: state_dict .* missing \['module.1.bias'\]"):
        averages.load_full_state_dict(
            {key: value for key, value in source.state_dict().items() if key != "slow.module.1.bias"},
            from_rank0=from_rank0,
        )
    require_same(averages.full_state_dict(), before)
    with pytest.raises(AttributeError, match="each of several averages has its own averaged_state_dict"):
        averages.averaged_state_dict()
