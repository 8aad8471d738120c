"""Rules and averaging functions that are set after the construction: what counts, and what reads back."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

from swafast import (
    EqualAverage,
    ExponentialAverage,
    FusedAveragedModel,
    FusedAverages,
    PowerAverage,
    Rule,
    ShardedAveragedModel,
    ShardedAverages,
)
from swafast.loop.guard import Guard
from tests.support import Held, drift, step_with_ones

EMA = ExponentialAverage(0.75)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def several(kind: Any) -> Callable[..., tuple[Any, Any]]:
    def make(model: nn.Module, rule: Rule | None, **options: Any) -> tuple[Any, Any]:
        averages = kind(model, rules={"first": EqualAverage(), "tested": rule or EqualAverage()}, **options)
        return averages, averages["tested"]

    return make


def single(kind: Any) -> Callable[..., tuple[Any, Any]]:
    return lambda *args, **options: (kind(args[0], rule=args[1], **options),) * 2


#: What is updated, and one averaged model in it.
KINDS = {
    "single": single(FusedAveragedModel),
    "several": several(FusedAverages),
    "sharded": single(ShardedAveragedModel),
    "sharded several": several(ShardedAverages),
}
ALL = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def value_of(averaged: Any) -> Tensor:
    state = averaged.full_state_dict() if isinstance(averaged, ShardedAveragedModel) else averaged.state_dict()
    return state["module.weight"].double()


def require_near(averaged: Any, expected: Tensor) -> None:
    torch.testing.assert_close(value_of(averaged), expected, rtol=1e-6, atol=1e-6)


# Rules


@ALL
def test_a_rule_may_be_set_at_any_time(make: Any) -> None:
    updated, averaged = make(model := nn.Linear(3, 5), None)
    rules = [EqualAverage(), EMA, PowerAverage(6.94), ExponentialAverage(0.9, warmup="ramp", tau=4.0), EMA, None]
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for n, rule in enumerate(rules):
        drift(model)
        averaged.rule = rule
        assert averaged.rule == (rule if rule is not None else EqualAverage())
        updated.update_parameters(model)
        weight = (rule or EqualAverage()).weight(n) if n else 1.0
        expected = expected + weight * (model.weight.detach().double() - expected)
        require_near(averaged, expected)


@ALL
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (0.99, r"rule must be a Rule such as ExponentialAverage\(0\.999\), got float 0\.99"),
        (ExponentialAverage, "rule must be a Rule .* got the class ExponentialAverage"),
        ({"a": EMA}, "rule must be one Rule, got a dict"),
        (get_ema_avg_fn(0.9), "an averaging function goes to avg_fn=|no averaging function, but a Rule of your own"),
    ],
)
def test_what_is_no_rule_is_refused(make: Any, bad: object, message: str) -> None:
    _, averaged = make(nn.Linear(2, 2), EMA)
    with pytest.raises(TypeError, match=message):
        averaged.rule = bad
    assert averaged.rule == EMA


@pytest.mark.parametrize("kind", [FusedAverages, ShardedAverages])
def test_several_averages_say_where_a_rule_is_set(kind: Any) -> None:
    averages = kind(nn.Linear(2, 2), rules={"fast": EMA, "mean": EqualAverage()})
    message = r"each of several averages has its own {}: use averages\['fast'\]\.{}"
    for name in ("rule", "swapped_into", "n_averaged"):
        if hasattr(FusedAveragedModel if kind is FusedAverages else ShardedAveragedModel, name):
            with pytest.raises(AttributeError, match=message.format(name, name)):
                getattr(averages, name)
            with pytest.raises(AttributeError, match=message.format(name, name)):
                setattr(averages, name, EqualAverage())
    assert averages["fast"].rule == EMA


@ALL
def test_an_update_under_way_goes_by_the_rule_before_it(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    updated, averaged = make(model := nn.Linear(2, 2), ExponentialAverage(0.5))
    if isinstance(averaged, ShardedAveragedModel):
        held = Held(monkeypatch, type(updated), name="_update")
    else:
        held = Held(monkeypatch, type(updated))
    held.let_go.set()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    attachment = updated.attach(optimizer, overlap=True)
    step_with_ones(optimizer, model.parameters())
    attachment.settle("")
    first = value_of(averaged)
    held.let_go.clear()
    step_with_ones(optimizer, model.parameters())
    settle = attachment.settle
    attachment.settle = lambda *args: (held.let_go.set(), settle(*args))[1]
    averaged.rule = ExponentialAverage(1.0)
    held.let_go.set()
    settle("")
    torch.testing.assert_close(value_of(averaged), first - 0.5)
    attachment.detach()


@ALL
def test_a_rule_that_is_set_during_an_update_is_seen(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "settle", lambda *args: None)
    with pytest.raises(AssertionError, match="not close"):
        test_an_update_under_way_goes_by_the_rule_before_it(make, monkeypatch)


# The schedules of self-supervised methods


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("format", [None, "compensated"])
def test_the_teacher_of_dino(backend: str | None, format: str | None) -> None:
    """Hold an average by a cosine schedule to DINO's loop, in float64; after its end it no longer moves."""
    updates, base = 12, 0.6
    rule = ExponentialAverage(base, schedule="cosine", updates=updates)
    student = nn.Linear(70, 9)
    teacher = FusedAveragedModel(student, rule=rule, backend=backend, format=format)
    expected = student.weight.detach().double()
    for it in range(updates + 3):
        drift(student)
        teacher.update_parameters(student)
        momentum = 1.0 + 0.5 * (base - 1.0) * (1.0 + math.cos(math.pi * min(it, updates) / updates)) if it else 0.0
        expected = expected * momentum + student.weight.detach().double() * (1.0 - momentum)
    torch.testing.assert_close(teacher.module.weight.double(), expected, rtol=1e-6, atol=1e-6)


