"""``avg_fn`` and ``multi_avg_fn``: recognise torch's own, and call a user's as torch's class does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from ..backends.contract import Pair
from ..op.copies import Copies
from ..terms import hints
from ..terms.capturing import refuse_capture
from ..terms.lazy import MadeOnUse
from ..terms.rules import Rule, rule_of
from ..terms.spelled import spell_rule
from ..torch_private.modules import own_children
from .settings import SETTINGS

if TYPE_CHECKING:
    from ..loop.guard import Guard

AvgFn = Callable[..., Tensor]
MultiAvgFn = Callable[..., None]


def choose_rule(
    rule: object, avg_fn: object = None, multi_avg_fn: object = None, *, takes_functions: bool = True
) -> Rule | None:
    """Return the rule of these arguments, by default the equal mean, or None for a user's own averaging function.

    Args:
        takes_functions: whether the averaged model also takes functions, which an error then says.

    Raises:
        TypeError: ``rule`` is not a :class:`Rule`, or a function is not callable.
        ValueError: more than one argument is given.
    """
    functions = {"rule": rule, "avg_fn": avg_fn, "multi_avg_fn": multi_avg_fn}
    given = {name: function for name, function in functions.items() if function is not None}
    if len(given) > 1:
        raise ValueError(f"only one of rule, avg_fn and multi_avg_fn must be given, got {' and '.join(given)}")
    if isinstance(rule, (Mapping, list, tuple)):
        raise TypeError(
            f"rule must be one Rule, got a {type(rule).__name__} of {len(rule)}: make several averages with "
            "FusedAverages(model, rules=...), or ShardedAverages(model, rules=...) for a model spread over ranks"
        )
    if rule is not None and not isinstance(rule, Rule):
        got = f"the class {rule.__name__}" if isinstance(rule, type) else f"{type(rule).__name__} {rule!r}"
        where = "an averaging function goes to avg_fn= or multi_avg_fn="
        if not takes_functions:
            where = "averages of shards take no averaging function, but a Rule of your own"
        raise TypeError(
            f"rule must be a Rule such as ExponentialAverage(0.999), got {got}; {where}{hints.of_value('rule', rule)}"
        )
    for name, function in given.items():
        _check_function(name, function)
    return rule_of(avg_fn, rule if rule is not None else multi_avg_fn)


def _check_function(name: str, function: object) -> None:
    if not callable(function) or (isinstance(function, type) and issubclass(function, Rule)):
        got = f"the class {function.__name__}" if isinstance(function, type) else type(function).__name__
        raise TypeError(f"{name} must be callable, got {got}{hints.of_value('function', function)}")


def refuse_format(format: str | None) -> None:
    """Raise ValueError if averages that a user's own function updates shall be stored in a format of ours."""
    if format is not None:
        raise ValueError(f"format must be None with an averaging function of your own, got {format!r}")


#: Names by which other packages set the decay of an average.
DECAYS = frozenset(("decay", "ema_decay", "beta", "momentum", "max_decay"))


def refuse_decay(averaged: object, name: str, value: object) -> None:
    """Raise AttributeError if one of our classes, and no subclass, is given a decay, which it would not look at."""
    if type(averaged).__module__.partition(".")[0] == __name__.partition(".")[0]:
        raise AttributeError(
            f"{name} = {value!r} would change nothing, since the rule sets the weights: write averaged.rule = "
            f"ExponentialAverage({value!r})"
        )


