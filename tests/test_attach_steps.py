"""Which steps count, whatever runs the optimizer's hooks, and what an attachment leaves behind."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_optimizer_state_dict
from torch.distributed.optim.named_optimizer import _NamedOptimizer
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, FusedAverages
from swafast.loop import attachment as module
from swafast.loop.roster import STATE_KEY
from swafast.optim import SWA, ComposerSWA
from tests.stopped_training import WAYS
from tests.support import Held


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(value)


def set_grads(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = torch.zeros_like(param)


class Calls(SGD):
    """Calls the step of its base class, as often as asked."""

    times = 1
    fails = False

    def step(self, closure: Any = None) -> Any:
        for _ in range(self.times):
            loss = super().step(closure)
        if self.fails:
            fail()
        return loss


class CallsTwice(Calls):
    times = 2


class CallsDeeper(CallsTwice):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class AlsoHooked(SGD):
    """Has a step that torch takes for one with hooks already, since the wrapper copies the mark."""

    @functools.wraps(SGD.step)
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Shares(torch.optim.Optimizer):
    """A wrapper that shares all that an optimizer has, its hooks too."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner = optimizer
        super().__init__(optimizer.param_groups, {})
        self.__dict__.update(optimizer.__dict__)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def in_steps_of(optimizer: torch.optim.Optimizer, step: Callable[[], object]) -> None:
    """Step within the step of another optimizer."""

    class Outer(SGD):
        def step(self, closure: Any = None) -> Any:
            step()
            return super().step(closure)

    Outer([torch.zeros(1, requires_grad=True)], 0.1).step()


def by_scaler(optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()


def in_a_thread(optimizer: torch.optim.Optimizer) -> None:
    with ThreadPoolExecutor(1) as threads:
        threads.submit(optimizer.step).result()


def fail() -> float:
    raise ArithmeticError


def after_a_step_that_raises(optimizer: torch.optim.Optimizer) -> None:
    with pytest.raises(ArithmeticError):
        optimizer.step(fail)
    optimizer.step()


MAKERS = {
    "plain": lambda params: SGD(params, 0.0),
    "super": lambda params: Calls(params, 0.0),
    "super twice": lambda params: CallsTwice(params, 0.0),
    "super of super": lambda params: CallsDeeper(params, 0.0),
    "marked as hooked": lambda params: AlsoHooked(params, 0.0),
    "shared hooks": lambda params: Shares(SGD(params, 0.0)),
    "torchcontrib's": lambda params: SWA(Calls(params, 0.0)),
}
STEPS: dict[str, Callable[[torch.optim.Optimizer], object]] = {
    "step": lambda optimizer: optimizer.step(),
    "closure": lambda optimizer: optimizer.step(lambda: torch.zeros(())),
    "scaler": by_scaler,
    "thread": in_a_thread,
    "nested": lambda optimizer: in_steps_of(optimizer, optimizer.step),
    "after an error": after_a_step_that_raises,
}
KINDS = ("super twice", "shared hooks")


@pytest.mark.parametrize(
    ("kind", "step"), [*((kind, "step") for kind in MAKERS), *((kind, step) for kind in KINDS for step in STEPS)]
)
def test_the_outermost_step_counts_once(kind: str, step: str) -> None:
    model = make_model()
    SGD(model.parameters(), 0.1)  # from here on torch runs hooks in the step of this class too
    optimizer = MAKERS[kind](model.parameters())
    averaged = FusedAveragedModel(model, rule=ExponentialAverage(0.5))
    attachment = averaged.attach(optimizer)
    set_grads(model)
    StepLR(optimizer, 1)  # wraps the step
    for value in (1.0, 2.0, 3.0):
        fill(model, value)
        STEPS[step](optimizer)
    assert attachment.step == averaged.n_averaged == 3
    assert averaged.module[0].weight[0, 0] == 2.25


def every_hook_is_a_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "is_step", lambda optimizer: True)


def the_last_optimizer_counts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module.Attachment, "_counts", lambda attachment, index: True)


def test_the_gates_kill_the_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    for plant, gate, case in (
        (every_hook_is_a_step, test_the_outermost_step_counts_once, ("super twice", "step")),
        (the_last_optimizer_counts, test_several_optimizers_count_once_all_have_stepped, ("plain", -1)),
    ):
        plant(monkeypatch)
        with pytest.raises(AssertionError):
            gate(*case)
        monkeypatch.undo()


