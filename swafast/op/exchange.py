"""The exchange of a model's params with their averages, and its way back."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.contract import Pair
from . import checks, choice, launches
from .plan import bump_versions


class Exchange:
    """Params and averages, held by their memory: whatever becomes of the modules, the way back leads to these bytes.

    A param whose dtype is that of the averaged module's own tensor changes places with it, in place, where a kernel
    serves. Any other is set aside, and gets its average cast to its dtype. An exception at any point, an interrupt
    too, leaves a state from which :meth:`back` finds the way.
    """

    def __init__(self, pairs: Sequence[Pair], backend: str | None) -> None:
        for device in {pair.param.device for pair in pairs}:
            checks.refuse_capture(device, "swapped_into")
        checks.check_writable(pairs)
        self._params = [pair.param for pair in pairs]
        self._pairs = [
            Pair(pair.name, pair.param.detach(), tuple(plane.detach() for plane in pair.planes), pair.format)
            for pair in pairs
        ]
        self._launches, self._aside = launches.prepare_exchange(
            self._pairs, choice.choose_backends(backend, choice.device_types(pairs))
        )
        self._stash: list[Tensor] = []
        self._written = [tensor for pair in pairs for tensor in (pair.param, pair.average)]

    @torch.no_grad()
    def there(self) -> None:
        """Put the averages into the model."""
        self._stash = [pair.param.clone() for pair in self._aside]
        try:
            for launch in self._launches:
                launch.exchange(True)
            # Where the model ties what the averaged module does not, the first average is the one that stays.
            for pair in reversed(self._aside):
                fmt = pair.format if pair.average.dtype != pair.param.dtype else None
                pair.param.copy_(fmt.decode(pair.planes) if fmt is not None else pair.average)  # rounded once
        finally:
            bump_versions(self._written)

    @torch.no_grad()
    def back(self) -> None:
        """Put the params back, and the averages where they were; again, if the first time was interrupted.

        Raises:
            RuntimeError: a param was moved to other memory meanwhile; the averages are whole all the same.
        """
        try:
            with contextlib.ExitStack() as all_of_them:  # whatever one of them raises, the others go back
                for launch in self._launches:
                    all_of_them.callback(launch.exchange, False)  # those that never got there do nothing
        finally:
            self._restore()
        for pair, param in zip(self._pairs, self._params, strict=True):
            if param.data_ptr() != pair.param.data_ptr():
                raise RuntimeError(
                    f"model must keep its tensors while swapped, got {pair.name!r} on other memory: "
                    "its values before the swap could not be put back"
                )

    def _restore(self) -> None:
        try:
            for pair, param in zip(self._aside, self._stash, strict=False):  # no stash: interrupted before any write
                pair.param.copy_(param)
        finally:
            bump_versions(self._written)
