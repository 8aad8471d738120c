"""A rule as text: with what the user has set of it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any


def spell_rule(rule: object, *, always: int = 0) -> str:
    """Return a rule with what the user has set of it, and in any case with its first ``always`` fields."""
    options: tuple[Any, ...] = fields(rule) if is_dataclass(rule) else ()
    values = [
        f"{each.name}={value!r}"
        for index, each in enumerate(options)
        if repr(value := getattr(rule, each.name)) != repr(each.default) or index < always
    ]
    return type(rule).__qualname__ + (f"({', '.join(values)})" if values else "")
