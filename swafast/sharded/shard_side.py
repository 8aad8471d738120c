"""One averaged model of shards: what it holds of a model, and the pairs of its shares."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import Tensor
from torch.nn import Module

from ..average.accepting import check_model, refuse_engine
from ..average.contents import HoldsModels
from ..backends.contract import Pair
from ..op import checks
from ..terms.draws import Draws, make_random_key
from ..terms.formats import Format
from ..terms.names import require_same_names
from ..terms.rules import Rule
from .construction import followed
from .parts.finding import copied_by_torch, find_holdings
from .parts.holdings import Held, Mesh, is_fsdp1, is_zero, require_same_sharding
from .parts.ranks import Ranks
from .parts.shares import Share


def check_sharded_model(model: object) -> None:
    """Raise as :func:`check_model` does, but accept models of FSDP1 and ZeRO-3 with only empty params on this rank."""
    refuse_engine(model)
    if not (isinstance(model, Module) and (is_fsdp1(model) or is_zero(model))):
        check_model(model)


class ShardSide(HoldsModels):
    """One of the averaged models that are updated together."""

    rule: Rule
    n_averaged: Tensor  # () int64, number of updates, on the device of the averages
    seed: int
    _ranks: Ranks
    _shares: Sequence[Share]
    _planes: dict[str, tuple[Tensor, ...]]  # by name of the share
    _anew: dict[str, str]  # by name: the copied buffers that are no longer as at construction
    use_buffers: bool
    _left_alone: Collection[str]  # names of params that are not averaged
    _meshes: Mapping[str, tuple[Mesh, ...]]  # for `find_holdings`
    _copied: dict[tuple[str, ...], Tensor]  # by names of the buffer: the copies that torch makes
    _any_device = False  # whether the average may be on another device than the model
    _moves = 0  # how often the planes have got other memory, which no plan from before fits

    def _stored(self) -> Iterator[tuple[Format | None, Sequence[Tensor]]]:
        for share in self._shares:
            yield share.format, self._planes[share.name]
        for tensor in self._copied.values():
            yield None, (tensor,)

    def _head(self) -> Iterable[str]:
        return [f"rank {self._ranks.index} of {self._ranks.size}"]

    def _find_held(self, model: Module) -> dict[str, Held]:
        """Return what this rank holds of ``model`` now, by name, in the order of the shares.

        Raises:
            ValueError: names, shapes, meshes or placements differ from those of the shares; the message names it.
        """
        check_sharded_model(model)
        require_same_names("buffers that torch copies", map(str, self._copied), map(str, copied_by_torch(model)))
        held = {found.holding.name: found for found in find_holdings(model, self._ranks.ranks, self._meshes)}
        shares = followed(self._shares, held, model, vars(self)["format"], self.use_buffers)
        for is_buffer, kind in ((False, "parameters"), (True, "buffers")):
            expected = [share.name for share in shares if share.holding.is_buffer == is_buffer]
            given = [name for name, found in held.items() if found.holding.is_buffer == is_buffer]
            require_same_names(kind, expected, [name for name in given if name not in self._left_alone])
        for share in shares:
            require_same_sharding(share.holding, held[share.name].holding)
            checks.check_plain(f"{share.name!r} of the model", held[share.name].local)
        return {share.name: held[share.name] for share in shares}

    def _follow(self, model: Module, held: Mapping[str, Held]) -> None:
        """Make copies anew for the buffers that the model has made anew."""
        before = {share.name: share for share in self._shares}
        self._shares = followed(self._shares, held, model, vars(self)["format"], self.use_buffers)
        for share in self._shares:
            if share is not before.pop(share.name, None):
                theirs = share.of(held[share.name].local.detach()).contiguous()
                where = self.n_averaged.device if self._any_device else theirs.device
                self._planes[share.name] = (theirs.to(where, copy=True),)
                self._anew[share.name] = f"{share.holding.dtype} {share.holding.shape}"
        for name in before:
            del self._planes[name]
            self._anew[name] = "None"

    def _pair(self, share: Share, view: Tensor, pace: int) -> Pair:
        draws = None
        if share.format is not None and share.format.num_random_bits:
            draws = Draws(make_random_key(self.seed, share.name), share.holding.shape, share.boxes)
        return Pair(share.name, view, self._planes[share.name], share.format, draws, pace, share.holding.is_buffer)