class ByRuleAlone:
    """``avg_fn`` and ``multi_avg_fn`` where rules alone move averages: they cannot be set, and so not in vain."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__} has no {self._name}, but a rule")

    def __set__(self, instance: object, value: object) -> None:
        rule = rule_of(value, None) if callable(value) else None
        meant = f"rule = {spell_rule(rule, always=1)}" if rule is not None else "rule, to a Rule of yours"
        kind = type(instance).__name__
        raise AttributeError(f"{self._name} cannot be set: a {kind} is updated by a rule, set {meant}")


class HasRule:
    """Base class of a module whose ``avg_fn`` and ``multi_avg_fn`` may be rules, torch's functions or a user's.

    They stay as the user has set them. What they mean is worked out again when they change.
    """

    # Defaults are on the class, because a subclass may not call our __init__.
    avg_fn: AvgFn | None = None
    multi_avg_fn: MultiAvgFn | None = None
    #: The rule in use, or None if a user's own averaging function is. It may be set at any time.
    rule: Rule | None = MadeOnUse(lambda self: rule_of(self.avg_fn, self.multi_avg_fn))  # type: ignore[assignment]

    if TYPE_CHECKING:
        _guard: Guard

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.avg_fn is not None or cls.multi_avg_fn is not None:  # a property or a method may change unseen
            cls.rule = property(lambda self: rule_of(self.avg_fn, self.multi_avg_fn))  # type: ignore[assignment]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in DECAYS:
            refuse_decay(self, name, value)
        if name in SETTINGS:
            value = SETTINGS[name](name, value)
        if name == "rule":
            choose_rule(value)
            self.avg_fn, self.multi_avg_fn = None, value
            return
        if name in ("avg_fn", "multi_avg_fn"):
            if value is not None:
                _check_function(name, value)
            self._guard.settle()  # an update under way goes by what was set before it
            if name == "avg_fn" and value is not None and isinstance(self.multi_avg_fn, Rule):
                super().__setattr__("multi_avg_fn", None)  # torch's class would go by it, and not by the new function
            own_children(self).pop(name, None)  # type: ignore[arg-type]  # a module
        super().__setattr__(name, value)
        if name in ("avg_fn", "multi_avg_fn"):
            if isinstance(value, Module):  # a child, which would be looked up after our default
                self.__dict__[name] = value
            self.__dict__.pop("rule", None)  # made again on its next use

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[misc]  # that of a module
        state.pop("rule", None)
        given, rule = (self.avg_fn, self.multi_avg_fn), self.rule
        if rule is not None and given != (None, None):
            state |= {"avg_fn": None, "multi_avg_fn": _PickledRule(rule, given)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        multi = state.get("multi_avg_fn")
        if isinstance(multi, _PickledRule):  # a copy
            state = state | dict(zip(("avg_fn", "multi_avg_fn"), multi.given, strict=True))
        super().__setstate__(state)  # type: ignore[misc]


class _PickledRule:
    """Stands for averaging functions in a copy, and for their rule in a pickle: torch's functions cannot be pickled."""

    def __init__(self, rule: Rule, given: tuple[object, object]) -> None:
        self.given, self._rule = given, rule

    def __reduce__(self) -> Any:
        return copy.copy, (self._rule,)

    def __deepcopy__(self, memo: object) -> _PickledRule:
        return self


@torch.no_grad()
def update_by_function(
    pairs: Sequence[Pair],
    copies: Copies | None,
    avg_fn: AvgFn | None,
    multi_avg_fn: MultiAvgFn | None,
    num_averaged: Tensor,
) -> None:
    """Run one update by ``avg_fn`` or ``multi_avg_fn``, grouped as in torch's class, and count it.

    The first update copies. If the function raises, what it has written stays, as with torch's class.
    """
    refuse_capture(num_averaged.device, "an averaging function of your own, which may read the count,")
    averaged = [pair for pair in pairs if pair.format is not None]
    averages = [pair.average.detach() for pair in averaged]
    params = [pair.param.detach().to(pair.average.device) for pair in averaged]
    if int(num_averaged) == 0:
        for average, param in zip(averages, params, strict=True):
            average.copy_(param)
    elif multi_avg_fn is not None:
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, average in enumerate(averages):
            groups.setdefault((average.device, average.dtype), []).append(i)
        for (device, _), indices in groups.items():
            multi_avg_fn([averages[i] for i in indices], [params[i] for i in indices], num_averaged.to(device))
    else:
        assert avg_fn is not None
        for average, param in zip(averages, params, strict=True):
            average.copy_(avg_fn(average, param, num_averaged.to(average.device)))
    for pair in pairs:
        if pair.format is None:
            pair.average.detach().copy_(pair.param.detach())
    if copies is not None:
        copies.update()
    num_averaged.add_(1)
