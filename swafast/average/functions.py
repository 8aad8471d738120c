"""``avg_fn`` and ``multi_avg_fn``: recognise torch's own, and call a user's as torch's class does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..backends.contract import Pair
from ..op.checks import refuse_capture
from ..terms import hints
from ..terms.rules import Rule, rule_of

AvgFn = Callable[..., Tensor]
MultiAvgFn = Callable[..., None]


def choose_rule(rule: object, avg_fn: object, multi_avg_fn: object) -> Rule | None:
    """Return the rule of these arguments, by default the equal mean, or None for a user's own averaging function.

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
        raise TypeError(
            f"rule must be a Rule such as ExponentialAverage(0.999), got {got}; "
            f"an averaging function goes to avg_fn= or multi_avg_fn={hints.of_value('rule', rule)}"
        )
    for name, function in given.items():
        if not callable(function):
            raise TypeError(f"{name} must be callable, got {type(function).__name__}")
    return rule_of(avg_fn, rule if rule is not None else multi_avg_fn)


@torch.no_grad()
def update_by_function(
    pairs: Sequence[Pair], avg_fn: AvgFn | None, multi_avg_fn: MultiAvgFn | None, num_averaged: Tensor
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
    num_averaged.add_(1)
