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
from tests.support import step_with_ones
from tests.test_attach import Run, entry_of
from tests.test_contents import silent

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
SPANS = {"start": 3, "every": 2}


class Training:
    """A model with an optimizer whose first group is of the last layer, and the averages attached to it."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer] = Adam, layers: Any = (2, 0)) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.optimizer = make([{"params": list(self.model[i].parameters())} for i in layers])
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
    state = copy.deepcopy(get_optimizer_state_dict(one.model, one.optimizer, options=FULL))
    set_optimizer_state_dict(other.model, other.optimizer, state, options=FULL)


def flattened(one: Training, other: Training) -> None:
    state = copy.deepcopy(get_optimizer_state_dict(one.model, one.optimizer, options=FLAT))
    set_optimizer_state_dict(other.model, other.optimizer, state, options=FLAT)


def pickling(one: Training, other: Training) -> None:
    """A trainer that pickles the optimizer's state, and changes the order of keys."""
    state = pickle.loads(pickle.dumps(one.optimizer.state_dict()))
    other.optimizer.load_state_dict({key: state[key] for key in sorted(state, reverse=True)})


LOADS = [plainly, by_torchs_tools, pickling, in_full]
AFTER = [flattened]  # torch does not take keys that are not in the optimizer's groups
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


@pytest.mark.parametrize("load", [*LOADS, *AFTER])
def test_a_state_without_ours_is_loaded(load: Callable[[Training, Training], None]) -> None:
    first, second = Training().steps(2), Training().attach(None)
    with pytest.warns(UserWarning, match="those in its state are none"):
        load(first, second)
    assert (second.optimizer.state[second.model[0].weight]["step"], second.counts) == (2, [0])


@pytest.mark.parametrize("load", [*LOADS, *AFTER])
def test_a_state_is_loaded_where_nothing_is_attached(load: Callable[[Training, Training], None]) -> None:
    first, second, third = Training().attach(None).steps(2), Training(), Training()
    load(first, second)
    load(second, third)
    assert third.optimizer.state[third.model[0].weight]["step"] == 2
    if load not in AFTER:
        assert third.attach(None).counts == [2]


GROUPS = [((), (2, 0)), ((0, 2),), ((), (0,), (2,)), ((0,), (), (2,))]  # of layers
GROUPINGS = [(by_torchs_tools, by, to) for by in GROUPS for to in GROUPS if len(by) == len(to) or to == GROUPS[1]]
GROUPINGS += [(flattened, by, GROUPS[1]) for by in GROUPS]  # torch loads no empty groups from such a state


