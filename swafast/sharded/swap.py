"""The exchange of a model's params with averages that are spread over ranks, and its way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from torch import Tensor
from torch.nn import Module

from ..op.exchange import Exchange
from ..torch_private import distributed as private
from .parts.holdings import Held, reshard
from .parts.ranks import LostPeerError
from .parts.spread import Spread
from .shard_matching import Bound

NOT_WHOLE = (
    "this rank's averages are whole, and so is its own part of the params; the params that other ranks average are "
    "not: take them from a checkpoint"
)


class Swap(Exchange):
    """One use of ``swapped_into``: shards change places where they lie, cut params come by way of all that hold them.

    What a rank sends is what stands in its own part of the params: the averages once they are there, and the params
    again once they are back. So no rank keeps a copy of what others average.
    """

    def __init__(self, model: Module, bound: Bound, spreads: Sequence[Spread], held: Mapping[str, Held]) -> None:
        plan, views, planes = bound
        super().__init__(plan, views, planes, views.bases)
        # `held` has the memory of now: what the body puts in its place on one rank is no other's to receive.
        self._model, self._views, self._spreads, self._held = model, views, spreads, held
        self._all_there = False  # as long as they are not, no peer is met on the way back

    def spread(self) -> None:
        """Put the averages of all ranks into all params, once every rank has put its own there.

        Raises:
            LostPeerError: a rank is gone; it says so where params of other ranks were written by then.
        """
        spread_all(self._spreads, self._held, "swapped_into could not put all averages into the model")
        self._all_there = True

    def back(self) -> None:
        """Put the params back, this rank's own part and its averages whatever happens to the others.

        Raises:
            RuntimeError: a rank is gone, or a param was moved to other memory meanwhile.
        """
        try:
            private.end_forward(self._model)
            reshard(self._model)
        finally:
            try:
                super().back()
            except (KeyboardInterrupt, SystemExit):
                super().back()  # the rest of the way
                raise
            finally:
                if self._all_there:
                    spread_all(self._spreads, self._held, "swapped_into could not put all params back", torn=True)

    def _bases_now(self) -> Sequence[Tensor]:
        return self._views.locator.bases(self._views.found)

    def _name(self, index: int) -> str:
        return self._views.locator.name(index)


def spread_all(spreads: Sequence[Spread], held: Mapping[str, Held], failed: str, *, torn: bool = False) -> None:
    """Run all spreads, and say so if that leaves params in which neither all of one nor all of the other stands.

    Args:
        failed: what to say then.
        torn: whether that is so even when nothing has come from another rank.

    Raises:
        LostPeerError: a rank is gone. An interrupt stays one, and says the same.
    """
    done = 0
    try:
        with ExitStack() as ranks:
            for spread in spreads:
                ranks.enter_context(spread.ranks.in_lockstep())
            for spread in spreads:
                spread.fill(held)
                done += 1
    except BaseException as error:
        if not (torn or done or any(spread.torn for spread in spreads)):
            raise
        kind = LostPeerError if isinstance(error, Exception) else type(error)
        raise kind(f"{failed}: {error}; {NOT_WHOLE}") from error
