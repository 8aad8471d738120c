"""Merges and windows of the averages in a folder of snapshots."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..sharded.parts.ranks import Ranks
from ..terms import hints
from ..terms.coefficients import coefficients_of, window
from ..terms.numbers import as_int
from ..terms.rules import EqualAverage
from .folder import Snapshot, StoredAverage, require_same_model
from .sums import agree_on, sum_all, wanted_tensors

#: A window in which rounding errors grow by more gets a warning. float32 is then off by 1e-6 of the params.
MOST_GAIN = 20.0

Chosen = list[tuple[Snapshot, str, float]]  # snapshots, oldest first, each with its average's name and coefficient


class HasMerges(hints.WithHints):
    """Base class of :class:`~swafast.Snapshots`: sums of few stored averages, with coefficients that need no fit."""

    if TYPE_CHECKING:
        folder: Path
        _ranks: Ranks

        def _read(self) -> list[Snapshot]: ...
        def _averages_of(self, snapshot: Snapshot) -> list[StoredAverage]: ...

    def merge(
        self,
        last: int | None = None,
        weights: str | Sequence[float] | None = None,
        *,
        average: str | None = None,
        like: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the weighted sum of the ``last`` stored averages. Collective.

        To merge models instead of averages, store an average by ``ExponentialAverage(0.0)``, which is the last model.
        The result is as that of :meth:`synthesize`.

        Args:
            last: how many snapshots; default: all.
            weights, like: as for :func:`~swafast.posthoc.merge` and :meth:`synthesize`. Weights are oldest first.
            average: its name; needed if several are stored.

        Raises:
            TypeError, ValueError: an argument is none of the above, there are fewer snapshots, or as
                :meth:`synthesize`.
            RuntimeError: as :meth:`synthesize`.
        """

        def choose(snapshots: list[Snapshot]) -> Chosen:
            count = len(snapshots) if last is None else as_int(last)
            if count is None or not 1 <= count <= len(snapshots):
                raise ValueError(f"last must be from 1 to {len(snapshots)}, the number of snapshots, got {last!r}")
            merged = snapshots[-count:]
            names = [self._stored_in(each, average, lambda stored: True).name for each in merged]
            return list(zip(merged, names, coefficients_of(count, weights), strict=True))

        return self._summed("merge", choose, like)

    def window(
        self,
        earlier: int,
        later: int | None = None,
        *,
        average: str | None = None,
        like: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the mean of the models after update ``earlier``, up to ``later``. Collective.

        It is the difference of two stored means, ``(n2 * m2 - n1 * m1) / (n2 - n1)``. Their rounding errors grow by up
        to ``(n2 + n1) / (n2 - n1)``. For a short window average with ``format="compensated"``, and save with
        ``dtype=torch.float64``. The result is as that of :meth:`synthesize`.

        Args:
            earlier, later: counts at which an average by :class:`~swafast.EqualAverage` is stored; default of
                ``later``: the last one.
            average: its name; needed if several equal means are stored.
            like: as for :meth:`synthesize`.

        Warns:
            RuntimeWarning: errors grow by more than 20, and are not stored in float64; on the first rank.

        Raises:
            TypeError, ValueError: a count is not stored, ``later`` is not larger than ``earlier``, or the average is no
                equal mean; or as :meth:`synthesize`.
            RuntimeError: as :meth:`synthesize`.
        """

        def choose(snapshots: list[Snapshot]) -> Chosen:
            end = snapshots[-1] if later is None else _at(snapshots, "later", later)
            start = _at(snapshots, "earlier", earlier)
            coefficients = window(start.num_averaged, end.num_averaged)
            names = [self._stored_in(each, average, _is_equal_mean).name for each in (start, end)]
            gain = sum(map(abs, coefficients))
            rounded = {stored.dtype for stored in start.params} & {torch.float32, torch.bfloat16, torch.float16}
            if gain > MOST_GAIN and rounded and self._ranks.index == 0:
                warnings.warn(f"{loss_of(gain)}: save them with dtype=torch.float64", RuntimeWarning, stacklevel=4)
            return list(zip((start, end), names, coefficients, strict=True))

        return self._summed("window", choose, like)

    def _stored_in(self, snapshot: Snapshot, name: str | None, fits: Callable[[StoredAverage], bool]) -> StoredAverage:
        """Return the average of this name, or the only one that fits, or raise ValueError."""
        stored = self._averages_of(snapshot)
        found = [each for each in stored if fits(each) and name in (None, each.name)]
        if len(found) != 1:
            spelled = ", ".join(f"{each.name!r} by {each.rule}" for each in stored)
            kind = "an equal mean (EqualAverage)" if fits is _is_equal_mean else "an average"
            raise ValueError(f"average must name {kind} stored in {snapshot.path}, got {name!r}: it has {spelled}")
        return found[0]

    def _summed(
        self, call: str, choose: Callable[[list[Snapshot]], Chosen], like: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        with self._ranks.lock:
            with self._ranks.settled(call):
                snapshots = self._read()
                if not snapshots:
                    raise ValueError(f"folder must hold snapshots, got none in {self.folder}")
                chosen = choose(snapshots)
                *others, latest = (snapshot for snapshot, _, _ in chosen)
                for each in others:
                    require_same_model(latest, f"snapshot {each.path}", each)
                wanted = wanted_tensors(latest, like)
            used = [(snapshot, {name: x}) for snapshot, name, x in chosen]
            spelled = {f"the sum of {each.path.name}": coefficients for each, coefficients in used}
            agree_on(self._ranks, [each for each, _ in used], wanted, spelled)
            return sum_all(wanted, used, latest, self._ranks)


def loss_of(gain: float) -> str:
    """Return the beginning of a warning of a window in which errors grow by ``gain``."""
    return (
        f"the window is short: the rounding errors of the two means grow by up to {gain:.0f}. A longer window has "
        "smaller errors, and so have averages of format 'compensated'"
    )


def _is_equal_mean(stored: StoredAverage) -> bool:
    return type(stored.rule) is EqualAverage


def _at(snapshots: Sequence[Snapshot], argument: str, count: int) -> Snapshot:
    number = as_int(count)
    found = [snapshot for snapshot in snapshots if snapshot.num_averaged == number]
    if not found:
        counts = [snapshot.num_averaged for snapshot in snapshots]
        near = sorted(sorted(counts, key=lambda each: abs(each - (number or 0)))[:5])
        raise ValueError(f"{argument} must be a count that is stored, such as {near}, got {count!r}")
    return found[0]
