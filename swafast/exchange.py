"""The exchange of a model's params with their averages, and its way back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .backends import Pair, native
from .backends.reference import windows
from .plan import bump_versions


class Exchange:
    """Params and averages, held by their memory: whatever becomes of the modules, the way back leads to these bytes.

    A param whose dtype is that of the averaged module's own tensor changes places with it, in place and without a copy.
    Any other is set aside, and gets its average cast to its dtype.
    """

    def __init__(self, pairs: Sequence[Pair], use_native: bool) -> None:
        ops.check_writable(pairs)
        # A param that the model ties and the averaged model does not stands in two pairs; it can take one average.
        pairs = list({id(pair.param): pair for pair in reversed(pairs)}.values())
        self._params = [pair.param for pair in pairs]
        held = [
            Pair(pair.name, pair.param.detach(), tuple(plane.detach() for plane in pair.planes), pair.format)
            for pair in pairs
        ]
        self._held = held
        alike = [p for p in held if p.param.dtype == p.average.dtype and p.param.device == p.average.device]
        direct = [p for p in alike if use_native and _native_serves(p)]
        taken = {id(pair) for pair in direct}
        self._launch = native.prepare(direct) if direct else None
        self._windowed = [pair for pair in alike if id(pair) not in taken]
        self._aside = [pair for pair in held if all(pair is not other for other in alike)]
        self._stash: list[Tensor] = []
        self._written = [t for pair in pairs for t in (pair.param, pair.average)]

    @torch.no_grad()
    def there(self) -> None:
        """Put the averages into the model."""
        self._stash = [pair.param.clone() for pair in self._aside]
        self._change_places()
        for pair in self._aside:
            value = pair.format.decode(pair.planes) if pair.format is not None else pair.average
            pair.param.copy_(value)
        bump_versions(self._written)

    @torch.no_grad()
    def back(self) -> None:
        """Put the params back, and the averages where they were.

        Raises:
            RuntimeError: a param was moved to other memory meanwhile; the averages are whole all the same.
        """
        self._change_places()
        for pair, param in zip(self._aside, self._stash, strict=True):
            pair.param.copy_(param)
        bump_versions(self._written)
        for pair, param in zip(self._held, self._params, strict=True):
            if param.data_ptr() != pair.param.data_ptr():
                raise RuntimeError(
                    f"model must keep its tensors while swapped, got {pair.name!r} on other memory: "
                    "its values before the swap could not be put back"
                )

    def _change_places(self) -> None:
        if self._launch is not None:
            self._launch.exchange()
        for pair in self._windowed:
            for param, average in windows((pair.param, pair.average)):
                held = param.clone()
                param.copy_(average)
                average.copy_(held)


def _native_serves(pair: Pair) -> bool:
    return native.unavailable() is None and native.serves(pair)
