"""Hints: the end of an error, with the line that a user of another package meant.

The errors are raised in any case, so a hint changes no behaviour. Where no line is right for a value, there is none.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from .habits import ARGUMENTS, NAMES, RULE_PARTS, SPREADS
from .numbers import as_int, as_number

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)

_INCLUDE = "write include=lambda name, param: ..., which returns whether to average the parameter"
_OWN_RULE = "EqualAverage(), or a Rule of your own"
_COMPOSERS = re.compile(r"(\d+)(ba|ep)")
#: The largest ``sigma_rel``.
_WIDEST = 12.0**-0.5


def of_name(name: str) -> str:
    """Return the end of an error about a name that a package lacks: the line that was meant, or nothing."""
    return f": {NAMES[name].format(name=name)}" if name in NAMES else ""


# Rules


def _number(value: object) -> int | float | None:
    """Return a number as Python's own; a narrow float with 7 digits."""
    number = as_number(value)
    return number if number is None or isinstance(value, (int, float)) else float(f"{number:.7g}")


def rule_like(value: object) -> str:
    """Return the rule that a value stands for, as code, or nothing."""
    number = _number(value)
    if number is not None:
        return f"ExponentialAverage({number!r})" if 0 < number < 1 else ""
    if hasattr(value, "kernel_terms"):
        return f"{value.__name__}(...)" if isinstance(value, type) else repr(value)
    word = value.lower() if isinstance(value, str) else ""
    if word in ("ema", "exponential"):
        return "ExponentialAverage(0.999)"
    if word in ("swa", "equal", "mean", "average"):
        return "EqualAverage()"
    return "PowerAverage.from_sigma_rel(0.1)" if word in ("power", "karras", "edm2") else ""


def _rule_of(name: str, value: object) -> str:
    """Return the rule that an argument of this name stands for, as code, or nothing if the value fits none."""
    part, number = RULE_PARTS[name], _number(value)
    if part == "function" or hasattr(value, "kernel_terms"):
        return rule_like(value) or _OWN_RULE
    if part == "warmup" and (value is True or (isinstance(value, str) and value in ("power", "ratio", "ramp"))):
        return f'ExponentialAverage(0.9999, warmup="{"power" if value is True else value}")'
    if part == "half_life" and isinstance(value, str) and (span := _COMPOSERS.fullmatch(value)):
        every = {"ba": "1", "ep": '"1ep", steps_per_epoch=...'}[span[2]]
        return f"ExponentialAverage.from_half_life({int(span[1])}), with averaged.attach(optimizer, every={every})"
    if number is None or number < 0:
        return ""
    if part in ("inv_gamma", "power", "min_decay"):
        return f'ExponentialAverage(0.9999, warmup="power", {part}={number!r})'
    if part == "gamma":
        return f"PowerAverage(gamma={number!r})"
    if part == "half_life":
        return f"ExponentialAverage.from_half_life({number!r})" if number else ""
    if part == "sigma_rel":
        return f"PowerAverage.from_sigma_rel({number!r})" if 0 < number <= _WIDEST else ""
    if part == "either" and 0 < number < 0.5:
        return f"ExponentialAverage({1 - number:.6g})"
    if name == "tau" and number > 1:
        return f'ExponentialAverage(0.999, warmup="ramp", tau={number!r})'
    return f"ExponentialAverage({number!r})" if part in ("decay", "either") and number <= 1 else ""


def _named(values: object, rule_of: Callable[[object], str]) -> str:
    """Return several rules by name, as code, or nothing if a value fits none."""
    if isinstance(values, Mapping):
        pairs = [(str(name), rule_of(value)) for name, value in values.items()]
    elif isinstance(values, (list, tuple, set)) and values:
        names = ("fast", "slow") if len(values) == 2 else [f"average{place}" for place in range(len(values))]
        pairs = [(name, rule_of(value)) for name, value in zip(names, values, strict=True)]
    else:
        return ""
    return "{" + ", ".join(f'"{name}": {rule}' for name, rule in pairs) + "}" if all(rule for _, rule in pairs) else ""


# Values


def _word(*words: str) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and value.lower() in words


def _has(*names: str) -> Callable[[object], bool]:
    return lambda value: all(hasattr(value, name) for name in names)


def _are_optimizers(value: Any) -> bool:
    """Return whether optimizers are given by name, in a dict or in a wrapper such as MMEngine's."""
    return _has("keys", "values")(value) and all(hasattr(each, "step") for each in value.values())


def _is_spread(value: object) -> bool:
    count = as_int(value)
    return count is not None and count >= 0 and count != 1


def _is_iterator(value: object) -> bool:
    return isinstance(value, Iterable) and not hasattr(value, "named_parameters")


def _is_function(value: object) -> bool:
    return callable(value) and not isinstance(value, type) and not hasattr(value, "named_parameters")