@pytest.mark.parametrize(("load", "by", "to"), GROUPINGS)
def test_groups_may_be_empty_or_in_another_order(load: Any, by: Any, to: Any) -> None:
    def grouped(groups: Any) -> Training:
        def make(layers: list[Any]) -> torch.optim.Optimizer:
            params = {layer: each["params"] for layer, each in zip((2, 0), layers, strict=True)}
            return Adam([{"params": [param for layer in group for param in params[layer]]} for group in groups])

        return Training(make)

    second = grouped(to).attach(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(grouped(by).attach(None).steps(2), second)
    assert second.counts == [2]


def test_a_state_that_waits_does_not_stop_a_flattened_load() -> None:
    training = Training().attach("a")
    with pytest.warns(UserWarning, match="those in its state are 'b'"):
        plainly(Training().attach("b").steps(1), training)
    with pytest.warns(UserWarning, match="those in its state are none"):
        flattened(Training().steps(2), training)
    assert training.optimizer.state[training.model[0].weight]["step"] == 2


def loads_without_hooks(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load as optimizers with a ``load_state_dict`` of their own do, such as bitsandbytes'."""
    groups = [{**new, "params": own["params"]} for own, new in zip(optimizer.param_groups, state["param_groups"])]  # noqa: B905
    optimizer.__setstate__({"state": optimizer.state, "param_groups": groups})


def set_both(training: Training) -> None:
    training.attachments[0].step = 9
    training.attachments[0].schedule = Schedule(1, 1)
    training.steps(1)


TAKE_UP: dict[str, tuple[Callable[[Training], object], list[int]]] = {
    "step": (lambda training: training.steps(1), [6]),
    "save": (lambda training: training.optimizer.state_dict(), [5]),
    "set": (set_both, [10]),
    "attach": (lambda training: training.attach("b"), [5, 5]),
}


@pytest.mark.parametrize("then", TAKE_UP)
def test_a_load_without_hooks_is_taken_up(then: str) -> None:
    state = Training().attach("a").attach("b").steps(5).optimizer.state_dict()
    training = Training().attach("a")
    loads_without_hooks(training.optimizer, copy.deepcopy(state))
    with pytest.warns(UserWarning, match="those in its state are 'a', 'b'"):
        TAKE_UP[then][0](training)
    assert training.counts == TAKE_UP[then][1]
    assert STATE_KEY not in training.optimizer.param_groups[0]
    assert entry_of(training.optimizer.state_dict()).keys() == {"a", "b"}


@pytest.mark.parametrize("hook_first", [True, False])
def test_other_hooks_may_change_the_form_of_the_state(hook_first: bool) -> None:
    def hooked(training: Training) -> Training:
        training.optimizer.register_state_dict_post_hook(lambda _, state: {"own": state})
        training.optimizer.register_load_state_dict_pre_hook(lambda _, state: state["own"])
        return training

    first, second = Training(), Training()
    for training in (first, second):
        if hook_first:
            hooked(training).attach(None)
        else:
            hooked(training.attach(None))
    plainly(first.steps(3), second)
    assert second.counts == [3]


@pytest.mark.parametrize("names", [("b",), ("b", "a"), ("a", "b", "c")], ids=str)
@pytest.mark.parametrize("options", [None, FLAT, FULL], ids=["nested", "flat", "full"])
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


@pytest.mark.parametrize("load", [plainly, by_torchs_tools])
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


@pytest.mark.parametrize("attach_first", [True, False])
def test_several_averages_may_be_named_in_another_order(attach_first: bool) -> None:
    first, second = Training(), Training()
    for training, names in ((first, ("slow", "fast", "mean")), (second, ("mean", "slow", "fast"))):
        averages = FusedAverages(training.model, rules={name: EqualAverage() for name in names})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if training is second and not attach_first:
                plainly(first, second)
            training.attach(None, averaged=averages, **SPANS)
        training.steps(4 if training is first else 0)
    if attach_first:
        plainly(first, second)
    assert second.counts == [4]


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("load", [plainly, by_torchs_tools])
@pytest.mark.parametrize("starts", [(5, 2), (5,), (3, 5, 2), (2, 5, 3)], ids=str)
def test_equal_rules_are_told_apart_by_their_schedules(starts: Any, load: Any, attach_first: bool) -> None:
    first, second = Training(), Training()
    for step, start in enumerate((2, 5, 3)[: max(2, len(starts))]):
        first.attach(None, start=start, step=10 * step)
    first.steps(1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if not attach_first:
            load(first, second)
        for start in starts:
            second.attach(None, start=start)
        if attach_first:
            load(first, second)
    assert [(each.step, each.schedule.start) for each in second.attachments] == [
        ({2: 1, 5: 11, 3: 21}[start], start) for start in starts
    ]
    assert len({each.name for each in second.attachments}) == len(starts)
    assert len(found) == (attach_first and len(starts) == 1)  # the other state is not attached
    assert entry_of(second.optimizer.state_dict()) == entry_of(first.optimizer.state_dict())


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize(
    ("steps", "start", "names", "says"),
    [
        ((0, 3), 0, (None, None), "have equal rules and schedules but different steps"),
        ((0, 0), 0, (None, None), None),
        ((0, 3), 0, ("a", "b"), None),
        ((0,), 4, (None,), "takes the place of"),
    ],
    ids=["unlike", "alike", "named", "changed"],
)
def test_what_cannot_be_told_apart_is_warned_of(
    steps: Any, start: int, names: Any, says: str | None, attach_first: bool
) -> None:
    first, second = Training(), Training()
    for name, step in zip(names, steps, strict=True):
        first.attach(name, step=step)
    first.steps(2)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if not attach_first:
            plainly(first, second)
        second.attach(*names, start=start)
        if attach_first:
            plainly(first, second)
    texts = [text for each in found if "has another average with" not in (text := str(each.message))]
    assert [says in text for text in texts if says] == [True] * (says is not None)
    assert second.counts == [step + 2 for step in steps]


def test_the_last_of_equal_rules_keeps_its_state() -> None:
    first, second = Training().attach(None, None), Training().attach(None, start=7)
    first.attachments[0].detach()
    with pytest.warns(UserWarning, match="takes the place of"):
        plainly(first.steps(2), second)
    assert [(each.name, each.step) for each in second.attachments] == [("EqualAverage 2", 2)]


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


@pytest.mark.parametrize("load", [*LOADS, *AFTER])
@pytest.mark.parametrize("how", ["argument", "attribute", "state", "before a step", "before a load"])
def test_a_step_that_the_user_has_told_is_not_warned_of(how: str, load: Any) -> None:
    training = Training().attach("a", **({"step": 6} if how in ("argument", "before a step") else {}))
    (attachment,) = training.attachments
    if how == "attribute":
        attachment.step = 6
    elif how == "state":
        attachment.load_state_dict({**attachment.state_dict(), "step": 6})
    elif how == "before a step":
        training.steps(1)
    elif how == "before a load":
        attachment.step = 3
        load(Training().attach("a").steps(6), training)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        load(Training().steps(6), training)
    assert training.counts == [6 + (how == "before a step")]
    assert len(found) == how.startswith("before")


NOT_UTF8 = torch.full((3,), 255, dtype=torch.uint8)
BAD = ["", "3", "{", '{"EqualAverage": 3}', '{"EqualAverage": {"step": -1}}', 7, [1], torch.zeros(2), NOT_UTF8, None]


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


def test_a_load_that_fails_leaves_the_names_of_attachments() -> None:
    def make(groups: Any) -> SWA:
        return SWA(SGD(groups, 0.1, momentum=0.9))

    first, second = Training(make), Training(make)
    for training, starts in ((first, (1, 2)), (second, (2, 1))):
        for start in starts:
            training.attach(None, start=start)

    def fails(_: Any) -> None:
        assert [each.name for each in second.attachments] == ["EqualAverage 2", "EqualAverage"]
        raise ArithmeticError

    second.optimizer.register_load_state_dict_post_hook(fails)
    with pytest.raises(ArithmeticError):
        second.optimizer.load_state_dict(copy.deepcopy(first.steps(3).optimizer.state_dict()))
    assert [(each.name, each.step, each.schedule.start) for each in second.attachments] == [
        ("EqualAverage", 0, 2), ("EqualAverage 2", 0, 1),
    ]  # fmt: skip


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


# Only one of the two loaded


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("forgotten", ["optimizer", "averaged", "neither", "told"])
def test_a_first_step_warns_if_only_one_of_the_two_was_loaded(forgotten: str, several: bool) -> None:
    def make() -> tuple[nn.Module, Any, Any]:
        model = nn.Linear(2, 2)
        rules = {"fast": ExponentialAverage(0.9)}
        averaged = FusedAverages(model, rules=rules) if several else FusedAveragedModel(model, rule=rules["fast"])
        return model, Adam(model.parameters()), averaged

    def step(optimizer: Any) -> None:
        for group in optimizer.param_groups:
            step_with_ones(optimizer, group["params"])

    runs = make(), make()  # which keep the models
    (_, optimizer, averaged), (_, other, resumed) = runs
    averaged.attach(optimizer, start=2)
    for _ in range(4):
        step(optimizer)
    attachment = resumed.attach(other, start=2)
    if forgotten in ("averaged", "neither"):
        other.load_state_dict(optimizer.state_dict())
    if forgotten != "averaged":
        resumed.load_state_dict(averaged.state_dict())
    if forgotten == "told":
        attachment.step = 0
    messages = {"optimizer": "counts from 0, although", "averaged": "goes on at step 5, but holds no model"}
    told = pytest.warns(UserWarning, match=messages[forgotten]) if forgotten in messages else silent()
    with told:
        step(other)
    with silent():
        step(other)


def test_a_rollback_of_the_optimizer_alone_is_told() -> None:
    run = Training().attach(None)
    before = copy.deepcopy(run.optimizer.state_dict())
    run.steps(3)
    run.optimizer.load_state_dict(before)
    with pytest.warns(UserWarning, match="counts from 0, although"):
        run.steps(1)


# Mistakes with the handle


def test_the_handle_is_kept_and_a_second_average_of_the_same_kind_is_warned_of() -> None:
    model = nn.Linear(2, 2)
    optimizer, averaged = Adam(model.parameters()), FusedAveragedModel(model)
    assert averaged.attachment is None
    attachment = averaged.attach(optimizer)
    assert averaged.attachment is attachment
    with pytest.raises(RuntimeError, match=r"got Attachment\(.*averaged\.attachment\.detach\(\).*attach\(\[first, sec"):
        averaged.attach(optimizer)
    with pytest.raises(TypeError, match=r"model must be a .*, got Adam: .* attach\(\[first, second\]\)"):
        FusedAveragedModel(model).attach(optimizer, Adam(model.parameters()))
    for options in ({"name": "other"}, {"every": 2}):
        with silent():
            FusedAveragedModel(model).attach(optimizer, **options)
    part = nn.Linear(2, 2)
    optimizer.add_param_group({"params": part.parameters()})
    for alike in (FusedAveragedModel(part), FusedAveragedModel(model, format="compensated")):
        with silent():
            alike.attach(optimizer)
    with pytest.warns(UserWarning, match="has another average with the rule and the schedule of 'EqualAverage 5'"):
        FusedAveragedModel(model).attach(optimizer)
    for deviations in (4, 0):
        with silent():
            FusedAveragedModel(model, deviations=deviations).attach(optimizer, every=9)
    with pytest.warns(UserWarning, match="has another average with the rule and the schedule"):
        FusedAveragedModel(model, deviations=4).attach(optimizer, every=9)
    with pytest.raises(ValueError, match="name must not be empty"):
        FusedAveragedModel(model).attach(optimizer, name="")
    with pytest.raises(ValueError, match="every must not be above the last step, 50, or no update comes, got 100"):
        FusedAveragedModel(model).attach(optimizer, every=100, duration=50)
    with pytest.raises(ValueError, match=r"steps_per_epoch must be an int >= 1, got list: pass len\(loader\)"):
        FusedAveragedModel(model).attach(optimizer, every="1ep", steps_per_epoch=[torch.ones(1)])
    averaged.attachment.detach()
    assert averaged.attachment is None
