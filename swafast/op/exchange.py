"""The exchange of a model's params with their averages, there and back."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..terms.formats import convert
from .plan import Plan, bump_versions


class Exchange:
    """Exchanges params and averages. It holds their memory, so it can go back whatever happens to the modules.

    A param changes places with its average in place if plane 0 has the param's dtype and a kernel serves the pair.
    Every other param is copied aside, and its average is cast to its dtype and written into it. An exception or an
    interrupt may come at any point: :meth:`back` still restores everything.

    Args:
        params, planes: the current ones, which the plan fits.
        bases: if the params are views, the tensors in whose memory they lie; default: the params themselves.
    """

    def __init__(
        self, plan: Plan, params: Sequence[Tensor], planes: Sequence[Tensor], bases: Sequence[Tensor] | None = None
    ) -> None:
        self._launches, aside = plan.exchange(params, planes)
        self._names, self._bases = plan.names, params if bases is None else bases
        self._addresses = list(map(Tensor.data_ptr, self._bases))
        self._written = (*self._bases, *planes)
        self._memory = list(map(Tensor.untyped_storage, self._written))  # keeps it alive: a launch has only addresses
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
            # Write the first average last: it stays where the model ties params that the averaged module does not tie.
            for param, planes, fmt in reversed(self._aside):
                decoded = fmt is not None and planes[0].dtype != param.dtype
                convert(planes, fmt if decoded else None, (param,), None)
        finally:
            bump_versions(self._written)

    @torch.no_grad()
    def back(self) -> None:
        """Put params and averages back where they were. If it is interrupted, call it again.

        Raises:
            RuntimeError: a param was moved to other memory meanwhile, and is named. The averages are whole.
        """
        try:
            with contextlib.ExitStack() as all_of_them:  # if one raises, run the others too
                for launch in self._launches:
                    all_of_them.callback(launch.exchange, False)  # does nothing unless it has exchanged
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
        """Return the tensors that had these bases. They may have other memory now."""
        return self._bases

    def _name(self, index: int) -> str:
        return self._names[index]

    def _restore(self) -> None:
        try:
            for (param, _, _), value in zip(self._aside, self._stash, strict=False):  # no values if nothing was written
                param.copy_(value)
        finally:
            bump_versions(self._written)
