"""What a state of another tool tells, and its entries, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from ..terms.misfits import few
from ..terms.numbers import as_int
from ..terms.rules import Rule

#: A state of another tool, already loaded.
Source: TypeAlias = Mapping[Any, Any]


@dataclass(frozen=True)
class Reading:
    """What a state of another tool tells."""

    #: By the model's own names, or one for each param in an order that the state does not tell.
    weights: Mapping[str, Any] | Sequence[Tensor]
    #: The key of the weights in the state, for errors.
    key: str = ""
    #: Further planes of a state of ours, by their keys.
    planes: Mapping[str, Any] = field(default_factory=dict)
    #: How many models are in the average, or None if the state does not tell.
    count: int | None = None
    #: How the user finds the count, where the state does not tell.
    advice: str = ""
    #: Whether the count is needed whatever the rule, as the average may still be a copy of the model.
    may_be_copy: bool = False
    #: When the count is 0 instead of 1, where the state does not tell and the rule is constant.
    zero_if: str = ""
    #: Whether the average began as a copy of the initial model, which counts as one.
    begins_as_copy: bool = False
    rule: Rule | None = None
    steps: int | None = None
    #: Whether the order of the weights is that of one param group alone.
    num_groups: int = 1
    #: Whether the tool averages only the params that its optimizer holds.
    follows_optimizer: bool = False
    #: The names of weights that are the trained model's, since the average in the state lacks them.
    of_model: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def entry(source: Source, key: str, name: str = "source") -> Any:
    """Return an entry of a state.

    Raises:
        ValueError: the state lacks it.
    """
    if key not in source:
        raise ValueError(f"{name} must have the entry {key!r}, got only {few(source)}")
    return source[key]


def section(source: Source, key: str, name: str = "source") -> Mapping[str, Any]:
    """Return an entry that is a mapping itself.

    Raises:
        ValueError: it is none, or missing.
    """
    value = entry(source, key, name)
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}[{key!r}] must be a mapping, got {type(value).__name__}")
    return value


def count_in(source: Source, key: str, least: int = 0, name: str = "source") -> int:
    """Return an entry that is an integer.

    Raises:
        ValueError: it is none, as a NaN is, or less than ``least``, or missing.
    """
    value = entry(source, key, name)
    count = as_int(value)
    if count is None or not least <= count < 2**63 - 1:
        raise ValueError(f"{name}[{key!r}] must be an integer >= {least}, got {value!r}")
    return count


def flag_in(source: Source, key: str) -> bool:
    """Return an entry that is a bool.

    Raises:
        ValueError: it is none, or missing.
    """
    value = entry(source, key)
    if not isinstance(value, bool):
        raise ValueError(f"source[{key!r}] must be a bool, got {value!r}")
    return value


def list_in(source: Source, key: str) -> list[Tensor]:
    """Return an entry that is a list of tensors.

    Raises:
        ValueError: it is none, or missing.
    """
    values = entry(source, key)
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"source[{key!r}] must be a list of tensors, got {type(values).__name__}")
    for index, value in enumerate(values):
        if not isinstance(value, Tensor):
            raise ValueError(f"source[{key!r}][{index}] must be a tensor, got {type(value).__name__}")
    return list(values)


def under(source: Source, prefix: str) -> dict[str, Any]:
    """Return the entries whose keys begin with ``prefix``, without it."""
    return {str(key)[len(prefix) :]: value for key, value in source.items() if str(key).startswith(prefix)}