# Averaging functions


def own_function(average: Tensor, param: Tensor, num_averaged: object) -> Tensor:
    return average + (param - average) / 4


def own_multi_function(averages: list[Tensor], params: list[Tensor], num_averaged: object) -> None:
    torch._foreach_lerp_(averages, params, 0.25)


SINGLE = [get_ema_avg_fn(0.9), get_ema_avg_fn(0.0), get_swa_avg_fn(), own_function, None]
MULTI = [get_ema_multi_avg_fn(0.9), get_ema_multi_avg_fn(0.0), get_swa_multi_avg_fn(), own_multi_function, None]


@pytest.mark.parametrize("single", SINGLE)
@pytest.mark.parametrize("multi", MULTI)
def test_functions_that_are_set_count_as_in_torchs_class(single: Any, multi: Any) -> None:
    """Start with each one, then set each of the others, one after the other and both together."""
    model = nn.Linear(4, 3)
    start = {"avg_fn": single} if single is not None else {"multi_avg_fn": multi}
    ours, theirs = FusedAveragedModel(model, **start), AveragedModel(model, **start)
    changes = [{}, {"avg_fn": single}, {"multi_avg_fn": multi}, {"avg_fn": None}, {"multi_avg_fn": None}]
    for change in [*changes, {"avg_fn": get_ema_avg_fn(0.25)}, {"multi_avg_fn": multi, "avg_fn": single}]:
        for averaged in (ours, theirs):
            for name, function in change.items():
                setattr(averaged, name, function)
        assert (ours.avg_fn, ours.multi_avg_fn) == (theirs.avg_fn, theirs.multi_avg_fn)
        for _ in range(2):
            drift(model)
            ours.update_parameters(model)
            theirs.update_parameters(model)
        torch.testing.assert_close(ours.module.weight, theirs.module.weight, rtol=2e-6, atol=2e-6)


