"""The exchange of a model's params with averages that are spread over ranks, and its way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.nn import Module

from ..backends import Pair
from ..exchange import Exchange
from .holdings import Held, reshard
from .ranks import LostPeerError
from .spread import Spread

NOT_WHOLE = (
    "this rank's averages are whole, and so is its own part of the params; the params that other ranks average are "
    "not: take them from a checkpoint"
)


class Swap:
    """One use of ``swapped_into``: shards change places where they lie, cut params come by way of all that hold them.

    What a rank sends is what stands in its own part of the params: the averages once they are there, and the params
    again once they are back. So no rank keeps a copy of what others average.
    """

    def __init__(
        self,
        model: Module,
        pairs: Sequence[Pair],
        spreads: Sequence[Spread],
        held: Mapping[str, Held],
        backend: str | None,
    ) -> None:
        self._exchange = Exchange(pairs, backend)
        self._model, self._spreads, self._held = model, spreads, held
        self._addresses = {name: found.local.data_ptr() for name, found in held.items()}
        self._stuck = False  # on the way there: peers wait somewhere on that way, so none may be met on the way back

    def there(self) -> None:
        """Put the averages into the model.

        Raises:
            LostPeerError: a rank is gone.
        """
        self._exchange.there()
        self._stuck = True
        for spread in self._spreads:
            spread.run(self._held)
        self._stuck = False

    def back(self) -> None:
        """Put the params back, this rank's own part and its averages whatever happens to the others.

        Raises:
            RuntimeError: a rank is gone, or a param was moved to other memory meanwhile.
        """
        reshard(self._model)
        try:
            self._exchange.back()
        except (KeyboardInterrupt, SystemExit):
            self._exchange.back()  # the rest of the way
            raise
        finally:
            self._spread_back()
        for name, address in self._addresses.items():
            if self._held[name].now().data_ptr() != address:
                raise RuntimeError(
                    f"model must keep its tensors while swapped, got {name!r} on other memory: "
                    "its values before the swap could not be put back"
                )

    def _spread_back(self) -> None:
        if self._stuck:
            if any(spread.torn for spread in self._spreads):
                raise LostPeerError(f"swapped_into broke off on its way there: {NOT_WHOLE}")
            return
        try:
            for spread in self._spreads:
                spread.run(self._held)
        except LostPeerError as error:
            raise LostPeerError(f"swapped_into could not put all params back: {error}; {NOT_WHOLE}") from error
