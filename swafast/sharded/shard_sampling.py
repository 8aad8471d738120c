"""Samples of an averaged model of shards: each rank draws its own part, with the bits that an unsharded one has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from ..average.sampling import HasSamples
from ..backends.contract import Pair
from ..loop import swaps
from ..loop.guard import Guard, seamless
from ..op.drawing import DrawsSample, draw
from ..terms.draws import Draws, make_random_key
from ..terms.formats import with_spread
from ..terms.spread import Spread
from .parts.all_gather import AllGather
from .parts.holdings import Held
from .parts.ranks import Ranks
from .parts.shares import Share
from .shard_matching import Bound
from .swap import ShardedExchange, gather_all


class DrawsShards(DrawsSample, ShardedExchange):
    """Each rank draws its own part of a sample, then cut params are gathered from all their ranks."""

    _call = "sampled_into"


class SampledShards(HasSamples):
    """Base class of one averaged model of shards: its samples."""

    @seamless
    def sampled_into(
        self, model: Module, index: int, *, scale: float | None = None, seed: int | None = None
    ) -> Iterator[Module]:
        """Run ``model`` on a sample of SWAG, the same bits as :meth:`FusedAveragedModel.sampled_into` draws.

        Each rank draws its own part of the params. Those that are cut are then all-gathered, on entering and on
        leaving. Collective: all ranks pass the same arguments.

        Args:
            index, scale, seed: as for :meth:`~swafast.FusedAveragedModel.sampled_into`.

        Raises:
            TypeError, ValueError, RuntimeError: as there, on every rank; ranks have passed different arguments; or a
                rank was lost.
        """
        swap = swaps.Swap(self._guard, self, model, self._ranks.lock)
        try:
            try:
                self._guard.settle("sampled_into", model)
                with self._guard.locked(self._ranks.lock):
                    call = spelled("sampled_into", index, scale, seed)
                    with self._meet(call, model, always=True) as (bound, held):
                        drawing = self._drawing(index, scale, seed)
                        plan, params, planes = bound
                        plan.writable_pairs(params, planes)
                        meets = any(each.ranks is self._ranks for each in self._all_gathers)
                        leave = partial(self._ranks.leave, "sampled_into", self._number) if meets else None
                        binding = self._bindings.latest
                        exchange = DrawsShards(drawing, model, bound, binding, self._all_gathers, held, leave)
                        swap.enter(exchange)
                    exchange.gather()
                    swap.take_writes()
                yield model
            finally:
                swap.leave()
        finally:
            swap.finish()  # whatever an interrupt has left

    @torch.no_grad()
    def sample_to(self, model: Module, index: int, *, scale: float | None = None, seed: int | None = None) -> None:
        """Write a sample into ``model`` for good, and the average's buffers. Collective. See :meth:`sampled_into`.

        Raises:
            TypeError, ValueError, RuntimeError: as there.
        """
        self._guard.settle("sample_to", model)
        with self._guard.locked(self._ranks.lock):
            call = spelled("sample_to", index, scale, seed)
            with self._meet(call, model, always=True) as ((plan, params, planes), held):
                drawing = self._drawing(index, scale, seed)
                if swaps.in_force:
                    swaps.refuse_model("sample_to", model)
                plan.writable_pairs(params, planes)
            draw(plan, params, planes, drawing)
            gather_all(self._all_gathers, held, "sample_to", "could not reach all params", torn=True)

    def _draws_of(self, pair: Pair, seed: int) -> Draws:
        share = next(share for share in self._shares if share.name == pair.name)
        return Draws(make_random_key(seed, pair.name), share.holding.shape, share.boxes)

    def _spread_planes(self) -> Iterator[Sequence[Tensor]]:
        for share in self._shares:
            if share.format is not None and share.format.spread is not None:
                yield self._planes[share.name][share.format.num_planes :]

    def _forget_columns(self) -> None:
        self._shares = [self._without_columns(share) for share in self._shares]

    def _without_columns(self, share: Share) -> Share:
        fmt = share.format
        if fmt is None or fmt.spread is None:
            return share
        planes = self._planes[share.name] = self._planes[share.name][: fmt.num_planes + 1]
        return replace(share, format=with_spread(fmt.mean, Spread(0), planes[0].dtype))

    if TYPE_CHECKING:
        _guard: Guard
        _bindings: Any
        _number: int
        _ranks: Ranks
        _shares: Sequence[Share]
        _planes: dict[str, tuple[Tensor, ...]]
        _all_gathers: Sequence[AllGather]

        def _meet(
            self, action: str, model: Module, *, always: bool = False
        ) -> AbstractContextManager[tuple[Bound, dict[str, Held]]]: ...


def spelled(call: str, index: object, scale: object, seed: object) -> str:
    """Return a call as ranks compare it: all must draw the same sample."""
    return f"{call}(index={index}, scale={scale}, seed={seed})"
