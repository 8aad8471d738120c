"""How attachments go on from a state: by name, however the optimizer's state was saved and loaded."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.optim import SGD, Adam, AdamW

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, FusedAverages
from swafast.loop.attachment import Attachment
from swafast.loop.roster import STATE_KEY
from swafast.loop.schedule import Schedule
from swafast.optim import SWA, ComposerSWA
from tests.test_attach import Run, entry_of

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
SPANS = {"start": 3, "every": 2}


class Training:
    """A model with an optimizer whose first group is of the last layer, and the averages attached to it."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer] = Adam) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.optimizer = make([{"params": list(self.model[i].parameters())} for i in (2, 0)])
        self.attachments: list[Attachment] = []

    def attach(self, *names: str | None, averaged: Any = None, **spans: Any) -> Training:
        for name in names:
            average = FusedAveragedModel(self.model) if averaged is None else averaged
            self.attachments.append(average.attach(self.optimizer, name=name, **spans))
        return self

    def steps(self, count: int) -> Training:
        for _ in range(count):
            for param in self.model.parameters():
                param.grad = torch.ones_like(param)
            self.optimizer.step()
        return self

    @property
    def counts(self) -> list[int]:
        return [attachment.step for attachment in self.attachments]


def plainly(one: Training, other: Training) -> None:
    file = io.BytesIO()
    torch.save(one.optimizer.state_dict(), file)
    file.seek(0)
    other.optimizer.load_state_dict(torch.load(file, weights_only=True))


def by_torchs_tools(one: Training, other: Training) -> None:
    model, optimizer = copy.deepcopy(get_state_dict(one.model, one.optimizer))
    set_state_dict(other.model, other.optimizer, model_state_dict=model, optim_state_dict=optimizer)


def in_full(one: Training, other: Training) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = copy.deepcopy(get_optimizer_state_dict(one.model, one.optimizer, options=options))
    set_optimizer_state_dict(other.model, other.optimizer, state, options=options)


def flattened(one: Training, other: Training) -> None:
    state = copy.deepcopy(get_optimizer_state_dict(one.model, one.optimizer, options=FLAT))
    set_optimizer_state_dict(other.model, other.optimizer, state, options=FLAT)


def pickling(one: Training, other: Training) -> None:
    """A trainer that pickles the optimizer's state, and changes the order of keys."""
    state = pickle.loads(pickle.dumps(one.optimizer.state_dict()))
    other.optimizer.load_state_dict({key: state[key] for key in sorted(state, reverse=True)})


LOADS = [plainly, by_torchs_tools, pickling]
AFTER = [in_full, flattened]  # torch does not take keys that are not in the optimizer's groups
CASES = [(Adam, load) for load in (*LOADS, *AFTER)]
CASES += [(make, by_torchs_tools) for make in (SGD, lambda groups: AdamW(groups, fused=True))]


@pytest.mark.parametrize(("make", "load"), CASES)
def test_a_state_is_taken_up_whenever_it_is_loaded(make: Any, load: Callable[[Training, Training], None]) -> None:
    first = Training(make).attach(None, **SPANS).steps(6)
    state = first.optimizer.state_dict()
    counts = []
    for is_attached_first in (True, False):
        if load in AFTER and not is_attached_first:
            continue
        other = Training(make)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if is_attached_first:
                other.attach(None, **SPANS)
            load(first, other)
            if not is_attached_first:
                other.attach(None, **SPANS)
        assert STATE_KEY not in other.optimizer.param_groups[0]  # its values are part of compiled steps
        assert entry_of(other.optimizer.state_dict()) == entry_of(state)
        other.steps(4)
        counts.append((other.counts[0], int(other.attachments[0]._averaged.n_averaged)))
    assert set(counts) == {(10, 2)}  # 4 updates in all
    assert first.attachments[0]._averaged.n_averaged == 2


def test_a_flattened_state_without_ours_is_loaded() -> None:
    first, second = Training().steps(2), Training().attach(None)
    with pytest.warns(UserWarning, match="those in its state are none"):
        flattened(first, second)
    assert second.optimizer.state[second.model[0].weight]["step"] == 2