def test_a_step_that_raises_once_its_base_class_has_stepped_is_none() -> None:
    model = make_model()
    SGD(model.parameters(), 0.1)
    optimizer = Calls(model.parameters(), 0.1)
    averaged = FusedAveragedModel(model)
    attachment = averaged.attach(optimizer)
    set_grads(model)
    for optimizer.fails in (True, False, True, False):
        if optimizer.fails:
            with pytest.raises(ArithmeticError):
                optimizer.step()
        else:
            optimizer.step()
    assert attachment.step == averaged.n_averaged == 2


def test_composers_rate_moves_once_a_step() -> None:
    lrs = []
    for kind in (SGD, CallsTwice):
        model = make_model()
        optimizer = kind(model.parameters(), 0.1)
        swa = ComposerSWA(
            FusedAveragedModel(model), optimizer, max_duration="4ep", steps_per_epoch=3, swa_start="0.25dur",
            swa_end="0.75dur", update_interval="2ba", schedule_swa_lr=True, anneal_steps=3, swa_lr=0.03,
        )  # fmt: skip
        set_grads(model)
        lrs.append([(optimizer.step(), optimizer.param_groups[0]["lr"])[1] for _ in range(12)])
        assert swa.is_completed
    assert lrs[0] == lrs[1] != [0.1] * 12


# Steps that torch takes to make an optimizer's state


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [SGD, Adam, Calls])
def test_torchs_own_steps_are_none(kind: Any, way: str) -> None:
    model = make_model()
    optimizer = kind(model.parameters(), 0.1)
    averages = FusedAverages(model, rules={"fast": ExponentialAverage(0.5), "mean": EqualAverage()})
    attachment = averages.attach(optimizer, **WAYS[way])
    get_optimizer_state_dict(model, optimizer)
    _, state = get_state_dict(model, optimizer)
    other = kind(model.parameters(), 0.1)
    set_optimizer_state_dict(model, other, state)
    assert attachment.step == averages["mean"].n_averaged == 0
    set_grads(model)
    optimizer.step()
    attachment.join()
    assert attachment.step == averages["mean"].n_averaged == 1


def test_the_step_of_torchs_named_optimizer_that_makes_its_state_is_none() -> None:
    model = make_model()
    named = _NamedOptimizer(dict(model.named_parameters()), Adam, None, model, lr=0.1)  # type: ignore[arg-type]
    averaged = FusedAveragedModel(model)
    with pytest.raises(TypeError, match="pass the optimizer inside it"):
        averaged.attach(named)
    attachment = averaged.attach(named._optimizer)
    named.init_state()
    assert attachment.step == averaged.n_averaged == 0
    named.step()
    assert attachment.step == averaged.n_averaged == 1


def test_torchs_own_steps_are_none_for_torchcontribs_swa() -> None:
    model = make_model()
    fill(model, 1.0)
    swa = SWA(SGD(model.parameters(), 0.1, weight_decay=0.5), swa_start=0, swa_freq=1, swa_lr=0.5)
    with pytest.raises(KeyError):  # torch cannot read a state of torchcontrib's form
        get_optimizer_state_dict(model, swa)
    assert [(group["step_counter"], group["n_avg"]) for group in swa.param_groups] == [(0, 0)]
    assert model[0].weight[0, 0] == 1.0


# Several optimizers


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("way", WAYS)
def test_several_optimizers_count_once_all_have_stepped(way: str, order: int) -> None:
    model = make_model()
    fill(model, 0.0)
    optimizers = [SGD([param], 1.0) for param in model.parameters()]
    averaged = FusedAveragedModel(model, rule=ExponentialAverage(0.5))
    attachment = averaged.attach(optimizers, **WAYS[way])

    def step(chosen: list[torch.optim.Optimizer]) -> None:
        for param in model.parameters():
            param.grad = torch.full_like(param, -1.0)
        for optimizer in chosen:
            optimizer.step()

    for _ in range(2):
        step(optimizers[::order])
    averaged.state_dict()  # waits
    assert [param[..., 0].item() for param in averaged.module[2].parameters() if param.dim() == 1] == [1.5]
    assert [len(param.unique()) for param in averaged.module.parameters()] == [1] * 4
    step(optimizers[1:] * 3)
    assert attachment.step == 2
    assert attachment.state_dict()["stepped"] == [1, 2, 3]
    step(optimizers[:1])
    attachment.join()
    assert attachment.step == averaged.n_averaged == 3
    assert attachment.state_dict()["stepped"] == []


