"""The exchange under ZeRO-3: a forward pass gathers params from runs that lie outside of the model's tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..loop.swaps import DISCARDED
from ..op.checksum import checksum
from .parts.holdings import free_gathered, written_while_gathered
from .swap import DrawsShards, PlacesShards, ShardedExchange


class ExchangesRuns(ShardedExchange):
    """Each rank exchanges its working runs, and frees what it had gathered, on the way there and back.

    DeepSpeed writes through ``.data``, which counts up no version of a tensor. So checksums tell of writes.
    """

    _sums: Sequence[int] = ()

    @property
    def beside(self) -> Sequence[Tensor]:  # type: ignore[override]
        """The masters: a step of the optimizer writes them, and not the params."""
        return [master for _, master in self._params.locator.masters()]

    def _runs(self) -> list[tuple[str, Tensor]]:
        locator = self._params.locator
        return [*locator.runs(self._params.bases), *locator.masters()]

    def _averaged(self) -> list[tuple[str, Tensor, bool]]:
        return [*super()._averaged(), *((name, run, False) for name, run in self._runs())]

    def watch(self) -> None:
        super().watch()
        self._sums = [checksum(run.detach()) for _, run in self._runs()]

    def written(self) -> dict[str, str]:
        """Return what others have written, also into gathered params. See :meth:`Exchange.written`."""
        found = super().written()
        if self._versions is not None:
            for (name, run), before in zip(self._runs(), self._sums, strict=True):
                if checksum(run.detach()) != before:
                    found.setdefault(repr(name), self._end_of_params)
        return found | dict.fromkeys(map(repr, written_while_gathered(self._model)), DISCARDED)

    def _reshard(self) -> None:
        super()._reshard()
        free_gathered(self._model, lossless=False)


class DrawsRuns(ExchangesRuns, DrawsShards):
    """Each rank draws its working runs of a sample."""


class PlacesRuns(ExchangesRuns, PlacesShards):
    """Each rank places its working runs of a point."""


#: The exchanges of averages, of a sample and of a point.
OF_RUNS = (ExchangesRuns, DrawsRuns, PlacesRuns)