@pytest.mark.parametrize("names", [("b",), ("b", "a"), ("a", "b", "c")], ids=str)
@pytest.mark.parametrize("options", [None, FLAT], ids=["nested", "flat"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints_keep_it(options: Any, names: Any, tmp_path: Path) -> None:
    first = Training().attach("a").attach("b", start=9).steps(5)
    saved = get_optimizer_state_dict(first.model, first.optimizer, options=options)
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path)
    second = Training().attach(*names, start=9)
    state = {"optimizer": get_optimizer_state_dict(second.model, second.optimizer, options=options)}
    assert second.counts == [0] * len(names)
    dcp.load(state, checkpoint_id=tmp_path)
    with pytest.warns(UserWarning, match="takes the place of|those in its state are"):
        set_optimizer_state_dict(second.model, second.optimizer, state["optimizer"], options=options)
    want = {"a": (5, 0), "b": (5, 9), "c": (0, 9)}
    assert [(each.step, each.schedule.start) for each in second.attachments] == [want[name] for name in names]


# By name


@pytest.mark.parametrize("load", LOADS[:2])
@pytest.mark.parametrize("attached", [(), ("a",), ("b", "a"), ("a", "b", "c"), ("c", "d")], ids=str)
def test_states_are_matched_by_name_and_none_stops_the_optimizer(attached: Any, load: Any) -> None:
    first = Training().attach("a", start=1).attach("b", start=2).steps(3)
    second = Training().attach(*attached)
    own = {each.name: each for each in second.attachments}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        load(first, second)
    text = " ".join(str(warning.message) for warning in found)
    assert ("those in its state are 'a', 'b'." in text) == (len(attached) > 0 and {*attached} != {"a", "b"})
    for name, attachment in own.items():
        want = {"a": (3, 1), "b": (3, 2)}.get(name, (0, 0))
        assert (attachment.step, attachment.schedule.start) == want
    assert second.optimizer.state[second.model[0].weight]["step"] == 3
    # What has found no partner waits for it, also through another save.
    assert {**entry_of(second.optimizer.state_dict()), **entry_of(first.optimizer.state_dict())}.keys() >= {"a", "b"}
    if "b" not in own:
        third = Training()
        load(second, third)
        third.attach("b", start=2)
        assert third.counts == [3]


def test_default_names_tell_averages_apart_and_stay_the_same() -> None:
    def averages(training: Training) -> list[Any]:
        model = training.model
        return [
            FusedAveragedModel(model),
            FusedAveragedModel(model, rule=ExponentialAverage(0.9)),
            FusedAveragedModel(model, rule=ExponentialAverage()),
            FusedAveragedModel(model, avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.8)),
            FusedAveragedModel(model, avg_fn=own_function),
            FusedAverages(model, rules={"fast": ExponentialAverage(0.5), "mean": EqualAverage()}),
            FusedAveragedModel(model),
        ]

    first, second = Training(), Training()
    for start, average in enumerate(averages(first)):
        first.attach(None, averaged=average, start=start)
    assert [each.name for each in first.attachments] == [
        "EqualAverage", "ExponentialAverage(decay=0.9)", "ExponentialAverage", "ExponentialAverage(decay=0.8)",
        "own_function", "fast, mean", "EqualAverage 2",
    ]  # fmt: skip
    plainly(first.steps(1), second)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for average in averages(second)[5::-1]:
            second.attach(None, averaged=average, start=9)
    assert len(found) == 6  # each schedule takes the place of another
    assert [each.schedule.start for each in second.attachments] == [5, 4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match=r"name must be one that no other average .* has, got 'fast, mean'"):
        second.attach("fast, mean")
    second.attachments[0].detach()
    second.attach("fast, mean", step=1)


def own_function(average: Any, param: Any, _: Any) -> Any:
    return (average + param) / 2


# Where there is none


@pytest.mark.parametrize("stepped", ["the optimizer", "the average", "neither"])
@pytest.mark.parametrize("several", [False, True])
def test_a_state_that_is_missing_is_warned_of(several: bool, stepped: str) -> None:
    training = Training()
    rules = {"fast": ExponentialAverage(0.5), "mean": EqualAverage()}
    averaged: Any = FusedAverages(training.model, rules=rules) if several else FusedAveragedModel(training.model)
    if stepped == "the optimizer":
        plainly(Training().steps(2), training)
    elif stepped == "the average":
        averaged.update_parameters(training.model)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        averaged.attach(training.optimizer, **SPANS).detach()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert averaged.attach(training.optimizer, **SPANS, step=6).step == 6
    if stepped == "neither":
        assert found == []
    else:
        (warning,) = found
        assert "attachment.step counts from 0, although the optimizer or the average" in str(warning.message)
        assert warning.filename == __file__