_DEFAULT_RULES = '{"fast": ExponentialAverage(0.99), "slow": ExponentialAverage(0.999)}'
_HALF = 'write format="half", or leave it out for float32 precision'

#: Values: the argument, what they look like, and what was meant. ``{rule}`` is the rule for which they stand.
_VALUES: tuple[tuple[str, Callable[[object], object], str], ...] = (
    ("rule", lambda value: isinstance(value, type) and rule_like(value), "write an instance: rule={rule}"),
    ("rule", rule_like, "write rule={rule}"),
    ("rules", rule_like, 'write rules={"name": {rule}}'),
    ("rules", lambda value: _named(value, rule_like), "write rules={rules}"),
    ("rules", lambda value: isinstance(value, (list, tuple, set)), f"write rules={_DEFAULT_RULES}"),
    ("each rule", rule_like, "write {rule}"),
    ("function", rule_like, "write rule={rule}"),
    ("device", lambda value: as_int(value) is None and rule_like(value), (
        "pass a rule as rule=: write FusedAveragedModel(model, rule={rule})"
    )),
    ("device", lambda value: as_int(value) not in (None, 0, 1) and _is_spread(value), (
        "for SWAG, write deviations={value}, which is a keyword"
    )),
    ("device", lambda value: isinstance(value, Mapping), "write FusedAverages(model, rules=...)"),
    ("device", _has("param_groups"), "write averaged.attach(optimizer)"),
    ("device", _is_function, "write avg_fn= or multi_avg_fn="),
    ("model", lambda value: isinstance(value, type), "write an instance of it"),
    ("model", lambda value: isinstance(value, Mapping), "pass the model, not its state"),
    ("model", _has("param_groups"), "pass the model, and then write averaged.attach(optimizer)"),
    ("model", _has("swapped_into"), "pass the model, inside swapped_into"),
    ("model", _has("dataset"), "write update_bn(loader, model)"),
    ("model", lambda value: _is_iterator(value), "pass the model itself, not its parameters"),
    ("format", lambda value: "float16" in str(value), _HALF),
    ("format", lambda value: "float32" in str(value), 'write format="float32"'),
    ("format", _word("fp32", "float"), 'write format="float32"'),
    ("format", _word("bf16", "fp16"), _HALF),
    ("optimizer", _has("optimizer", "last_epoch"), "pass the optimizer of the scheduler"),
    ("optimizer", _has("zero_optimization_stage"), (
        "install swafast.integrations.deepspeed.WeightAverage in the engine"
    )),
    ("optimizer", _has("parameters"), "write attach(optimizer, model)"),
    ("optimizer", _has("chained_optimizers"), (
        "average the main params of Megatron, as docs/frameworks/megatron.md does"
    )),
    ("optimizer", _has("apply_gradients"), "an optimizer of Keras has no hooks: see docs/frameworks/keras.md"),
    ("optimizer", _are_optimizers, "write attach([*optimizers.values()])"),
    ("include", callable, _INCLUDE),
    ("include", lambda value: isinstance(value, Iterable), "write include=lambda name, param: name in {...}"),
)  # fmt: skip


def of_value(argument: str, value: object) -> str:
    """Return the end of an error about an argument's value."""
    for about, looks_so, meant in _VALUES:
        if about == argument and looks_so(value):
            if "{rules}" in meant:
                meant = meant.replace("{rules}", _named(value, rule_like))
            meant = meant.replace("{value}", repr(value))
            return ": " + (meant.replace("{rule}", rule_like(value)) if "{rule}" in meant else meant)
    return ""


# Calls


def hinted(function: F, *, makes_rule: bool = False) -> F:
    """Have a function end the error about arguments that it does not take with the line that was meant.

    Args:
        makes_rule: it makes a rule, and takes no other.
    """

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except TypeError as error:
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:  # the function had begun
                raise
            raise TypeError(f"{error}{_of_call(function, args, options, makes_rule=makes_rule)}") from None

    return call  # type: ignore[return-value]


def hinted_rule(kind: C) -> C:
    """Have the constructor of a rule end its errors as :func:`hinted` does."""
    kind.__init__ = hinted(kind.__init__, makes_rule=True)  # type: ignore[misc]
    return kind


def refuse_others(function: Callable[..., Any], options: Mapping[str, Any], taken: Collection[str]) -> None:
    """Raise TypeError, with a hint, if a function that passes ``options`` on got one that is not ``taken``."""
    for name in options:
        if name not in taken:
            what = f"{function.__qualname__}() got an unexpected keyword argument {name!r}"
            raise TypeError(f"{what}{_of_call(function, (), options, makes_rule=False)}")


