"""The flag that goes round where an update depends on what any rank has found."""

from __future__ import annotations

import torch
from torch import Tensor

from .ranks import Ranks


class Flag:
    """What makes a flag that is set on one rank so on all: a :class:`~swafast.backends.contract.ShareFlag`.

    The number of the averaged model goes round in the same element: flags of two averages that ranks update in
    different orders must not be taken for each other.

    Args:
        number: from :meth:`Ranks.next_number`.
    """

    def __init__(self, ranks: Ranks, number: int) -> None:
        self._ranks, self._number = ranks, number

    def _shared(self, flag: Tensor) -> Tensor:
        shared = (flag != 0) + 2 * self._number
        self._ranks.max_(shared)
        return shared

    def __call__(self, flag: Tensor) -> None:
        """Collective. Where it is the flag of another average on another rank, it is set: nothing is updated then."""
        if self._ranks.size > 1:
            shared = self._shared(flag)
            flag.copy_(torch.where(shared >> 1 == self._number, shared & 1, 1))

    def anywhere(self, found: bool, device: torch.device) -> bool:
        """Return whether any rank has found it. Collective.

        Raises:
            RuntimeError: on some rank: another one was in the update of another average.
        """
        if self._ranks.size == 1:
            return found
        with self._ranks.in_step():
            number, is_set = divmod(int(self._shared(torch.full((), int(found), dtype=torch.int64, device=device))), 2)
            if number != self._number:
                raise RuntimeError(
                    "ranks must update averages that share a process group in one order, got another average on "
                    "another rank: give each thread averages of a process group of its own"
                )
        return bool(is_set)
