"""The exchange of a model's params with their averages, and its way back."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import Plan, bump_versions


class Exchange:
    """Params and averages, held by their memory: whatever becomes of the modules, the way back leads to these bytes.

    A param whose dtype is that of the averaged module's own tensor changes places with it, in place, where a kernel
    serves. Any other is set aside, and gets its average cast to its dtype. An exception at any point, an interrupt
    too, leaves a state from which :meth:`back` finds the way.

    Args:
        params, planes: those that the plan fits now.
        bases: the tensors in whose memory the params lie, where these are views; default: the params themselves.
    """

    def __init__(
        self, plan: Plan, params: Sequence[Tensor], planes: Sequence[Tensor], bases: Sequence[Tensor] | None = None
    ) -> None:
        self._launches, aside = plan.exchange(params, planes)
        self._names, self._bases = plan.names, params if bases is None else bases
        self._addresses = list(map(Tensor.data_ptr, self._bases))
        self._written = (*self._bases, *planes)
        self._memory = list(map(Tensor.untyped_storage, self._written))  # a launch goes by addresses alone
        pairs = plan.pairs(params, planes) if aside else []
        self._aside = [
            (pairs[i].param.detach(), tuple(plane.detach() for plane in pairs[i].planes), pairs[i].format)
            for i in aside
        ]
        self._stash: list[Tensor] = []

    @torch.no_grad()
    def there(self) -> None:
        """Put the averages into the model."""
        self._stash = [param.clone() for param, _, _ in self._aside]
        try:
            for launch in self._launches:
                launch.exchange(True)
            # Where the model ties what the averaged module does not, the first average is the one that stays.
            for param, planes, fmt in reversed(self._aside):
                decoded = fmt is not None and planes[0].dtype != param.dtype
                param.copy_(fmt.decode(planes) if decoded else planes[0])  # type: ignore[union-attr]  # rounded once
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
        addresses = list(map(Tensor.data_ptr, self._bases_now()))
        if addresses != self._addresses:
            index = next(i for i, pair in enumerate(zip(addresses, self._addresses, strict=True)) if len(set(pair)) > 1)
            raise RuntimeError(
                f"model must keep its tensors while swapped, got {self._name(index)!r} on other memory: "
                "its values before the swap could not be put back"
            )

    def _bases_now(self) -> Sequence[Tensor]:
        """Return the tensors of the model again: they may have other memory than before."""
        return self._bases

    def _name(self, index: int) -> str:
        return self._names[index]

    def _restore(self) -> None:
        try:
            for (param, _, _), value in zip(self._aside, self._stash, strict=False):  # empty if no write had begun
                param.copy_(value)
        finally:
            bump_versions(self._written)