def _of_call(
    function: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any], *, makes_rule: bool
) -> str:
    parameters = [each for each in inspect.signature(function).parameters.values() if each.name not in ("self", "cls")]
    own = [each.name for each in parameters]
    meant = ""
    for name, value in options.items():
        if name not in own:
            meant = _of_argument(name, value, own, makes_rule=makes_rule)
            break
    else:
        taken = 1 + sum(each.kind is not inspect.Parameter.KEYWORD_ONLY for each in parameters)
        about = next((each for each in ("rules", "rule", "rank0_only", "from_rank0") if each in own), "")
        for value in args[2:] if about == "rules" and "model" in own else args[taken:]:
            if about in ("rank0_only", "from_rank0") and isinstance(value, bool):
                meant = f"write {about}={value}"
            elif about == "rank0_only" and "dtype" in str(type(value)):
                meant = f"write averaged.averaged_state_dict({value!r})"
            elif "scale" in own:
                is_scale = as_number(value) is not None
                meant = f"write {function.__name__}(model, index, scale={value!r})" if is_scale else ""
            elif "model" in own:
                meant = of_value(about, value).removeprefix(": ")
            if meant:
                break
    meant = _for_several(meant, args[0]) if args else meant
    return f": {meant}" if meant else ""


def _of_argument(name: str, value: object, own: Collection[str], *, makes_rule: bool) -> str:
    """Return the line that was meant by an argument that a function with these ``own`` ones does not take."""
    takes_rule, several = {"model", "rule"} <= {*own}, {"model", "rules"} <= {*own}
    if name in RULE_PARTS and (takes_rule or several or makes_rule):
        part = RULE_PARTS[name]
        if value is None or (value is False and part == "warmup"):
            return "leave it out"
        each = functools.partial(_rule_of, name)
        if part != "function" and (rules := _named(value, each)):
            kind = "ShardedAverages" if "process_group" in own else "FusedAverages"
            return f"write rules={rules}" if several else f"write {kind}(model, rules={rules})"
        rule, _, tail = each(value).partition(", with ")
        if not rule or (makes_rule and part == "function"):
            return ""
        written = rule if makes_rule else f'rules={{"ema": {rule}}}' if several else f"rule={rule}"
        return f"write {written}" + (f", and {tail}" if tail else "")
    if name == "rule" and several:
        return f'write rules={{"name": {rule_like(value) or (_OWN_RULE if callable(value) else "...")}}}'
    for needed, names, meant in ARGUMENTS:
        if name in names and {*needed} <= {*own}:
            if value is None or (value is False and meant.endswith('="cpu"')):
                return "leave it out"
            if "deviations={value}" in meant and not _is_spread(value):
                meant = SPREADS
            count = as_int(value)
            meant = meant.replace("{next}", str(count + 1) if count is not None else f"{value!r} and one more step")
            return meant.replace("{value}", repr(value))
    return "".join(f"did you mean {close}=?" for close in difflib.get_close_matches(name, own, 1))


def of_weight_average(name: str, value: object, own: Collection[str]) -> str:
    """Return the end of an error about an argument that the ``WeightAverage`` of a framework does not take.

    Args:
        own: the arguments that it takes.
    """
    alone = {"rule", "rules"} - ({"rules"} if isinstance(value, (Mapping, list, tuple, set)) else {"rule"})
    if name in RULE_PARTS:
        meant = _of_argument(name, value, ["model", *(each for each in own if each not in alone)], makes_rule=False)
    elif name in ("mesh", "device_mesh"):
        meant = "write sharded=True, or leave it out: it is found out"
    elif name in ("model", "module", "params", "parameters", "optimizer", "optimizers", "trainer"):
        meant = "leave it out: the framework gives it"
    else:
        meant = _of_argument(name, value, own, makes_rule=False)
    meant = re.sub(r"averaged\.attach\(optimizer, (.*)\)", r"\1", meant).replace(", with every", ", every")
    return f": {meant}" if meant else ""


# Attributes


def _for_several(meant: str, instance: object) -> str:
    """Return a line with the name of an average in it, if the instance has several and lacks the attribute itself."""
    if not hasattr(type(instance), "keys"):
        return meant
    return re.sub(
        r"\baveraged\.(\w+)",
        lambda found: found[0] if hasattr(type(instance), found[1]) else f'averages["name"].{found[1]}',
        meant,
    )


class WithHints:
    """Base class whose errors about attributes that it lacks end with the line that was meant."""

    _meant: Mapping[str, str] = {}

    if not TYPE_CHECKING:  # an editor that sees __getattr__ accepts any name

        def __getattr__(self, name: str) -> Any:
            find = getattr(super(), "__getattr__", None)
            try:
                return find(name) if find is not None else object.__getattribute__(self, name)
            except AttributeError as error:
                if name not in self._meant:
                    raise
                meant = _for_several(self._meant[name].format(name=name), self)
                raise AttributeError(f"{error}: {meant}", name=name, obj=self) from None
