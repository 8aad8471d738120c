"""Ranks copy buffers of every kind, and follow those that the model makes anew."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from swafast import (
    EqualAverage,
    ExponentialAverage,
    FusedAveragedModel,
    ShardedAveragedModel,
    ShardedAverages,
    Snapshots,
)
from tests.ranks import run_ranks
from tests.sharded_models import outcome
from tests.support import drift, refused, step_with_ones
from tests.test_copied import GROWN, KINDS, Model, has, same, value_of
from tests.test_listed import net

pytestmark = pytest.mark.filterwarnings("ignore:.*(CSR|uantize|nested|TypedStorage|holds no model)")
RULES = {"mean": EqualAverage(), "fast": ExponentialAverage(0.5)}


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def average_of(model: nn.Module, several: bool) -> tuple[Any, ShardedAveragedModel]:
    if several:
        averages = ShardedAverages(model, rules=RULES)
        return averages, averages["fast"]
    averaged = ShardedAveragedModel(model)
    return averaged, averaged


def copy_of(averages: Any) -> Tensor:
    """Return what the averages hold of the odd buffer, as a state has it."""
    state = averages.full_state_dict()
    return state["fast.module.odd" if isinstance(averages, ShardedAverages) else "module.odd"]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("kind", "several"), [*((kind, False) for kind in KINDS), ("coo", True), ("expanded", True)])
def test_every_call_copies_every_kind(kind: str, several: bool) -> None:
    make = KINDS[kind]
    model = Model(make(1))
    averages, averaged = average_of(model, several)
    for seed in (1, 2):
        model.next(make(seed))
        averages.update_parameters(model)
        assert torch.equal(value_of(copy_of(averages)), value_of(make(seed)))
    model.next(make(3))
    with averaged.swapped_into(model):
        assert has(model, value_of(make(2)))
    assert has(model, value_of(make(3)))
    state = averages.full_state_dict()
    averages.update_parameters(model)
    averages.load_state_dict(state)
    assert torch.equal(value_of(copy_of(averages)), value_of(make(2)))
    averages.load_state_dict(averages.state_dict())
    for from_rank0 in (False, True):
        model.next(make(3))
        averages.update_parameters(model)
        averages.load_full_state_dict(state, from_rank0=from_rank0)
        assert torch.equal(value_of(averaged.averaged_state_dict()["odd"]), value_of(make(2)))
    averaged.copy_to(model)
    assert has(model, value_of(make(2)))
    model.next(make(3))
    averages.adapt_to(model)
    assert torch.equal(value_of(copy_of(averages)), value_of(make(3)))
    optimizer = torch.optim.SGD(model.layer.parameters(), 0.1)
    with averages.attach(optimizer, model, overlap=True, step=0) as attachment:
        model.put(make(4))
        step_with_ones(optimizer, model.layer.parameters())
        model.put(make(5))  # by the next forward
        attachment.join()
    assert torch.equal(value_of(copy_of(averages)), value_of(make(4)))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("case", "several"), [("grows", True), ("becomes whole numbers", False), ("comes", True)])
def test_a_copied_buffer_is_taken_over_as_it_is_now(case: str, several: bool) -> None:
    before, now = GROWN[case]()
    model = Model(before)  # type: ignore[arg-type]  # None is a buffer too
    averages, averaged = average_of(model, several)
    for buffer in (now, before, now):
        model.put(buffer)
        averages.update_parameters(model)
        found = averages.full_state_dict()
        assert any(key.endswith("odd") for key in found) == (buffer is not None)
        with averaged.swapped_into(model):
            assert same(model, buffer)
    with averaged.swapped_into(model):
        model.put(before)  # by an evaluation
    assert same(model, before)
    averages.update_parameters(model)
    averages.load_state_dict(averages.state_dict())
    assert averaged.n_averaged == 4


@pytest.mark.usefixtures("process_group")
def test_a_failed_update_takes_no_buffer_over() -> None:
    model = Model(torch.arange(2.0))
    averaged = ShardedAveragedModel(model)
    model.put(torch.arange(5.0))
    model.layer.weight = nn.Parameter(torch.zeros(7))
    with refused(ValueError, r"'layer\.weight' must have the whole shape"):
        averaged.update_parameters(model)
    assert torch.equal(copy_of(averaged), torch.arange(2.0))


@pytest.mark.usefixtures("process_group")
def test_a_scripted_model() -> None:
    with warnings.catch_warnings(action="ignore"):
        model = torch.jit.script(net())
    averaged, oracle = ShardedAveragedModel(model), FusedAveragedModel(model)
    for _ in range(2):
        drift(model)
        averaged.update_parameters(model)
        oracle.update_parameters(model)
    with averaged.swapped_into(model):
        for name, param in oracle.module.named_parameters():
            torch.testing.assert_close(dict(model.named_parameters())[name], param)


def test_snapshots_leave_out_what_they_cannot_store(tmp_path: Path) -> None:
    model = Model(KINDS["coo"](1))
    averaged = FusedAveragedModel(model)
    averaged.update_parameters(model)
    snapshots = Snapshots(tmp_path)
    snapshots.save(averaged)
    assert set(snapshots.synthesize(EqualAverage())) == {"layer.weight", "layer.bias"}


def _grow_on_one_rank(folder: Path) -> dict[str, Any]:
    model = Model(torch.arange(2.0))
    dist.broadcast(model.layer.weight.data, 0)
    dist.broadcast(model.layer.bias.data, 0)
    averaged, whole = ShardedAveragedModel(model), FusedAveragedModel(model)
    model.put(torch.arange(3.0 + dist.get_rank()))
    averaged.update_parameters(model)
    whole.update_parameters(model)
    with averaged.swapped_into(model):
        assert same(model, torch.arange(3.0 + dist.get_rank()))
    return {
        "state": outcome(averaged.state_dict),
        "full": outcome(averaged.full_state_dict),
        "snapshot": outcome(lambda: Snapshots(folder / "one").save(averaged)),
        "whole snapshot": outcome(lambda: Snapshots(folder / "two").save(whole)),
    }


@pytest.mark.distributed
def test_ranks_that_differ_in_a_buffer_are_told_when_they_save(tmp_path: Path) -> None:
    for outcomes in run_ranks(2, _grow_on_one_rank, tmp_path):
        for call in ("state", "full"):
            assert "the same buffers on every rank" in outcomes[call]
        for call in ("snapshot", "whole snapshot"):
            assert "that is saved must be the same on every rank, got for 'odd'" in outcomes[call]