def test_optimizers_may_step_in_a_backward_and_in_threads() -> None:
    model = make_model()
    by_param = {param: SGD([param], 0.1) for param in model.parameters()}
    averaged = FusedAveragedModel(model)
    attachment = averaged.attach(list(by_param.values()))
    for param in by_param:
        param.register_post_accumulate_grad_hook(lambda param: by_param[param].step())
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
    assert attachment.step == averaged.n_averaged == 3
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            for _ in range(50):
                list(threads.map(lambda optimizer: optimizer.step(), by_param.values()))
    finally:
        sys.setswitchinterval(before)
    assert attachment.step == averaged.n_averaged == 53


def test_who_has_stepped_is_in_the_state() -> None:
    model = make_model()
    steps = []
    for _ in range(2):
        optimizers = [SGD([param], 0.1) for param in model.parameters()]
        attachment = FusedAveragedModel(model).attach(optimizers)
        set_grads(model)
        if steps:
            optimizers[-1].load_state_dict(steps[0])
            assert attachment.step == 1
            for optimizer in optimizers[2:]:
                optimizer.step()
            assert attachment.step == 2
        else:
            for optimizer in [*optimizers, *optimizers[:2]]:
                optimizer.step()
            steps.append(optimizers[-1].state_dict())
    with pytest.raises(ValueError, match="must be"):
        attachment.load_state_dict({**attachment.state_dict(), "stepped": [-1]})
    attachment.load_state_dict({**attachment.state_dict(), "stepped": [0, 7]})  # of more optimizers
    assert attachment.state_dict()["stepped"] == [0]


@pytest.mark.parametrize("late", [False, True])
def test_several_optimizers_may_be_listed_in_another_order(late: bool) -> None:
    counts = []
    state: Any = None
    for order in (1, -1):
        model = make_model()
        optimizers = [SGD([param], 0.1, momentum=0.9) for param in model.parameters()]
        averaged = FusedAveragedModel(model)
        attachment = None if late and state else averaged.attach(optimizers[::order])
        if state:
            for optimizer, own in zip(optimizers, state, strict=True):
                optimizer.load_state_dict(own)
        attachment = attachment or averaged.attach(optimizers[::order])
        set_grads(model)
        for optimizer in optimizers if state is None else optimizers[1:]:
            optimizer.step()
        if state is None:
            optimizers[0].step()
            state = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
        counts.append((attachment.step, attachment.state_dict()["stepped"]))
    assert counts == [(1, [0]), (2, [])]


# Updates that do not come from the attachment


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("several", [False, True])
def test_an_update_in_the_loop_is_warned_of_once(several: bool, way: str) -> None:
    model = make_model()
    rules = {"fast": ExponentialAverage(0.5), "mean": EqualAverage()}
    averaged: Any = FusedAverages(model, rules=rules) if several else FusedAveragedModel(model)
    optimizer = SGD(model.parameters(), 0.1)
    attachment = averaged.attach(optimizer, **WAYS[way])
    set_grads(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.step()
            averaged.state_dict()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            averaged.update_parameters(model)
            optimizer.step()
    assert [warning.filename for warning in found] == [__file__]
    assert "update_parameters was called on an average that is attached" in str(found[0].message)
    attachment.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        averaged.update_parameters(model)
    assert (averaged["mean"] if several else averaged).n_averaged == 10


# What is set


def test_the_step_may_be_set() -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), 0.1)
    averaged = FusedAveragedModel(model)
    attachment = averaged.attach(optimizer, every="1ep", steps_per_epoch=10)
    attachment.step = 9
    optimizer.step()
    assert (attachment.step, averaged.n_averaged) == (10, 1)
    for bad, kind in ((-1, ValueError), (True, TypeError), (1.0, TypeError), ("1", TypeError), (None, TypeError)):
        with pytest.raises(kind, match="step must be an int"):
            attachment.step = bad
    assert attachment.step == 10


# What waits