def test_a_decay_schedule_by_functions() -> None:
    ours, theirs = (kind(nn.Linear(2, 2), avg_fn=get_ema_avg_fn(0.9)) for kind in (FusedAveragedModel, AveragedModel))
    assert ours.rule == ExponentialAverage(0.9)
    for averaged in (ours, theirs):
        averaged.avg_fn = get_ema_avg_fn(0.0)
    assert ours.rule == ExponentialAverage(0.0)
    for _ in range(2):
        for averaged in (ours, theirs):
            averaged.update_parameters(model := nn.Linear(2, 2))
            assert torch.equal(averaged.module.weight, model.weight)


def test_the_last_of_a_rule_and_a_function_counts() -> None:
    averaged = FusedAveragedModel(nn.Linear(2, 2), rule=EMA)
    assert averaged.multi_avg_fn is averaged.rule is EMA  # torch's own update would go by it
    averaged.avg_fn = get_ema_avg_fn(0.5)
    assert averaged.rule == ExponentialAverage(0.5)
    averaged.rule = EMA
    assert (averaged.rule, averaged.avg_fn) == (EMA, None)
    averaged.avg_fn = own_function
    assert averaged.rule is None
    averaged.multi_avg_fn = EMA
    assert (averaged.rule, averaged.avg_fn) == (EMA, own_function)
    averaged.multi_avg_fn = None
    assert averaged.rule is None


def test_a_subclass_may_call_the_function_itself() -> None:
    class ByHand(FusedAveragedModel):
        def update_parameters(self, model: nn.Module) -> None:
            with torch.no_grad():
                for average, param in zip(self.module.parameters(), model.parameters(), strict=True):
                    average.copy_(self.avg_fn(average, param, self.n_averaged))
            self.n_averaged.add_(1)

    model = nn.Linear(2, 2)
    averaged = ByHand(model, avg_fn=get_ema_avg_fn(0.75))
    before = model.weight.detach().clone()
    drift(model)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged.module.weight.detach(), 0.75 * before + 0.25 * model.weight.detach())


@pytest.mark.parametrize("given", [{"avg_fn": SINGLE[0]}, {"multi_avg_fn": MULTI[0]}, {"rule": EMA}, {}], ids=", ".join)
def test_copies_keep_functions_and_pickles_their_rule(given: dict[str, Any]) -> None:
    model = nn.Linear(2, 2)
    averaged = FusedAveragedModel(model, **given)
    averaged.update_parameters(model)
    for copied in (copy.deepcopy(averaged), copy.copy(averaged)):
        assert (copied.avg_fn, copied.multi_avg_fn) == (averaged.avg_fn, averaged.multi_avg_fn)
        assert copied.rule == averaged.rule
    loaded = pickle.loads(pickle.dumps(averaged))
    assert (loaded.avg_fn, loaded.multi_avg_fn) == (None, averaged.rule if given else None)
    loaded.rule = EqualAverage()  # it is no part of what was pickled
    assert averaged.rule != EqualAverage() or not given
    drift(model)
    loaded.update_parameters(model)
    assert loaded.n_averaged == 2


@pytest.mark.parametrize("name", ["avg_fn", "multi_avg_fn"])
def test_what_is_no_function_is_refused(name: str) -> None:
    averaged = FusedAveragedModel(nn.Linear(2, 2), rule=EMA)
    with pytest.raises(TypeError, match=f"^{name} must be callable, got float"):
        setattr(averaged, name, 0.9)
    assert averaged.rule == EMA


@pytest.mark.parametrize("name", ["avg_fn", "multi_avg_fn"])
def test_a_function_that_comes_later_has_no_format_of_ours(name: str) -> None:
    model = nn.Linear(2, 2)
    averaged = FusedAveragedModel(model, format="compact")
    averaged.update_parameters(model)
    before = copy.deepcopy(averaged.state_dict())
    setattr(averaged, name, own_function if name == "avg_fn" else own_multi_function)
    for use in (averaged.update_parameters, averaged.copy_to):
        with pytest.raises(ValueError, match="format must be None with an averaging function of your own, got 'comp"):
            use(model)
    after = averaged.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    averaged.rule = EMA
    averaged.update_parameters(model)


