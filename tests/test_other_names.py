"""Errors about other names: the call that they name is the one that helps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import nn

from swafast import EqualAverage, FusedAveragedModel, FusedAverages, ShardedAveragedModel, ShardedAverages
from swafast.terms import other_names

KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "FusedAveragedModel": FusedAveragedModel,
    "FusedAverages": lambda model: FusedAverages(model, rules={"swa": EqualAverage(), "other": EqualAverage()}),
    "ShardedAveragedModel": ShardedAveragedModel,
    "ShardedAverages": lambda model: ShardedAverages(model, rules={"swa": EqualAverage(), "other": EqualAverage()}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def net(*more: str) -> nn.Module:
    return nn.Sequential(OrderedDict((name, nn.Linear(2, 2, bias=False)) for name in ("body", "head", *more)))


def wrapped(model: nn.Module) -> nn.Module:
    wrapper = nn.Module()
    wrapper.inner = model
    wrapper.temperature = nn.Parameter(torch.ones(1))
    return wrapper


def made(kind: str, model: nn.Module) -> Any:
    averaged = KINDS[kind](model)
    averaged.update_parameters(model)
    return averaged


def refused(call: Callable[[Any], object], given: object) -> str:
    with pytest.raises((ValueError, RuntimeError)) as raised:
        call(given)
    return str(raised.value)


def named_in(message: str) -> Callable[[str], str]:
    """Return the function that a message says to pass as ``old_name``."""
    function: Callable[[str], str] = eval(message.partition("old_name=")[2].rpartition(")")[0])
    return function


@each_kind
def test_an_update_with_a_wrapper_of_ones_own_says_how_it_is_taken(kind: str) -> None:
    model = net()
    averaged = made(kind, model)
    message = refused(averaged.update_parameters, wrapped(model))
    assert "its names begin with 'inner.', as in a wrapper of your own: write model.inner for model" in message
    assert averaged.adapt_to(wrapped(model), old_name=named_in(message)) == ["temperature"]
    averaged.update_parameters(wrapped(model))


@each_kind
def test_an_update_without_that_wrapper_says_it_too(kind: str) -> None:
    model = net()
    averaged = made(kind, wrapped(model))
    message = refused(averaged.update_parameters, model)
    assert "the average's names begin with 'inner.'" in message
    assert averaged.adapt_to(model, old_name=named_in(message)) == []
    averaged.update_parameters(model)


@each_kind
def test_an_update_with_a_grown_model_names_adapt_to(kind: str) -> None:
    averaged, grown = made(kind, net()), net("extra")
    message = refused(averaged.update_parameters, grown)
    assert message.endswith(
        "got unexpected 'extra.weight': if the model is to have them from now on, call adapt_to(model) once"
    )
    averaged.adapt_to(grown)
    averaged.update_parameters(grown)
    assert message.partition(":")[2] in refused(averaged.update_parameters, net())
    assert "call adapt_to(model, old_name=...) once" in refused(averaged.update_parameters, net("other"))


@each_kind
@pytest.mark.parametrize("grows", ["inner", "outer", "head"])
def test_a_state_of_the_model_as_it_was_says_how_it_loads(kind: str, grows: str) -> None:
    before, now = {"inner": (net(), wrapped(net())), "outer": (wrapped(net()), net()), "head": (net(), net("b"))}[grows]
    state, average = made(kind, before).state_dict(), made(kind, before)
    message = refused(KINDS[kind](now).load_state_dict, state)
    assert "of the model as it was, and call adapt_to(model" in message
    average.load_state_dict(state)
    if grows == "head":
        average.adapt_to(now)
    else:
        average.adapt_to(now, old_name=named_in(message))
    average.update_parameters(now)


@each_kind
def test_a_state_with_other_shapes_says_how_it_loads(kind: str) -> None:
    other = net()
    other.head = nn.Linear(2, 3, bias=False)
    message = refused(KINDS[kind](other).load_state_dict, made(kind, net()).state_dict())
    loader = kind if kind.startswith("Fused") else "ShardedAveragedModel"
    assert message.endswith(
        f": if the model has changed since, load it into {loader} of the model as it was, and call adapt_to(model)"
    )


def test_wrappers_of_torch_are_no_wrappers_of_ones_own() -> None:
    compiled = net()
    compiled.body = torch.compile(compiled.body)  # type: ignore[assignment]
    message = refused(FusedAveragedModel(compiled).load_state_dict, made("FusedAveragedModel", net("b")).state_dict())
    assert message.endswith("of the model as it was, and call adapt_to(model)")
    message = refused(FusedAveragedModel(net("b")).load_state_dict, made("FusedAveragedModel", compiled).state_dict())
    assert "adapt_to(model); if it was saved with frozen=False" in message
    assert "wrapper" not in other_names.of_saved(["a", "b"], ["module.a", "module.b", "module.c"], "L")


@pytest.mark.parametrize(("given", "hint"), [(["a"], True), (["a", "b", "c"], False), (["a", "c"], False)])
def test_states_without_frozen_params_name_include(given: Collection[str], hint: bool) -> None:
    message = other_names.of_saved(["a", "b"], given, "L")
    assert message.endswith("; if it was saved with frozen=False, pass include= as then") == hint
    assert ("old_name=..." in message) == ([*given] == ["a", "c"])
