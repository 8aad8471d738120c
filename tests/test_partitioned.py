"""A param that ZeRO-3 has partitioned is empty, beside small ones that are whole: it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from swafast import (
    EqualAverage,
    FusedAveragedModel,
    FusedAverages,
    ShardedAveragedModel,
    ShardedAverages,
    Snapshots,
)
from swafast.optim import SWA, ComposerSWA
from tests.support import step_with_ones, unchanged

RULES = {"mean": EqualAverage()}
MAKE: dict[str, Callable[[nn.Module], Any]] = {
    "one": FusedAveragedModel,
    "several": lambda model: FusedAverages(model, rules=RULES),
    "sharded": ShardedAveragedModel,
    "several sharded": lambda model: ShardedAverages(model, rules=RULES),
}

gathered = pytest.raises(ValueError, match=r"'weight' .*empty.*gather a model partitioned as by ZeRO-3")


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def partition(param: Any, marks: bool = True) -> None:
    """Do to a param what DeepSpeed does."""
    if marks:
        param.ds_id, param.ds_shape, param.ds_numel = 0, param.shape, param.numel()
    param.data = torch.empty(0, dtype=param.dtype)


def test_an_empty_param_that_is_whole_is_averaged() -> None:
    model = nn.Linear(3, 3)
    model.weight = nn.Parameter(torch.empty(0))
    model.weight.ds_numel, model.weight.ds_id = 0, 1
    FusedAveragedModel(model).update_parameters(model)


@pytest.mark.parametrize(
    ("make", "mark"), [*((make, "ds_shape") for make in MAKE), ("one", "ds_id"), ("one", "ds_numel")]
)
def test_at_construction(make: str, mark: str) -> None:
    model = nn.Linear(3, 3)
    partition(model.weight, marks=False)
    setattr(model.weight, mark, 9)
    with gathered:
        MAKE[make](model)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("planned", [False, True], ids=["first", "planned"])
def test_in_every_call(make: Callable[[nn.Module], Any], planned: bool) -> None:
    model = nn.Linear(3, 3)
    averages = make(model)
    averaged = averages["mean"] if hasattr(averages, "keys") else averages
    if planned:
        averages.update_parameters(model)
    else:
        averaged.n_averaged.fill_(1)
    partition(model.weight)
    for call in (averages.update_parameters, averaged.copy_to, lambda model: averaged.swapped_into(model).__enter__()):
        with unchanged(model), gathered:
            call(model)


def test_offloaded_copies_have_no_marks_but_are_refused_too() -> None:
    model = nn.Linear(3, 3)
    averaged = FusedAveragedModel(model)
    partition(model.weight, marks=False)
    with pytest.raises(ValueError, match=r"'weight' must have the average's shape \(3, 3\), got \(0,\): .*gather"):
        averaged.update_parameters(model)


def test_in_recipes() -> None:
    model = nn.Linear(3, 3)
    optimizer = SWA(torch.optim.SGD(model.parameters(), 0.1), swa_start=0, swa_freq=1)
    step_with_ones(optimizer, model.parameters())
    state = optimizer.state_dict()
    averaged, own = FusedAveragedModel(model), torch.optim.SGD(model.parameters(), 0.1)
    composer = ComposerSWA(averaged, own, model, max_duration="2ep", steps_per_epoch=1, swa_start="0.5dur")
    weight = model.weight.detach().clone()
    partition(model.weight)
    refused = pytest.raises(ValueError, match=r"'param 0' empty, with ds_shape: .*gather")
    for call in (optimizer.update_swa, optimizer.swap_swa_sgd, lambda: optimizer.load_state_dict(state)):
        with refused:
            call()
    own.zero_grad()
    with gathered:
        for _ in range(2):
            own.step()
    composer.detach()
    with gathered:
        averaged.attach(own, model)
    model.weight.data = weight
    optimizer.swap_swa_sgd()


def test_in_snapshots(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    averaged = FusedAveragedModel(model)
    averaged.update_parameters(model)
    partition(averaged.module.weight)
    with gathered:
        Snapshots(tmp_path).save(averaged)
    with gathered:
        averaged.averaged_state_dict()
    assert list(tmp_path.iterdir()) == []
