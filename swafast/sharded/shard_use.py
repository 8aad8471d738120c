"""Use of one averaged model of shards: its averages, or a sample near them, in a model for a while or for good."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from ..average.subspace_use import HasSubspaces
from ..backends.contract import Pair
from ..loop import swaps
from ..loop.guard import Guard, seamless
from ..op.drawing import DrawsOf, draw_for_good
from ..terms.draws import Draws, make_random_key
from ..terms.formats import with_spread
from ..terms.hints import hinted
from ..terms.numbers import as_float, as_int
from ..terms.samples import Sample
from ..terms.spread import Spread
from .construction import spell
from .parts.all_gather import AllGather
from .parts.holdings import Held, free_gathered, reshard
from .parts.ranks import Counting, Ranks
from .parts.shares import Share
from .shard_matching import Bound
from .swap import OF_SHARDS, gather_all
from .zero_swap import OF_RUNS


class UsableShards(HasSubspaces):
    """Base class of one averaged model of shards that can be put into a model, as it is or as a sample."""

    def swapped_into(self, model: Module) -> AbstractContextManager[Module]:
        """Run ``model`` on the averages: ``with averaged.swapped_into(model): evaluate(model)``.

        Params and averages are exchanged in place if the dtypes agree. Otherwise this rank's part of the params is
        copied aside and overwritten. Params that are cut are then all-gathered in windows, on entering and on leaving.
        FSDP modules are resharded at both, and what ZeRO-3 has gathered is freed. Params must not be written in the
        body, and swaps may nest, as with :class:`~swafast.FusedAveragedModel`.

        Collective if params are cut. On leaving, after an exception too, everything changes back. If a rank is lost,
        this rank's averages and its own part of the params are whole. The other parts of cut params may not be, and the
        error says so.

        Raises:
            TypeError, ValueError: as :meth:`update_parameters`; nothing has changed.
            RuntimeError: the averages are swapped in already; a rank was lost; or, on leaving, a param was written or
                its memory was freed.
        """
        return self._there_and_back("swapped_into", model)

    def copy_to(self, model: Module) -> None:
        """Copy averages and buffers into ``model``, each rounded once to the param's dtype. Collective if any is cut.

        Under ZeRO-3 the masters get them too, so that the next step of the optimizer begins there.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`update_parameters`; nothing has changed.
            RuntimeError: the average holds no model yet; or a rank was lost, and the message says which params are not
                whole.
        """
        self._for_good("copy_to", model)

    @hinted
    def sampled_into(
        self, model: Module, index: int, *, scale: float | None = None, seed: int | None = None
    ) -> AbstractContextManager[Module]:
        """Run ``model`` on a sample of SWAG, the same bits as :meth:`FusedAveragedModel.sampled_into` draws.

        Each rank draws its own part of the params, and keeps a copy of that part meanwhile. Params that are cut are
        then all-gathered, on entering and on leaving. Collective, also if none is cut: all ranks pass the same
        arguments. On leaving, after an exception too, everything changes back, as with :meth:`swapped_into`.

        Args:
            index, scale, seed: as for :meth:`~swafast.FusedAveragedModel.sampled_into`.

        Raises:
            TypeError, ValueError, RuntimeError: as there, on every rank; ranks have passed different arguments; or a
                rank was lost.
        """
        return self._there_and_back("sampled_into", model, index=index, scale=scale, seed=seed)

    @hinted
    def sample_to(self, model: Module, index: int, *, scale: float | None = None, seed: int | None = None) -> None:
        """Write a sample into ``model`` for good, and the average's buffers. Collective. See :meth:`sampled_into`.

        Raises:
            TypeError, ValueError, RuntimeError: as there; nothing has changed unless a rank was lost.
        """
        self._for_good("sample_to", model, index=index, scale=scale, seed=seed)

    def _placed_into(self, model: Module, sample: Callable[[], Sample], spelled: str) -> AbstractContextManager[Module]:
        return self._there_and_back("placed_into", model, sample=sample, spelled=spelled)

    # Both ways of use. ``asked`` is index, scale and seed of a sample, or a point; nothing: the averages themselves.

    @seamless
    def _there_and_back(self, action: str, model: Module, **asked: Any) -> Iterator[Module]:
        swap = swaps.Swap(self._guard, self, model, self._ranks.lock, call=action)
        try:
            try:
                failure = self._guard.settled_or_error(action, model)
                with self._guard.locked(self._ranks.lock):
                    with self._meet(action, model, asked, failure) as (bound, held):
                        kind: Any
                        kind, draws, places = OF_RUNS if bound[1].locator.for_use else OF_SHARDS
                        if asked:
                            if "sample" in asked:
                                kind = partial(places, self._placing(asked["sample"]))
                            else:
                                kind = partial(draws, self._drawing(**asked))
                            bound[0].writable_pairs(*bound[1:])
                        elif self._uncounted is not None:
                            self._warn_if_empty(action)
                        meets = any(each.ranks is self._ranks for each in self._all_gathers)
                        leave = partial(self._ranks.leave, action, self._number) if meets else None
                        exchange = kind(model, bound, self._bindings.latest, self._all_gathers, held, leave)
                        swap.enter(exchange)
                    exchange.gather()
                    swap.take_writes()
                yield model
            finally:
                swap.leave()
        finally:
            swap.finish()  # whatever an interrupt has left

    @torch.no_grad()
    def _for_good(self, action: str, model: Module, **asked: Any) -> None:
        failure = self._guard.settled_or_error(action, model)
        with self._guard.locked(self._ranks.lock):
            with self._meet(action, model, asked, failure) as ((plan, params, planes), held):
                drawing = self._drawing(**asked) if asked else None
                if swaps.in_force:
                    swaps.refuse_model(action, model)
                # The next step of the optimizer would bring back what masters held.
                bounds = [(plan, params, planes), *([self._bind(model)] if params.locator.for_use else [])]
                pairs = [plan.writable_pairs(params, planes) for plan, params, planes in bounds]
            if drawing is not None:
                for plan, params, planes in bounds:
                    draw_for_good(plan, params, planes, drawing)
            else:
                if self._uncounted is not None:  # on all ranks, which have compared their counts if they meet below
                    self._refuse_if_empty(action)
                for (plan, _, _), of_plan in zip(bounds, pairs, strict=True):
                    plan.copy_to(of_plan)
            gather_all(self._all_gathers, held, action, "could not reach all params", torn=True)

    @contextmanager
    def _meet(
        self, action: str, model: Module, asked: dict[str, Any], failure: Exception | None
    ) -> Iterator[tuple[Bound, dict[str, Held]]]:
        """Yield the plan for ``model`` and the tensors that all-gathers need, with FSDP's shards in place.

        Collective if params are cut, or for a sample, which must be the same on all ranks: an error on one rank, here
        or in the body, then raises on all, and so does ``failure``, that of an earlier update.
        """
        call = f"{action}({self._spelled(**asked)})" if asked else action
        with self._counting.settled(call, self._number) if self._all_gathers or asked else nullcontext():
            if failure is not None:
                raise failure
            self._guard.refuse_while_swapped(action)
            # ZeRO-3 partitions all params or none. Not a function, as its call would slow down every other model.
            is_zero = bool(self._shares) and self._shares[0].holding.sharding.kind == "zero"
            bound = self._bind(model, for_use=is_zero)
            reshard(model)
            if is_zero:
                free_gathered(model)
            yield bound, bound[1].held() if self._all_gathers else {}

    def _spelled(
        self, index: object = 0, scale: object = None, seed: object = None, spelled: str = "", **_: object
    ) -> str:
        """Return what a sample is asked for as ranks compare it: by value, whatever the types of the arguments."""
        if spelled:
            return spelled
        number = None if scale is None else as_float(scale)
        exact = spell(scale) if number is None else f"{number} = {number.hex()}"
        own = self.seed if seed is None else seed
        whole = (spell(value) if as_int(value) is None else as_int(value) for value in (index, own))
        return "index={}, seed={}, scale={}".format(*whole, exact)

    def _draws_of(self, seed: int) -> DrawsOf:
        shares: dict[str, Share] = {}  # by name, once a plan asks: it keeps what it is told

        def draws_of(pair: Pair) -> Draws:
            if not shares:
                shares.update((share.name, share) for share in self._shares)
            share = shares[pair.name]
            return Draws(make_random_key(seed, pair.name), share.holding.shape, share.boxes)

        return draws_of

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
        _counting: Counting
        _uncounted: Any
        _shares: Sequence[Share]
        _planes: dict[str, tuple[Tensor, ...]]
        _all_gathers: Sequence[AllGather]

        def _bind(self, model: Module, staging: Any = None, *, for_use: bool = False) -> Bound: ...
        def _warn_if_empty(self, action: str) -> None: ...
        def _refuse_if_empty(self, action: str) -> None: ...
