"""What a backend is: tensors in, tensors changed.

A backend module has ``name``, ``unavailable()`` (None, or why it cannot run), ``serves(pair)`` and ``prepare(pairs)``,
which gives a :class:`Launch`. ``swafast/ops.py`` checks the pairs and chooses among the backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..formats import Format
from ..rules import Rule


@dataclass(frozen=True)
class Pair:
    """One param and its average. A pair without a format is copied at each update, not averaged."""

    name: str
    param: Tensor
    planes: tuple[Tensor, ...]
    format: Format | None

    @property
    def average(self) -> Tensor:
        """The averaged module's own tensor."""
        return self.planes[0]


class Launch(Protocol):
    """Pairs made ready for a backend. It reads and writes the memory they had when it was prepared."""

    def update(self, params: Sequence[Tensor], rule: Rule, num_averaged: Tensor, advance: int) -> None:
        """Move each average towards its param by ``rule(num_averaged)``, then add ``advance`` to ``num_averaged``.

        ``params`` are the pairs' params, the same memory as in ``prepare``.
        """

    def first_nonfinite(self, params: Sequence[Tensor]) -> int | None:
        """Give the index of the first averaged pair whose param holds a NaN or an infinity, else None."""


class Backend(Protocol):
    """A module under ``swafast/backends/``."""

    name: str

    def unavailable(self) -> str | None: ...
    def serves(self, pair: Pair) -> bool: ...
    def prepare(self, pairs: Sequence[Pair]) -> Launch: ...
