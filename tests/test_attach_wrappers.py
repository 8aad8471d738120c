"""Optimizers around other optimizers: which run torch's hooks, and in whose state dict the steps are."""

from __future__ import annotations

import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from swafast import EqualAverage, FusedAveragedModel, FusedAverages
from swafast.optim import SWA
from tests.test_attach_steps import AlsoHooked, Calls, Shares, set_grads

STEP = ("step_pre", "step_post")
ALL = (*STEP, "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")


class Wraps(torch.optim.Optimizer):
    """A wrapper that does not call torch's constructor, and makes the dicts of hooks itself, as timm's Lookahead."""

    def __init__(self, inner: torch.optim.Optimizer, whens: Iterable[str] = ALL, kind: Any = OrderedDict) -> None:
        self.inner, self.param_groups, self.defaults = inner, inner.param_groups, inner.defaults
        self.state = defaultdict(dict)
        for when in whens:
            setattr(self, f"_optimizer_{when}_hooks", kind())

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class Clears(Wraps):
    """With a ``zero_grad`` of its own torch never puts hooks around its step."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:  # not that of the base class, which has hooks once one has
        return self.inner.step(closure)


class Lends(Clears):
    """Has the dicts of hooks of the optimizer inside it."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner)
        self.__dict__.update({f"_optimizer_{when}_hooks": getattr(inner, f"_optimizer_{when}_hooks") for when in ALL})

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)


class Container(torch.optim.Optimizer):
    """As torchtitan's: its state is that of the optimizers in it."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups[0]["params"], {})

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict()}


class Below(Container):
    def state_dict(self) -> dict[str, Any]:
        return {"container": super().state_dict()}


class Looks(Wraps):
    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()


class Adds(SGD):
    """Adds to the state, as ZeRO does."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "more": 1}


class AddsByName(SGD):
    def state_dict(self) -> dict[str, Any]:
        return {**torch.optim.Optimizer.state_dict(self), "more": 1}


class Loads(SGD):
    """Loads without hooks, as bitsandbytes."""

    def load_state_dict(self, state_dict: Any) -> None:
        self.__setstate__({"param_groups": state_dict["param_groups"]})


def scheduled(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    StepLR(optimizer, 1)  # replaces the step of the optimizer
    return optimizer


def with_own_step(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    step = optimizer.step
    optimizer.step = lambda closure=None: step(closure)  # type: ignore[method-assign,assignment]
    return optimizer


def sgd(params: Any) -> SGD:
    return SGD(params, 0.1)


@pytest.mark.parametrize(
    "wrap",
    [
        Clears,
        lambda inner: Clears(inner, STEP),
        lambda inner: Wraps(inner, STEP),
        lambda inner: Wraps(inner, STEP, dict),
        lambda inner: Wraps(inner, ALL, dict),
        lambda inner: SWA(Wraps(inner, STEP)),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_a_wrapper_that_does_not_run_hooks_is_refused(wrap: Callable[[Any], Any], several: bool) -> None:
    model = nn.Linear(4, 2)
    first, last = sgd([model.weight]), wrap(sgd([model.bias]))
    averaged = FusedAveragedModel(model)
    with pytest.raises(TypeError, match=r"must run torch's hooks, got (Clears|Wraps): pass the optimizer inside it"):
        averaged.attach([first, last] if several else last)
    assert not any(each._optimizer_step_post_hooks for each in (first, last))
    averaged.attach(first)


@pytest.mark.parametrize(
    "make",
    [
        sgd,
        lambda params: Wraps(sgd(params)),
        lambda params: Lends(sgd(params)),
        lambda params: Shares(sgd(params)),
        lambda params: scheduled(sgd(params)),
        lambda params: with_own_step(sgd(params)),
        lambda params: SWA(sgd(params)),
        lambda params: AlsoHooked(params, 0.1),
        lambda params: Calls(params, 0.1),
        lambda params: Adds(params, 0.1),
        lambda params: AddsByName(params, 0.1),
        lambda params: Loads(params, 0.1),
    ],
)
def test_one_that_runs_them_is_attached_and_has_the_steps(make: Callable[[Any], Any]) -> None:
    model = nn.Linear(4, 2)
    optimizer = make(list(model.parameters()))
    averaged = FusedAveragedModel(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attachment = averaged.attach(optimizer)
    for _ in range(2):
        set_grads(model)  # not zero_grad of the optimizer
        optimizer.step()
    assert attachment.step == averaged.n_averaged == 2
    assert '"step": 2' in str(optimizer.state_dict()["param_groups"])


@pytest.mark.parametrize("wrap", [Container, Below, Looks])
@pytest.mark.parametrize("several", [False, True])
def test_a_state_that_lacks_the_steps_is_warned_of(wrap: Callable[[Any], Any], several: bool) -> None:
    model = nn.Linear(4, 2)
    optimizer = wrap(Adam(model.parameters()))
    averaged: Any = FusedAverages(model, rules={"mean": EqualAverage()}) if several else FusedAveragedModel(model)
    with pytest.warns(UserWarning, match=r"\.state_dict does not run torch's hooks.* pass the optimizer inside it"):
        attachment = averaged.attach(optimizer)
    set_grads(model)
    optimizer.step()
    assert attachment.step == 1
    assert "swafast" not in str(optimizer.state_dict())


def test_an_average_that_is_saved_apart_needs_no_place_in_the_optimizers_state() -> None:
    model = nn.Linear(4, 2)
    optimizer = Below(Adam(model.parameters()))
    averaged = FusedAveragedModel(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attachment = averaged._attach_apart(optimizer)
    attachment.detach()
    plain = Adam(model.parameters())
    attachment = averaged._attach_apart(plain)
    assert "swafast" not in str(plain.state_dict())
    attachment.detach()
    with pytest.warns(UserWarning, match=r"does not run torch's hooks"):  # this one is the user's to save
        averaged.attach(optimizer)
    with pytest.raises(RuntimeError, match="attached already"):
        averaged._attach_apart(optimizer)
    assert averaged.attachment is not None
    averaged.attachment.detach()
    with pytest.warns(UserWarning, match=r"does not run torch's hooks"):
        averaged.attach(optimizer)
