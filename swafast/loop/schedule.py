"""Schedules: after which steps of the optimizer an average is updated.

A span is an int, in steps, or a str as in Composer: ``"100ba"`` (steps), ``"2ep"`` (epochs), ``"0.75dur"`` (a share of
the training).
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from fractions import Fraction

from ..terms.numbers import as_int
from ..terms.pickling import pickled_from

_SPAN = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ba|ep|dur)")

Span = int | str


@pickled_from("swafast")
@dataclass(frozen=True)
class Schedule:
    """The steps ``start``, ``start + every``, ... up to and with ``end``, counted from 1. None: there is no end.

    Raises:
        TypeError: a field is not an int.
        ValueError: ``start`` is negative, ``every`` is below 1, or ``end`` is before ``start``.
    """

    start: int
    every: int
    end: int | None = None

    def __post_init__(self) -> None:
        end = self.start if self.end is None else self.end
        for name, value, least in (("start", self.start, 0), ("every", self.every, 1), ("end", end, self.start)):
            steps = as_int(value)
            if steps is None:
                raise TypeError(f"{name} must be an int of steps, got {value!r}")
            if steps < least:
                raise ValueError(f"{name} must be >= {least}, got {steps}")
            if getattr(self, name) is not None:
                object.__setattr__(self, name, steps)  # it is frozen, and its state has ints of Python only

    @classmethod
    def of(
        cls,
        start: Span = 0,
        every: Span = 1,
        end: Span | None = None,
        *,
        duration: Span | None = None,
        steps_per_epoch: int | None = None,
    ) -> Schedule:
        """Make a schedule from spans; fractions of a step are rounded up.

        Args:
            start: the step of the first update; with 0 that is step ``every``.
            every: the span between updates.
            end: the last step with an update; default: the duration.
            duration: length of the whole training, in steps or epochs; needed for spans in ``dur``.
            steps_per_epoch: needed for spans in ``ep``.

        Raises:
            TypeError: a span is neither an int nor a str.
            ValueError: a span cannot be read or is negative, or ``duration`` or ``steps_per_epoch`` is missing;
                ``every`` is 0; or the start is after the end.
        """
        if steps_per_epoch is not None:
            steps_per_epoch = at_least_one("steps_per_epoch", steps_per_epoch)
        whole = None
        if duration is not None:
            if parse("duration", duration)[1] == "dur":
                raise ValueError(f"duration must be in steps or epochs, such as '90ep', got {duration!r}")
            whole = _steps("duration", duration, None, steps_per_epoch)
            if whole < 1:
                raise ValueError(f"duration must be at least one step, got {duration!r}")
        first = _steps("start", start, whole, steps_per_epoch)
        interval = _steps("every", every, whole, steps_per_epoch)
        last = _steps("end", end, whole, steps_per_epoch) if end is not None else whole
        if interval < 1:
            raise ValueError(f"every must be at least one step, got {every!r}")
        if last is not None and first > last:
            what = f"end {end!r}" if end is not None else f"duration {duration!r}"
            raise ValueError(f"start must not be after the {what}, step {last}, got {start!r}, step {first}")
        if last is not None and first == 0 and interval > last:
            raise ValueError(f"every must not be above the last step, {last}, or no update comes, got {every!r}")
        return cls(first, interval, last)

    def is_due(self, step: int) -> bool:
        """Return whether an update comes after this step, counted from 1."""
        within = self.start <= step and (self.end is None or step <= self.end)
        return within and (step - self.start) % self.every == 0

    def later(self, steps: int) -> Schedule:
        """Return the same schedule, that many steps later."""
        return Schedule(self.start + steps, self.every, None if self.end is None else self.end + steps)

    def state_dict(self) -> dict[str, int | None]:
        return asdict(self)


def check_step(step: object) -> int:
    """Return the number of steps.

    Raises:
        TypeError: it is not an int. ValueError: it is negative.
    """
    number = as_int(step)
    if number is None:
        raise TypeError(f"step must be an int, got {step!r}")
    if number < 0:
        raise ValueError(f"step must be an int >= 0, got {number}")
    return number


def at_least_one(name: str, value: object) -> int:
    """Return ``value`` as an int, or raise ValueError if it is none or below 1."""
    number = as_int(value)
    if number is None or number < 1:
        hint = ": pass len(loader)" if hasattr(value, "__iter__") else ""
        raise ValueError(f"{name} must be an int >= 1, got {type(value).__name__ if hint else repr(value)}{hint}")
    return number


def parse(name: str, span: object) -> tuple[Fraction, str]:
    """Return (number, unit) of a span; the unit is ``ba``, ``ep`` or ``dur``.

    Raises:
        TypeError: the span is neither an int nor a str.
        ValueError: it cannot be read, is negative, is a fraction of steps, or is over ``"1dur"``.
    """
    steps = as_int(span)
    if steps is not None:
        if steps < 0:
            raise ValueError(f"{name} must be >= 0, got {steps}")
        return Fraction(steps), "ba"
    expected = f"{name} must be an int of steps or a str such as '100ba', '2ep' or '0.75dur'"
    if not isinstance(span, str):
        raise TypeError(f"{expected}, got {span!r}")
    match = _SPAN.fullmatch(span.strip())
    if match is None:
        raise ValueError(f"{expected}, got {span!r}")
    number, unit = Fraction(match[1]), match[2]
    if unit == "ba" and number.denominator != 1:
        raise ValueError(f"{name} must be a whole number of steps, got {span!r}")
    if unit == "dur" and number > 1:
        raise ValueError(f"{name} must be at most '1dur', got {span!r}")
    return number, unit


def _steps(name: str, span: object, whole: int | None, steps_per_epoch: int | None) -> int:
    """Return a span in steps, rounded up."""
    number, unit = parse(name, span)
    if unit == "ba":
        return int(number)
    what, measure = ("steps_per_epoch", steps_per_epoch) if unit == "ep" else ("duration", whole)
    if measure is None:
        raise ValueError(f"{what} must be given for {name}={span!r}, got None")
    return math.ceil(number * measure)


def read_steps(state: object) -> tuple[int, Schedule, set[int], int | None]:
    """Return steps, schedule, the places of those that have stepped since, and the number of optimizers of a state.

    Raises:
        ValueError: it is not a state of an attachment.
    """
    try:
        step, spans = check_step(state["step"]), state["schedule"]  # type: ignore[index]
        schedule = Schedule(spans["start"], spans["every"], spans["end"])
        stepped = {check_step(index) for index in state.get("stepped", [])}  # type: ignore[attr-defined]
        number = state.get("optimizers")  # type: ignore[attr-defined]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"state_dict must be a state of an attachment, got {state!r}: {error}") from error
    return step, schedule, stepped, number
