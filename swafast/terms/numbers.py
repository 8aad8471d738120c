"""Numbers that a user passes: of Python, of numpy and of torch, as Python's own."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any


def as_int(value: Any) -> int | None:
    """Return an integer, also of numpy or a tensor of one element, as an int; None for a bool and anything else."""
    if _is_of("bool", value):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # a tensor on the meta device has no value
        return None


def as_bool(value: Any) -> bool | None:
    """Return a bool, also of numpy or a tensor of one element, as Python's own; None for anything else."""
    try:
        return bool(value) if _is_of("bool", value) else None
    except (ValueError, RuntimeError):  # an array or a tensor of several, or one on the meta device
        return None


def as_number(value: Any) -> int | float | None:
    """Return a real number, also of numpy or a tensor of one element, as an int or a float; None for anything else."""
    whole = as_int(value)
    if whole is not None or _is_of("bool", value) or _is_of("complex", value) or not hasattr(value, "__float__"):
        return whole  # a str has no __float__, although float() takes it
    try:
        return float(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, RuntimeError):  # an array or a tensor of several
        return None


def as_float(value: Any) -> float | None:
    """Return a real number as a float, infinite for an int that is too large; None for anything else."""
    number = as_number(value)
    try:
        return None if number is None else float(number)
    except OverflowError:
        return math.inf if number is not None and number > 0 else -math.inf


def checked_number(argument: str, value: object, expected: str, holds: Callable[[float], bool]) -> int | float:
    """Return a number as Python's own, which prints and is stored the same wherever it came from.

    Args:
        expected: the condition in words, for the error.
        holds: whether a number satisfies it.

    Raises:
        ValueError: ``value`` is not a number, or the condition does not hold.
    """
    number = as_number(value)
    try:
        good = number is not None and holds(float(number))  # False for NaN
    except OverflowError:  # an int too large for a float
        good = False
    if number is None or not good:
        raise ValueError(f"{argument} must be {expected}, got {value!r}")
    return number


def _is_of(kind: str, value: Any) -> bool:
    return kind in str(getattr(value, "dtype", type(value).__name__))
