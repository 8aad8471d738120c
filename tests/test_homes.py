"""Averages stay where they come into being, so what is taken of them before an update stays live."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, FusedAverages
from tests.support import EveryKind, differing, drift, tensors_in, update, updated_once


def saved_and_loaded(averaged: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(averaged, file, **options)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assigned(averaged: Any) -> Any:
    averaged.load_state_dict(copy.deepcopy(averaged).state_dict(), assign=True)
    return averaged


#: How an average comes into being, or into other memory.
WAYS: dict[str, Callable[[Any], Any]] = {
    "construction": lambda averaged: averaged,
    "cast": lambda averaged: averaged.half(),
    "wide cast": lambda averaged: averaged.double(),
    "cast and back": lambda averaged: averaged.bfloat16().float(),
    "emptied": lambda averaged: averaged.to_empty(device="cpu"),
    "deepcopy": copy.deepcopy,
    "pickle": lambda averaged: pickle.loads(pickle.dumps(averaged)),
    "torch.save": saved_and_loaded,
    # torch fills the tensors of its older kind of file after it has made all objects.
    "torch.save as before torch 1.6": lambda averaged: saved_and_loaded(averaged, _use_new_zipfile_serialization=False),
    "assigned": assigned,
    "shared": lambda averaged: averaged.share_memory(),
}


def require_live(averaged: Any, model: EveryKind) -> None:
    state = averaged.state_dict(keep_vars=False)
    taken = {name: tensor.detach() for name, tensor in averaged.named_parameters()}
    update(model, averaged, updates=3)
    assert differing(tensors_in(state), tensors_in(averaged.state_dict())) == []
    assert differing(taken, {name: tensor.detach() for name, tensor in averaged.named_parameters()}) == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fmt", [None, "exact"])
def test_a_state_taken_before_an_update_stays_live(every_kind: EveryKind, way: str, fmt: str | None) -> None:
    averaged = WAYS[way](FusedAveragedModel(every_kind, format=fmt, use_buffers=True))
    require_live(averaged, every_kind)


@pytest.mark.parametrize("way", WAYS)
def test_so_does_a_state_of_several_averages(every_kind: EveryKind, way: str) -> None:
    rules = {"mean": EqualAverage(), "ema": ExponentialAverage(0.9)}
    require_live(WAYS[way](FusedAverages(every_kind, rules=rules)), every_kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_does_one_of_an_average_that_was_assigned_within_a_module(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).to(dtype)
    averaged = FusedAveragedModel(model)
    holder = nn.ModuleDict({"ema": averaged})
    holder.load_state_dict(copy.deepcopy(holder).state_dict(), assign=True)
    state = averaged.state_dict()
    averaged.update_parameters(model)
    drift(model)
    averaged.update_parameters(model)
    assert differing(tensors_in(state), tensors_in(averaged.state_dict())) == []


def test_a_function_of_the_users_finds_a_live_state_too(every_kind: EveryKind) -> None:
    require_live(FusedAveragedModel(every_kind, avg_fn=lambda average, param, n: average + param), every_kind)


def test_a_model_on_meta_waits_for_its_memory(every_kind: EveryKind) -> None:
    averaged = FusedAveragedModel(copy.deepcopy(every_kind).to("meta"), format="exact")
    assert all(tensor.is_meta for tensor in averaged.module.parameters())
    require_live(averaged.to_empty(device="cpu"), every_kind)


def test_a_model_that_takes_another_order_leaves_a_state_live_and_moves_what_nobody_holds() -> None:
    model = nn.Conv2d(4, 4, 3, bias=False)
    held, free = updated_once(model), updated_once(model)
    state = held.state_dict()
    lie = held.module.weight.data_ptr()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for averaged in (held, free):
        nn.init.normal_(model.weight)
        averaged.update_parameters(model)
    assert (held.module.weight.data_ptr(), held.module.weight.stride()) == (lie, (36, 9, 3, 1))
    assert torch.equal(state["module.weight"], held.module.weight)
    assert free.module.weight.stride() == model.weight.stride()


@pytest.mark.parametrize("within", [False, True])
def test_memory_that_somebody_else_holds_is_never_written(every_kind: EveryKind, within: bool) -> None:
    averaged, twin = FusedAveragedModel(every_kind), FusedAveragedModel(every_kind)
    averaged.update_parameters(every_kind)
    state = averaged.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    if within:
        nn.ModuleDict({"ema": twin}).load_state_dict({f"ema.{key}": state[key] for key in state}, assign=True)
    else:
        twin.load_state_dict(state, assign=True)
    twin.to("cpu")  # moves nothing
    update(every_kind, twin)
    averages = dict(averaged.module.named_parameters())
    kept = {name: state[name] for name in ("n_averaged", *(f"module.{name}" for name in averages))}
    assert differing(kept, {name: before[name] for name in kept}) == []
    user = torch.zeros(1000)
    twin.module.long.data = user
    update(every_kind, twin)
    assert not user.any()