@pytest.mark.parametrize("of", ["another model", "a part", "a whole", "tied"])
@pytest.mark.parametrize("way", ["overlap", "offload"])
def test_a_write_waits_for_updates_of_its_model_alone(way: str, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = make_model(), make_model()
    if of == "a part":
        other = nn.Sequential(model[0])
    elif of == "a whole":
        other = nn.Sequential(model, nn.ReLU())
    elif of == "tied":
        other[2].weight = model[2].weight
    averaged = FusedAveragedModel(other)
    averaged.update_parameters(other)
    held = Held(monkeypatch)
    optimizer = SGD(model.parameters(), 0.1)
    FusedAveragedModel(model).attach(optimizer, **WAYS[way])
    optimizer.step()
    assert held.begun.wait(60)
    if of != "another model":
        held.let_go_in(0.05)
    averaged.copy_to(other)
    with averaged.swapped_into(other):
        assert held.ended.is_set() == (of != "another model")
    held.let_go.set()


def test_torchcontribs_swap_waits_for_updates_of_its_params_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = make_model(), make_model()
    swas = [SWA(SGD(each.parameters(), 0.1)) for each in (model, other)]
    for swa in swas:
        swa.update_swa()
    held = Held(monkeypatch)
    FusedAveragedModel(model).attach(swas[0], overlap=True, step=0)
    swas[0].step()
    assert held.begun.wait(60)
    swas[1].swap_swa_sgd()
    assert not held.ended.is_set()
    held.let_go_in(0.05)
    swas[0].swap_swa_sgd()
    assert held.ended.is_set()


# What is kept


class Holds(nn.Module):
    """A module that has its optimizer, as Lightning's and many users' do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()
        self.optimizer = Adam(self.net.parameters())


def attached(kind: Any, way: str) -> list[weakref.ref[Any]]:
    """Attach, step, drop everything, and return references to it."""
    holder = Holds()
    averaged = FusedAveragedModel(holder)
    if kind is ComposerSWA:
        kind(averaged, holder.optimizer, holder, max_duration=9, steps_per_epoch=1, **WAYS[way])
    else:
        optimizer = holder.optimizer if kind is FusedAveragedModel else SWA(holder.optimizer)
        averaged.attach(optimizer, holder, **WAYS[way])
    set_grads(holder)
    holder.optimizer.step()
    averaged.state_dict()  # waits
    return [weakref.ref(each) for each in (holder, averaged, holder.optimizer, averaged.module)]


def test_what_was_attached_is_freed() -> None:
    before = set(threading.enumerate())
    gone = [attached(kind, way) for kind in (FusedAveragedModel, SWA, ComposerSWA) for way in WAYS]
    new = set(threading.enumerate()) - before
    gc.collect()
    assert [ref() for refs in gone for ref in refs] == [None] * 36
    for thread in new:
        thread.join(60)
        assert not thread.is_alive()


def pickled(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


class KeepsAll(SGD):
    """Has all its attributes in copies and pickles, also its hooks."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("kind", [Adam, SWA, KeepsAll])
def test_copies_and_pickles_of_an_optimizer_are_not_attached(kind: Any, duplicate: Callable[[Any], Any]) -> None:
    holder = Holds()
    optimizer = {Adam: holder.optimizer, SWA: SWA(holder.optimizer)}.get(kind) or kind(holder.net.parameters(), 0.1)
    holder.attachment = attachment = FusedAveragedModel(holder).attach(optimizer, holder, overlap=True)
    other = duplicate(optimizer)
    for param in (param for group in other.param_groups for param in group["params"]):
        param.grad = torch.zeros_like(param)
    other.step()
    assert attachment.step == 0
    assert STATE_KEY not in other.state_dict()["param_groups"][0]
    other.load_state_dict(optimizer.state_dict())
    copied = duplicate(holder).attachment  # that of a module which has it
    copied.join()
    assert (copied.step, copied.schedule, copied.is_attached) == (0, attachment.schedule, False)
    with pytest.raises(RuntimeError, match="must be attached to be detached"):
        copied.detach()
    optimizer.step()
    attachment.join()
    assert attachment.step == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("kind", [Adam, KeepsAll])
def test_a_copy_of_an_optimizer_may_be_attached(kind: Any, duplicate: Callable[[Any], Any]) -> None:
    model = make_model()
    optimizer = kind(model.parameters(), 0.1)
    first = FusedAveragedModel(model).attach(optimizer)
    set_grads(model)
    optimizer.step()
    copied_model, copied = duplicate((model, optimizer))
    second = FusedAveragedModel(copied_model).attach(copied, step=1)
    set_grads(copied_model)
    copied.step()
    copied.load_state_dict(copied.state_dict())
    assert (first.step, second.step) == (1, 2)
