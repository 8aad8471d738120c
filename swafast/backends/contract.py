"""What a backend is: tensors in, tensors changed.

A backend is a module with the members of :class:`Backend`. ``op/choice.py`` chooses among them,
``op/launches.py`` shares the pairs out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..terms.draws import Draws
from ..terms.formats import Format
from ..terms.samples import Sample
from ..terms.weight import KernelTerms
from . import Unavailable


@dataclass(frozen=True)
class Pair:
    """One param and its average. A pair without a format is copied at each update, not averaged."""

    name: str
    param: Tensor
    planes: tuple[Tensor, ...]
    format: Format | None
    #: Where its random bits come from, for a format that is rounded at random; or its normal numbers, for a draw.
    draws: Draws | None = None
    pace: int = 0  # index of the rule and the counter by which it moves
    is_buffer: bool = False

    @property
    def average(self) -> Tensor:
        """The averaged module's own tensor."""
        return self.planes[0]

    @property
    def mean_planes(self) -> tuple[Tensor, ...]:
        """The planes of the average, without those of its spread."""
        return self.planes if self.format is None else self.planes[: self.format.num_planes]

    @property
    def spread_planes(self) -> tuple[Tensor, ...]:
        """The variance and the columns of deviations, if the average has a spread."""
        return () if self.format is None else self.planes[self.format.num_planes :]


class ReduceFlag(Protocol):
    """An all-reduce of a flag: how ranks learn what any of them has found in an update."""

    def __call__(self, flag: Tensor) -> None:
        """Make a flag, () int64, that is not 0 on one rank so on all, where it is: nothing is read on the host."""

    def anywhere(self, found: bool, device: torch.device) -> bool:
        """Return whether any rank has found it, by a flag on ``device`` that is read on the host."""


@dataclass(frozen=True, eq=False)
class Update:
    """What a launch needs for an update beside its params: the same object for as long as all of it stays the same."""

    terms: tuple[KernelTerms, ...]  # of the averaged models' rules, by the pairs' pace
    counters: tuple[Tensor, ...]  # () int64 each, on one device, by pace
    advance: int = 1  # what the launch adds to all counters: 0 for all but the last one of a plan
    skip_nonfinite: bool = False  # change nothing if a param that is averaged holds a NaN or an infinity
    reduce_flag: ReduceFlag | None = None  # how ranks skip together

    @property
    def device(self) -> torch.device:
        """Where the updates are counted."""
        return self.counters[0].device

    def is_skipped(self, found: bool) -> bool:
        """Return whether a NaN or an infinity, here or on another rank, stops the update. Read on the host."""
        return found if self.reduce_flag is None else self.reduce_flag.anywhere(found, self.device)


class Launch(Protocol):
    """Pairs made ready for a backend. It reads and writes the memory they had when it was prepared."""

    #: Whether a CUDA graph holds an update of this launch: it must then live as long as the averages.
    captured: bool

    def update(self, params: Sequence[Tensor], update: Update) -> None:
        """Move each average towards its param by the weight of its pace, then count in all counters.

        ``params`` are the pairs' params, the same memory as in ``prepare``; none for a backend that goes by addresses.
        """

    def draw(self, params: Sequence[Tensor], sample: Sample) -> None:
        """Write the sample into each param, rounded once, to nearest. All pairs have a spread and draws.

        Each column is added by one fma in their order, then ``noise * sqrt(variance)`` times the element's normal
        number by another. The average begins as float32, rounded from ``compensated``.
        """

    def first_nonfinite(self, params: Sequence[Tensor]) -> int | None:
        """Return the index of the first averaged pair whose param holds a NaN or an infinity, else None."""


class ExchangeLaunch(Launch, Protocol):
    """The launch of a backend that exchanges in place."""

    def exchange(self, wanted: bool) -> None:
        """Let every param and its average have changed places if ``wanted``, else not: asked again, nothing happens."""


class Backend(Protocol):
    """A module under ``swafast/backends/``."""

    name: str
    #: Whether its launches are of :class:`ExchangeLaunch`, for pairs of one dtype on both sides.
    exchanges: bool

    @property
    def device_types(self) -> frozenset[str] | None:
        """Where the tensors have to be that it serves; None: anywhere."""

    def unavailable(self) -> Unavailable | None: ...
    def describe(self) -> str: ...
    def serves(self, pair: Pair) -> bool: ...
    def prepare(self, pairs: Sequence[Pair]) -> Launch: ...
