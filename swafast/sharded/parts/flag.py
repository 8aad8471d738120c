"""The flag that goes round where an update depends on what any rank has found."""

from __future__ import annotations

import torch
from torch import Tensor

from .ranks import Ranks


class Flag:
    """What makes a flag that is set on one rank so on all: a :class:`~swafast.backends.contract.ReduceFlag`.

    The number of the averaged model goes round in the same element: flags of two averages that ranks update in
    different orders must not be taken for each other.

    Args:
        number: from :meth:`Ranks.next_number`.
    """

    def __init__(self, ranks: Ranks, number: int) -> None:
        self._ranks, self._number = ranks, number

    def _reduced(self, flag: Tensor) -> Tensor:
        reduced = (flag != 0) + 2 * self._number
        self._ranks.max_(reduced)
        return reduced

    def __call__(self, flag: Tensor) -> None:
        """Collective. Where it is the flag of another average on another rank, it is set: nothing is updated then."""
        if self._ranks.size > 1:
            reduced = self._reduced(flag)
            flag.copy_(torch.where(reduced >> 1 == self._number, reduced & 1, 1))

    def anywhere(self, found: bool, device: torch.device) -> bool:
        """Return whether any rank has found it. Collective.

        Raises:
            RuntimeError: on some rank: another one was in the update of another average.
        """
        if self._ranks.size == 1:
            return found
        with self._ranks.in_lockstep():
            number, is_set = divmod(int(self._reduced(torch.full((), int(found), dtype=torch.int64, device=device))), 2)
            if number != self._number:
                raise RuntimeError(
                    "ranks must update averages that share a process group in one order, got another average on "
                    "another rank: give each thread averages of a process group of its own"
                )
        return bool(is_set)
