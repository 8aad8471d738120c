"""The arguments of ``WeightAverage``, checked where it is constructed: before a training, not in it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch.nn import Module

from ..average.accepting import check_device, check_include
from ..average.functions import choose_rule, refuse_format
from ..average.fused_averages import by_name, named_rules
from ..average.sampling import check_deviations
from ..loop.runners import check_modes
from ..loop.schedule import Schedule, Span, parse
from ..op import checks, choice
from ..op.checks import checked_bool as checked_bool
from ..terms import hints
from ..terms.formats import check_format
from ..terms.rules import EqualAverage, Rule
from ..terms.spelled import spell_rule
from ..terms.spread import checked_spread

F = TypeVar("F", bound=Callable[..., None])

#: The arguments of ``attach`` that users may give besides the spans.
OF_ATTACH = ("steps_per_epoch", "overlap", "offload")


def explaining_positions(function: F) -> F:
    """Have the constructor of a ``WeightAverage`` explain that it takes a rule and no model."""

    @functools.wraps(function)
    def construct(self: Any, *args: Any, **options: Any) -> None:
        if len(args) > 1 or any(isinstance(each, Module) for each in args):
            rules = [spell_rule(each, always=1) if isinstance(each, Rule) else hints.rule_like(each) for each in args]
            spelled, rule = ", ".join(type(each).__name__ for each in args), "".join(rules[:2])
            raise TypeError(
                f"{type(self).__name__} takes one argument by position, the rule, got {spelled}: write "
                f"{type(self).__name__}({rule or 'rule'}). The framework gives it the model"
            )
        function(self, *args, **options)

    return construct  # type: ignore[return-value]


def spell_average(average: Any) -> str:
    """Return the line that a print of a ``WeightAverage`` shows: rules, schedule, and how far the averages are."""
    names, attachment = average._rules, average.attachment
    rules = (
        f"rules={[*names]}" if names is not None else f"rule={spell_rule(average._rule or EqualAverage(), always=1)}"
    )
    if attachment is None:
        when = ", ".join(f"{name}={value!r}" for name, value in average._when.items() if value is not None)
        return f"{type(average).__name__}({rules}, {when}, no averages yet)"
    kind, following = type(average.averaged).__name__, "" if attachment.is_attached else ", detached"
    schedule = f"schedule={attachment.schedule}, step={attachment.step}"
    return f"{type(average).__name__}({rules}, {schedule}, averaged={kind}{following})"


def checked_rules(rule: Rule | None, rules: object, evaluate: str | None) -> dict[str, Rule] | None:
    """Return several rules by name, or None for one rule.

    Raises:
        TypeError: a rule is not a Rule, or a name is not a string.
        ValueError: both are given, a name is no name of an average, or ``evaluate`` is none of them.
    """
    if rule is not None and rules is not None:
        raise ValueError("only one of rule and rules must be given, got both")
    if rule is not None and not isinstance(rule, Rule):
        raise TypeError(
            f"rule must be a Rule such as ExponentialAverage(0.999) or None, got {rule!r}{hints.of_value('rule', rule)}"
        )
    named = None if rules is None else named_rules(rules)
    if evaluate is not None and evaluate not in (named or {}):
        names = ", ".join(map(repr, named or {})) or "none, as rules is None"
        raise ValueError(f"evaluate must be a name among {names}, got {evaluate!r}")
    return named


def check_spans(when: Mapping[str, Any]) -> None:
    """Check ``start``, ``every``, ``end``, ``duration``, ``steps_per_epoch``, ``overlap`` and ``offload``.

    Spans whose length in steps the framework will tell are read, and checked to be no less than 0.

    Raises:
        TypeError, ValueError: as ``attach``.
    """
    check_modes(when.get("overlap", False), when.get("offload"))
    epoch, duration = when.get("steps_per_epoch"), when["duration"]
    known = {"ba"} | ({"ep"} if epoch is not None else set())
    if duration is not None and parse("duration", duration)[1] in {"dur", *known}:
        known.add("dur")
    spans: dict[str, Span] = {}
    for name in ("start", "every", "end"):
        if when[name] is None and name == "end":
            continue
        number, unit = parse(name, when[name])
        if name == "every" and not number:
            raise ValueError(f"every must be at least one step, got {when[name]!r}")
        if unit in known:
            spans[name] = when[name]
    if {"start", "every"} <= spans.keys():
        Schedule.of(**spans, duration=duration if "dur" in known else None, steps_per_epoch=epoch)


def check_options(
    kind: type,
    options: Mapping[str, Any],
    taken: Mapping[str, Any],
    classes: Iterable[Any],
    names: list[str] | None,
    rule: Rule | None,
) -> None:
    """Check the arguments that are those of the averaged models.

    Args:
        kind: the framework's ``WeightAverage``, for errors.
        taken: the arguments that it has itself.
        classes: that the averages may be of. A later one is looked at only if the ones before lack an argument.
        names: of several averages; None: there is one.
        rule: of one average, if it is given.

    Raises:
        TypeError, ValueError, RuntimeError: as of :class:`~swafast.FusedAveragedModel` and its kin.
    """
    passed: dict[str, None] = {}
    for each in classes:
        passed |= dict.fromkeys(inspect.signature(each).parameters)
        if options.keys() <= passed.keys():
            break
    own = [name for name in {**taken, **dict.fromkeys(OF_ATTACH), **passed} if name != "model"]
    for name, value in options.items():
        if name not in passed or name == "model":
            hint = hints.of_weight_average(name, value, own)
            raise TypeError(f"{kind.__name__}() got an unexpected keyword argument {name!r}{hint}")
    for each in by_name("format", names, options.get("format")).values() if names else [options.get("format")]:
        check_format(each)
    spreads = options.get("deviations")
    chosen = choose_rule(rule, options.get("avg_fn"), options.get("multi_avg_fn"))
    if chosen is None:
        refuse_format(options.get("format"))
    num_averaged = checks.checked_num_averaged(options.get("num_averaged", 0))
    for spread in by_name("deviations", names, spreads).values() if names else [spreads]:
        check_deviations(checked_spread(spread), chosen, num_averaged)
    checks.check_nonfinite(options.get("nonfinite", "propagate"))
    checks.checked_seed(options.get("seed", 0))
    check_device(options.get("device"))
    if options.get("backend") is not None:
        choice.check_name(options["backend"])
    check_include(options.get("include"))
