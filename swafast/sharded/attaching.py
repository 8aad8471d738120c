"""`attach` for averages of a model that is spread over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import Module

from ..loop.attach import Attachable
from ..loop.runners import Ready
from .parts.ranks import Ranks
from .shard_matching import Bound, Staging


class AttachableShards(Attachable):
    """As any other averages, but an update is bound to the shards before a forward gathers them.

    To attach is collective: ranks that updated after other steps would end with shards of other averages.
    """

    def _on_all_ranks(self, action: str) -> AbstractContextManager[None]:
        return self._ranks.settled(action)

    def _agree(self, described: Mapping[str, str]) -> None:
        self._ranks.agree("the arguments of attach", described)

    def _beside(
        self, model: Module, device: torch.device | None = None, streams: Sequence[torch.cuda.Stream] = ()
    ) -> Ready:
        if device is not None:
            raise NotImplementedError("offload must be None for a model that is spread over ranks, got 'cpu'")
        if self.nonfinite != "propagate":
            raise ValueError(
                f"overlap must be False with nonfinite={self.nonfinite!r}, got True: what ranks settle in an update "
                "would meet the collectives of the next forward"
            )
        staging = Staging()

        def ready() -> Callable[[], None]:
            with self._guard.hold("update_parameters"):
                return partial(self._update_bound, self._bind(model, staging))

        return ready

    if TYPE_CHECKING:
        nonfinite: str
        _ranks: Ranks

        def _bind(self, model: Module, staging: Staging | None = None) -> Bound: ...
        def _update_bound(self, bound: Bound) -> None: ...
