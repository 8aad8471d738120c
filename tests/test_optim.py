"""The recipes by their names: torchcontrib's SWA and the cyclical schedules."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR, StepLR

from swafast import FusedAveragedModel, optim
from swafast.optim import SWA, cyclical_cosine_lr, cyclical_lr
from tests.support import differing, tensors_of


class Run:
    def __init__(self, dtype: torch.dtype = torch.float32, groups: int = 1) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 5)).to(dtype)
        params = list(self.model.parameters())
        self.groups = (
            [{"params": params}] if groups == 1 else [{"params": params[:2]}, {"params": params[2:], "lr": 0.03}]
        )
        self.base = torch.optim.SGD(self.groups, lr=0.1, momentum=0.9)
        self.generator = torch.Generator().manual_seed(2)

    def train(self, optimizer: Any, steps: int = 1) -> None:
        for _ in range(steps):
            self.backward()
            optimizer.step()

    def backward(self) -> None:
        x = torch.randn(8, 5, generator=self.generator).to(self.model[0].weight.dtype)
        self.base.zero_grad()
        (self.model(x) - x).square().mean().backward()


def buffers_of(swa: SWA, run: Run) -> dict[str, Tensor]:
    params = run.model.named_parameters()
    return {name: swa.state[param]["swa_buffer"].clone() for name, param in params if "swa_buffer" in swa.state[param]}


@pytest.mark.parametrize(
    ("options", "due"),
    [
        ({"swa_start": 5, "swa_freq": 3}, [6, 9, 12, 15, 18]),
        ({"swa_start": 5, "swa_freq": 3, "swa_lr": 0.01}, [6, 9, 12, 15, 18]),
        ({"swa_start": 0, "swa_freq": 1, "swa_lr": 0.0}, [*range(1, 21)]),
        ({"swa_start": 100, "swa_freq": 1}, []),
        ({}, [6, 8, 10]),  # by hand
    ],
    ids=str,
)
@pytest.mark.parametrize("groups", [1, 2])
def test_params_are_averaged_when_they_are_due(options: dict[str, Any], due: list[int], groups: int) -> None:
    ours, theirs = Run(groups=groups), Run(groups=groups)
    swa, averaged = SWA(ours.base, **options), FusedAveragedModel(theirs.model, backend="reference")
    for step in range(1, 21):
        if "swa_lr" in options and step > options["swa_start"]:
            for group in theirs.base.param_groups:
                group["lr"] = options["swa_lr"]
        ours.train(swa)
        theirs.train(theirs.base)
        if step in due:
            averaged.update_parameters(theirs.model)
            if not options:
                swa.update_swa()
        expected = averaged.averaged_state_dict() if averaged.n_averaged else {}
        assert differing(buffers_of(swa, ours), expected) == []
    assert differing(tensors_of(ours.model), tensors_of(theirs.model)) == []
    assert {(group["step_counter"], group["n_avg"]) for group in swa.param_groups} == {(20, len(due))}


def test_groups_may_be_updated_by_themselves() -> None:
    run = Run(groups=2)
    swa = SWA(run.base)
    run.train(swa)
    swa.update_swa_group(swa.param_groups[1])
    assert [group["n_avg"] for group in swa.param_groups] == [0, 1]
    with pytest.warns(UserWarning, match="2 params have no average yet and are not exchanged") as told:
        swa.swap_swa_sgd()
    assert [warning.filename for warning in told] == [__file__]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_an_exchange_and_another_one_leave_everything(dtype: torch.dtype) -> None:
    run = Run(dtype)
    swa = SWA(run.base, swa_start=0, swa_freq=1)
    run.train(swa, 5)
    params, averages = tensors_of(run.model), buffers_of(swa, run)
    assert averages["0.weight"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    swa.swap_swa_sgd()
    assert differing(tensors_of(run.model), {name: average.to(dtype) for name, average in averages.items()}) == []
    assert differing({name: kept.to(dtype) for name, kept in buffers_of(swa, run).items()}, params) == []
    swa.swap_swa_sgd()
    assert differing(tensors_of(run.model), params) == []
    assert differing(buffers_of(swa, run), averages) == []


@pytest.mark.parametrize("since", ["torch 1.0", "torch 1.5"])
def test_a_state_of_torchcontrib_is_taken(since: str) -> None:
    run = Run()
    swa = SWA(run.base, swa_start=0, swa_freq=1)
    run.train(swa, 3)
    state = copy.deepcopy(swa.state_dict())
    ids = {index: 10_000 + 64 * index for index in range(4)}  # it used the params' addresses
    state["swa_state"] = {ids[key]: value for key, value in state["swa_state"].items()}
    if since == "torch 1.0":  # then so did torch
        state["opt_state"] = {ids[key]: value for key, value in state["opt_state"].items()}
        for group in state["param_groups"]:
            group["params"] = [ids[key] for key in group["params"]]
    other = SWA(Run().base, swa_start=0, swa_freq=1)
    other.load_state_dict(state)
    for got, want in zip(other._params(), swa._params(), strict=True):
        assert torch.equal(other.state[got]["swa_buffer"], swa.state[want]["swa_buffer"])
        assert torch.equal(other.opt_state[got]["momentum_buffer"], swa.opt_state[want]["momentum_buffer"])
    assert other.param_groups[0]["n_avg"] == 3


@pytest.mark.parametrize("to", ["swa", "base"])
def test_what_hooks_add_to_a_state_goes_through(to: str) -> None:
    runs = [Run(), Run()]
    swas = [SWA(run.base, swa_start=0, swa_freq=1) for run in runs]
    attachments = [
        FusedAveragedModel(run.model).attach(swa if to == "swa" else run.base, every=2)
        for run, swa in zip(runs, swas, strict=True)
    ]
    runs[0].train(swas[0], 5)
    state = copy.deepcopy(swas[0].state_dict())
    swas[1].load_state_dict(state)
    assert attachments[1].step == 5
    runs[1].train(swas[1])
    assert attachments[1].step == 6


def test_a_bad_state_leaves_attachments_and_one_of_them_does_not_stop_the_others() -> None:
    run = Run()
    swa = SWA(run.base, swa_start=0, swa_freq=1)
    attachments = [FusedAveragedModel(run.model).attach(each, name=str(each is swa)) for each in (swa, run.base)]
    run.train(swa, 3)
    good = copy.deepcopy(swa.state_dict())
    for attachment in attachments:
        attachment.step = 9
    handle = swa.register_load_state_dict_post_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        swa.load_state_dict(good)
    handle.remove()
    assert [attachment.step for attachment in attachments] == [9, 9]
    entry = good["param_groups"][0]["swafast"]
    good["param_groups"][0]["swafast"] = entry.replace('"step": 3', '"step": -1', 1)
    with pytest.warns(UserWarning, match="must be an int >= 0, got -1. The average 'True' goes on from step 9"):
        swa.load_state_dict(good)
    assert [attachment.step for attachment in attachments] == [9, 3]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda swa: pickle.loads(pickle.dumps(swa))])
def test_copies_train_on(duplicate: Any) -> None:
    run = Run()
    swa = SWA(run.base, swa_start=1, swa_freq=1, swa_lr=0.05)
    run.train(swa, 3)
    other = duplicate(swa)
    for ours, theirs in zip(swa._params(), other._params(), strict=True):
        assert ours is not theirs
        theirs.grad = torch.ones_like(theirs)
    other.step()
    other.swap_swa_sgd()
    assert [group["n_avg"] for group in other.param_groups] == [3]
    assert [group["n_avg"] for group in swa.param_groups] == [2]
    assert str(duplicate(other).state_dict()) == str(other.state_dict())


def test_groups_that_the_optimizer_was_given_are_averaged_too() -> None:
    run = Run()
    swa = SWA(run.base, swa_start=0, swa_freq=1)
    run.base.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    swa.load_state_dict(copy.deepcopy(swa.state_dict()))
    run.train(swa)
    swa.update_swa()
    assert [group["n_avg"] for group in swa.param_groups] == [2, 2]


def test_a_nan_in_one_place_costs_no_other_its_precision() -> None:
    run = Run(torch.bfloat16)
    swa = SWA(run.base)
    with torch.no_grad():
        for value in (1.0, 1.0078125, 1.0):
            run.model[0].weight.fill_(value)
            run.model[0].weight[0, 0] = float("nan")
            swa.update_swa()
    averages = buffers_of(swa, run)
    swa.swap_swa_sgd()
    swa.swap_swa_sgd()
    torch.testing.assert_close(buffers_of(swa, run), averages, rtol=0, atol=0, equal_nan=True)


def test_it_is_an_optimizer_of_todays_torch() -> None:
    run = Run()
    swa = SWA(run.base, swa_start=1, swa_freq=1)
    scheduler = StepLR(swa, 2, gamma=0.5)
    called: list[str] = []
    swa.register_step_post_hook(lambda *_: called.append("ours"))
    run.base.register_step_post_hook(lambda *_: called.append("base"))
    averaged = FusedAveragedModel(run.model)
    averaged.attach(swa)
    for _ in range(4):
        run.backward()
        swa.step(lambda: torch.tensor(1.0))
        scheduler.step()
    swa.zero_grad()
    assert all(param.grad is None for param in run.model.parameters())
    assert called == ["base", "ours"] * 4
    assert run.base.param_groups[0]["lr"] == pytest.approx(0.025)
    assert averaged.n_averaged == 4
    swa.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(run.base.param_groups) == 2
    assert swa.param_groups[1]["n_avg"] == 0
    layer = nn.BatchNorm1d(5)
    SWA.bn_update([torch.randn(7, 5) + 3], layer)
    assert layer.running_mean.mean() == pytest.approx(3.0, abs=1.0)


def test_half_a_mode_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="swa_start or swa_freq is None"):
        swa = SWA(Run().base, swa_start=3, swa_lr=0.1)
    assert (swa.swa_start, swa.swa_freq, swa.swa_lr) == (None, None, None)


COUNTS = "must have params, and ints >= 0 as n_avg and step_counter"
BAD_STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "None": (lambda good: None, TypeError, "state_dict must be a"),
    "an int": (lambda good: 5, TypeError, "state_dict must be a"),
    "a str": (lambda good: "x", TypeError, "state_dict must be a"),
    "opt_state": (lambda good: {**good, "opt_state": 5}, TypeError, r"state_dict\['opt_state'\] must be a"),
    "swa_state": (lambda good: {**good, "swa_state": [1]}, TypeError, r"state_dict\['swa_state'\] must be a"),
    "param_groups": (lambda good: {**good, "param_groups": {}}, TypeError, r"state_dict\['param_groups'\] must be a"),
    "nothing": (lambda good: {}, ValueError, "state_dict must have 'opt_state', got nothing"),
    "fewer params": (lambda good: _group(good, params=[0, 1]), ValueError, "must be of 4 params, got 2"),
    "no counts": (lambda good: {**good, "param_groups": [{"params": [0, 1, 2, 3]}]}, ValueError, COUNTS),
    "a count": (lambda good: _group(good, n_avg=-1), ValueError, COUNTS),
    "other keys": (lambda good: {**good, "swa_state": {9: {}}}, ValueError, r"\['swa_state'\] must have .*got 9$"),
    "a shape": (lambda good: _shaped(good), ValueError, r"swa_buffer must have shape \(5, 9\), got \(3,\)"),
}


def _shaped(good: dict[str, Any]) -> dict[str, Any]:
    good["swa_state"][2]["swa_buffer"] = torch.zeros(3)
    return good


def _group(good: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**good, "param_groups": [{**good["param_groups"][0], **changes}]}


@pytest.mark.parametrize("bad", BAD_STATES)
def test_a_bad_state_changes_nothing(bad: str) -> None:
    make, kind, message = BAD_STATES[bad]
    run = Run()
    swa = SWA(run.base, swa_start=0, swa_freq=1)
    run.train(swa)
    before = str(swa.state_dict())
    with pytest.raises(kind, match=message):
        swa.load_state_dict(make(copy.deepcopy(swa.state_dict())))
    assert str(swa.state_dict()) == before


# Schedules


def rates(scheduler: LRScheduler, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_the_rates_of_fge() -> None:
    got = rates(cyclical_lr(Run().base, max_lr=0.05, min_lr=0.0005, cycle=4), 8)
    # t = 1/4, 1/2, 3/4, 1: down to the least at half a cycle, and up again
    assert got == pytest.approx(2 * [0.02525, 0.0005, 0.02525, 0.05])


def test_the_rates_of_fast_swa() -> None:
    got = rates(cyclical_cosine_lr(Run().base, max_lr=0.1, anneal=10, until=8, cycle=3), 15)
    cosine = [0.05 * (1 + math.cos(math.pi * step / 10)) for step in range(8)]
    assert got == pytest.approx([*cosine, *cosine[5:], *cosine[5:], cosine[5]])


def test_rates_do_not_depend_on_what_the_optimizer_was_made_with_and_resume() -> None:
    runs = [Run(groups=2), Run(groups=2)]
    schedules = [cyclical_lr(run.base, max_lr=0.4, min_lr=0.1, cycle=6) for run in runs]
    first = rates(schedules[0], 4)
    assert schedules[0].get_last_lr() == [pytest.approx(0.3)] * 2
    schedules[1].load_state_dict(schedules[0].state_dict())
    assert rates(schedules[1], 5) == pytest.approx(rates(schedules[0], 5))
    assert len(set(first)) > 1


def test_other_schedulers_have_the_rates_that_they_were_made_for() -> None:
    base = Run().base
    warm = LinearLR(base, 0.1, 1.0, total_iters=4)
    cycles = cyclical_lr(base, max_lr=0.4, min_lr=0.2, cycle=4)
    got = rates(SequentialLR(base, [warm, cycles], milestones=[4]), 9)
    assert got == pytest.approx([0.01, 0.0325, 0.055, 0.0775, *[0.3, 0.2, 0.3, 0.4], 0.3])
    assert pickle.loads(pickle.dumps(cycles)).get_last_lr() == cycles.get_last_lr()
    cyclical_cosine_lr(base, max_lr=0.4, anneal=9, until=9, cycle=3)
    assert [group["initial_lr"] for group in base.param_groups] == [0.1]
    assert LambdaLR(base, lambda step: 0.5).get_last_lr() == [0.05]
    assert CosineAnnealingLR(base, 10).base_lrs == [0.1]


def test_models_at_the_least_rate_are_averaged() -> None:
    run = Run()
    averaged = FusedAveragedModel(run.model)
    averaged.attach(run.base, start=3, every=6)
    schedule = cyclical_lr(run.base, max_lr=0.4, min_lr=0.1, cycle=6)
    seen = []
    run.base.register_step_post_hook(lambda *_: seen.append((schedule.get_last_lr()[0], int(averaged.n_averaged))))
    rates(schedule, 12)
    counts = [count for _, count in seen]
    updated = [lr for (lr, count), before in zip(seen, [0, *counts], strict=False) if count > before]
    assert updated == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda base: cyclical_lr(base, max_lr=1, min_lr=0.1, cycle=3), "cycle must be an even int >= 2, got 3"),
        (lambda base: cyclical_lr(base, max_lr=0.1, min_lr=1, cycle=4), "max_lr must be >= min_lr > 0, got 0.1 and 1"),
        (lambda base: cyclical_cosine_lr(base, max_lr=1, anneal=5, until=6, cycle=2), "got 2, 6, 5"),
        (lambda base: cyclical_cosine_lr(base, max_lr=0, anneal=9, until=6, cycle=2), "max_lr must be > 0, got 0"),
        (lambda base: cyclical_lr(base, max_lr="1", min_lr=0.1, cycle=4), "max_lr must be >= min_lr, got '1'"),
        (lambda base: cyclical_lr(base, max_lr=1, min_lr="0.1", cycle=4), "min_lr must be > 0, got '0.1'"),
        (lambda base: cyclical_cosine_lr(base, max_lr="1", anneal=9, until=6, cycle=2), "max_lr must be > 0, got '1'"),
        (lambda base: cyclical_cosine_lr(base, max_lr=1, anneal="20", until=6, cycle=2), "anneal must be .* got '20'"),
        (lambda base: cyclical_cosine_lr(base, max_lr=1, anneal=9, until=None, cycle=2), "until must be .* got None"),
        (lambda base: SWA(base, 1, 1, "0.1"), "swa_lr must be >= 0, got '0.1'"),
    ],
)
def test_bad_rates_and_steps_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(Run().base)


def test_errors_about_states_name_three_keys() -> None:
    optimizer = SWA(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), 1, 1)
    state = optimizer.state_dict()
    surplus = {f"other {place:03}": {} for place in range(100)}
    group = {key: value for key, value in state["param_groups"][0].items() if key != "n_avg"}
    for changed, message in (
        (surplus, "must have 'opt_state', got 'other 000', 'other 001', 'other 002' and 97 more"),
        (state | {"swa_state": surplus}, "got 'other 000', 'other 001', 'other 002' and 97 more"),
        (state | {"param_groups": [group]}, "got {'n_avg': None, 'step_counter': 0}"),
        (state | {"param_groups": [{"n_avg": 0, "step_counter": 0}]}, "got one without params, of 'n_avg', 'step_"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer.load_state_dict(changed)


def test_the_gate_sees_an_update_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    step = SWA.step

    def early(self: SWA, closure: Any = None) -> Any:
        self.swa_start -= 1  # type: ignore[operator]
        try:
            return step(self, closure)
        finally:
            self.swa_start += 1  # type: ignore[operator]

    monkeypatch.setattr(optim.SWA, "step", early)
    with pytest.raises(AssertionError):
        test_params_are_averaged_when_they_are_due({"swa_start": 6, "swa_freq": 3}, [9, 12, 15, 18], 1)