# Functions of a subclass, and functions that are modules


class ByProperty:
    """Another function for each update, by a property."""

    decay = 0.5

    @property
    def avg_fn(self) -> Any:
        return get_ema_avg_fn(self.decay)

    @avg_fn.setter
    def avg_fn(self, value: object) -> None:
        pass


class ByMethod:
    """A function that is a method."""

    decay = 0.5

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)  # type: ignore[call-arg]
        del self.avg_fn  # which torch's constructor has set to None

    def avg_fn(self, average: Tensor, param: Tensor, count: Any) -> Tensor:  # type: ignore[no-redef]
        return torch.lerp(average, param, self.decay)


class Lerp(nn.Module):
    """An averaging function that is a module."""

    def forward(self, average: Tensor, param: Tensor, count: Any) -> Tensor:
        return torch.lerp(average, param, 0.6)


@pytest.mark.parametrize("mixin", [ByProperty, ByMethod])
def test_a_function_of_the_subclass_counts_as_in_torchs_class(mixin: type) -> None:
    model = nn.Linear(3, 2)
    ours, torchs = (type("Own", (mixin, kind), {})(model) for kind in (FusedAveragedModel, AveragedModel))
    for n in range(5):
        drift(model)
        for averaged in (ours, torchs):
            averaged.decay = n / 5
            averaged.update_parameters(model)
    torch.testing.assert_close(ours.module.weight, torchs.module.weight)


def test_a_function_may_be_a_module() -> None:
    model = nn.Linear(3, 2)
    ours, torchs = (kind(model, avg_fn=Lerp()) for kind in (FusedAveragedModel, AveragedModel))
    later = FusedAveragedModel(model, avg_fn=get_ema_avg_fn(0.9))
    later.avg_fn = function = Lerp()
    assert later.avg_fn is function
    for _ in range(3):
        drift(model)
        for averaged in (ours, torchs, later):
            averaged.update_parameters(model)
    torch.testing.assert_close(ours.module.weight, torchs.module.weight)
    torch.testing.assert_close(later.module.weight, torchs.module.weight)
    assert copy.deepcopy(later).rule is None
    later.avg_fn = None
    assert (later.avg_fn, later.rule) == (None, EqualAverage())


class WithDecay(FusedAveragedModel):
    """A subclass with an attribute of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.decay = 0.5


@pytest.mark.parametrize("name", ["decay", "momentum"])
def test_a_decay_is_the_rules(name: str) -> None:
    model = nn.Linear(2, 2)
    sharded = ShardedAveragedModel(model)
    averages = FusedAverages(model, rules={"a": EMA})
    for averaged in (FusedAveragedModel(model), averages["a"], averages, sharded):
        with pytest.raises(AttributeError, match=r"write averaged\.rule = ExponentialAverage\(0\.99\)"):
            setattr(averaged, name, 0.99)
    assert WithDecay(model).decay == 0.5


def test_what_would_be_set_in_vain_is_refused() -> None:
    model = nn.Linear(2, 2)
    sharded = ShardedAveragedModel(model)
    several = ShardedAverages(model, rules={"a": EMA}), FusedAverages(model, rules={"a": EMA})
    for averaged in (sharded, several[0]["a"]):
        with pytest.raises(AttributeError, match=r"updated by a rule, set rule = ExponentialAverage\(decay=0.25\)"):
            averaged.avg_fn = get_ema_avg_fn(0.25)
        with pytest.raises(AttributeError, match="set rule, to a Rule of yours"):
            averaged.multi_avg_fn = print
        assert not hasattr(averaged, "avg_fn")
    for averages in several:
        with pytest.raises(AttributeError, match=r"its own rule: use averages\['a'\]\.rule"):
            averages.rules = {"a": EqualAverage()}
