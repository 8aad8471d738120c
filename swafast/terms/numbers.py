"""Numbers that a user passes: of Python, of numpy and of torch, as Python's own."""

from __future__ import annotations

import operator
from typing import Any


def as_int(value: Any) -> int | None:
    """Return an integer, also of numpy or a tensor of one element, as an int; None for a bool and anything else."""
    if _is_of("bool", value):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_number(value: Any) -> int | float | None:
    """Return a real number, also of numpy or a tensor of one element, as an int or a float; None for anything else."""
    whole = as_int(value)
    if whole is not None or _is_of("bool", value) or _is_of("complex", value) or not hasattr(value, "__float__"):
        return whole  # a str has no __float__, although float() takes it
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # an array or a tensor of several
        return None


def _is_of(kind: str, value: Any) -> bool:
    return kind in str(getattr(value, "dtype", type(value).__name__))