def test_a_step_that_is_given_is_taken_instead_of_the_saved_one() -> None:
    first, second = Training().attach("a", **SPANS).steps(4), Training()
    plainly(first, second)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.attach("a", every=5, step=7)
    assert (second.counts, second.attachments[0].schedule) == ([7], Schedule(0, 5))


BAD = ["", "3", "{", '{"EqualAverage": 3}', '{"EqualAverage": {"step": -1}}', 7, [1], torch.zeros(2), None]


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_an_entry_that_cannot_be_read_stops_nothing(bad: Any, attach_first: bool) -> None:
    state = Training().steps(1).optimizer.state_dict()
    state["param_groups"][0][STATE_KEY] = bad
    training = Training().attach(*[None] * attach_first)
    load = [training.optimizer.load_state_dict, lambda state: training.attach(None)]
    if not attach_first:
        load.pop(0)(state)
    with pytest.warns(UserWarning, match=r"must be|counts from 0|those in its state are none"):
        load[0](state)
    assert (training.counts, training.optimizer.state[training.model[0].weight]["step"]) == ([0], 1)
    assert entry_of(training.steps(1).optimizer.state_dict())["EqualAverage"]["step"] == 1


@pytest.mark.parametrize("lists", [1, 2, 3])
def test_the_list_of_before_is_read_if_as_many_are_attached(lists: int) -> None:
    state = Training().steps(1).optimizer.state_dict()
    state[STATE_KEY] = [{"step": 5 + i, "schedule": Schedule(0, 1).state_dict()} for i in range(lists)]
    training = Training().attach("b", "a")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        training.optimizer.load_state_dict(state)
    assert training.counts == ([5, 6] if lists == 2 else [0, 0])
    assert len(found) == (lists != 2)


# Recipes


@pytest.mark.parametrize("to", ["swa", "base"])
def test_torchcontribs_swa_is_loaded_before_or_after(to: str) -> None:
    def make(groups: Any) -> SWA:
        return SWA(SGD(groups, 0.1, momentum=0.9), swa_start=0, swa_freq=1)

    def attach(training: Training) -> Attachment:
        optimizer = training.optimizer if to == "swa" else training.optimizer.optimizer
        return FusedAveragedModel(training.model).attach(optimizer, **SPANS)

    first = Training(make)
    attach(first)
    first.steps(6)
    for is_attached_first in (True, False):
        second = Training(make)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attachment = attach(second) if is_attached_first else None
            second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
            attachment = attachment or attach(second)
        assert attachment.step == 6
        assert second.steps(2).optimizer.param_groups[0]["n_avg"] == 8
        assert attachment.step == 8


def test_composers_swa_is_loaded_before_or_after() -> None:
    options = {"max_duration": "4ep", "steps_per_epoch": 3, "swa_start": "0.25dur"}
    options |= {"swa_end": "0.75dur", "update_interval": "2ba"}
    first = Training()
    ComposerSWA(FusedAveragedModel(first.model), first.optimizer, **options)
    first.steps(6)
    for is_attached_first in (True, False):
        second = Training()
        if not is_attached_first:
            plainly(first, second)
        swa = ComposerSWA(FusedAveragedModel(second.model), second.optimizer, **options)
        if is_attached_first:
            plainly(first, second)
        assert swa.attachment.step == 6
        second.steps(6)
        assert swa.is_completed


def test_groups_that_are_added_have_no_entry() -> None:
    first, second = Training().attach("a").steps(2), Training()
    for training in (first, second):
        training.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    plainly(first, second)
    assert [STATE_KEY in group for group in second.optimizer.param_groups] == [True, False, False]
    second.optimizer.param_groups.reverse()  # as tools may, which match groups by their params
    assert second.attach("a").counts == [2]


def test_a_run_that_loads_before_it_attaches_equals_one_that_was_not_stopped() -> None:
    whole, first, second = Run(), Run(), Run()
    whole.attach(**SPANS)
    first.attach(**SPANS)
    whole.steps(10)
    first.steps(6)
    state = copy.deepcopy([each.state_dict() for each in (first.model, first.optimizer, first.averaged)])
    for each, loaded in zip((second.model, second.optimizer, second.averaged), state, strict=True):
        each.load_state_dict(loaded)
    second.generator.set_state(first.generator.get_state())
    second.attach(**SPANS)
    second.steps(4)
    assert second.averaged.n_averaged == whole.averaged.n_averaged == 4
    for got, want in zip(second.averaged.parameters(), whole.averaged.parameters(), strict=True):
        assert torch.equal(got, want)
