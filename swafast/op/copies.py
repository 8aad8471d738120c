"""Copied tensors that no kernel takes, so torch copies them, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn.parameter import is_lazy

from ..backends.contract import Pair
from ..terms.copying import are_alike, copy_into, duplicate, is_plain


def is_for_torch(pair: Pair) -> bool:
    """Return whether torch copies a pair, since a kernel cannot."""
    sides = (pair.param, pair.average)
    return pair.format is None and not any(map(is_lazy, sides)) and not all(map(is_plain, sides))


#: Returns the params and copies of all pairs now, or None if a module has changed.
Find = Callable[[], Sequence[tuple[Tensor, Tensor]] | None]


class Copies:
    """The pairs beside a plan that torch copies, one after the other. It holds no tensors.

    Args:
        names: of the pairs.
        find: finds their tensors.
    """

    def __init__(self, names: Sequence[str], find: Find) -> None:
        self.names, self.find = names, find

    def fit(self) -> bool:
        """Return whether all pairs are there, each of two tensors of one kind and shape."""
        found = self.find()
        return found is not None and all(are_alike(param, copied) for param, copied in found)

    def now(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Return the params and copies of all pairs, which :meth:`fit` has just found."""
        found = self.find()
        assert found is not None, "fit() has found them"
        return found

    def update(self) -> None:
        """Copy all params."""
        for param, copied in self.now():
            copy_into(copied, param)

    def copy_to(self) -> None:
        """Write all copies into the params."""
        for param, copied in self.now():
            copy_into(param, copied)


class Replaced:
    """Params that have their copies meanwhile, and the way back.

    Args:
        copies: they must fit.
    """

    def __init__(self, copies: Copies) -> None:
        self._copies, self._pairs = copies, copies.now()
        self._own = [duplicate(param) for param, _ in self._pairs]

    def there(self) -> None:
        self._copies.copy_to()

    def back(self) -> None:
        """Write the params' own values, also into what is in their place now, unless the model has made it anew."""
        now = self._copies.find() or self._pairs
        for (param, _), (placed, _), own in zip(self._pairs, now, self._own, strict=True):
            copy_into(param, own)
            if placed is not param and are_alike(placed, own):
                copy_into(placed, own)
