"""Match a model with averages of shards, and keep the plan that fits its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter

from torch import Tensor
from torch.nn import Module

from ..average.bindings import Bindings
from ..op import checks, choice
from ..op.plan import Fingerprint, Plan
from ..op.tree_check import Checks, TreeCheck
from ..terms import hints
from ..terms.capturing import refuse_capture
from .locator import Locator, StagedViews, Views
from .parts.holdings import Held, reshard
from .shard_side import ShardSide
from .staging import Staging

#: A getter, since each update asks it: an expression in Python would be one more call for each side.
_moves_of = attrgetter("_moves")

#: A plan with its current params and planes.
Bound = tuple[Plan, Views, Sequence[Tensor]]


class ShardBinding:
    """A plan, and the locator that finds its tensors again.

    Args:
        sides: the averaged models, all of the same model.
        held: what this rank holds of the model, by name.
        staging: copies the buffers, and an update reads the copies; None: it reads the buffers themselves.
        for_use: as for :class:`Locator`.
        config: what the binding is made for, besides the tensors. It serves as long as this is the same.
    """

    def __init__(
        self,
        model: Module,
        sides: Sequence[ShardSide],
        held: Mapping[str, Held],
        staging: Staging | None,
        for_use: bool,
        config: tuple[object, ...],
    ) -> None:
        self.config, self._staging = config, staging
        self._locator = Locator(model, sides[0]._shares, held, for_use)
        found = self._locator.find(model)
        assert found is not None, "a new locator must fit"
        indices = {share.name: index for index, share in enumerate(self._locator.shares)}
        # Skip params of which this rank has no part: small or unevenly sharded ones.
        chosen = [
            (pace, indices[share.name], share)
            for pace, side in enumerate(sides)
            for share in sorted(side._shares, key=lambda share: indices[share.name])
            if share.numel
        ]
        self._chosen = [(index, share) for _, index, share in chosen]
        counters = [side.n_averaged for side in sides]
        checks.check_one_device(counters)
        bases = self._bases_of(found)
        self._bases = Fingerprint([*bases, *counters])
        views = self._views(bases)
        pairs = [sides[pace]._pair(share, view, pace) for (pace, _, share), view in zip(chosen, views, strict=True)]
        for pair in pairs:
            # The masters of ZeRO-3 may be offloaded to the CPU.
            checks.check_sides(pair, any_device=for_use or sides[pair.pace]._any_device)
        checks.check_overlap(pairs)
        for device in {tensor.device for pair in pairs for tensor in (pair.param, pair.average)}:
            refuse_capture(device, "the first update of a model, or of one whose tensors have moved,")
        homes = frozenset(plane.data_ptr() for pair in pairs for plane in pair.planes)
        backends = choice.choose_backends(vars(sides[0])["backend"], choice.device_types(pairs))
        self.plan = Plan(pairs, backends, counters, homes)
        self._planes = tuple(plane for pair in pairs for plane in pair.planes)
        self.plan.copies = self._locator.copies([side._copied for side in sides], staging)
        self._checks, self._counters = Checks(), Fingerprint(counters)

    @property
    def root(self) -> Module | None:
        """The unwrapped model that was matched, or None if it is gone."""
        return self._locator.root

    def current(self, model: Module, config: object, counters: Sequence[Tensor]) -> Bound | None:
        """Return the plan with its current params and planes, or None if it no longer fits them."""
        if config != self.config or self.plan.is_retired or not self._locator.is_of(model):
            return None
        bases = self._checks.find(1)
        if bases is not None and self._counters.fits(counters) and self._copies_fit():
            return self.plan, self._views(bases[0]), self._planes
        found = self._locator.find(model)
        if found is None:
            return None
        now = self._bases_of(found)
        if not self._bases.fits([*now, *counters]) or not self._copies_fit():
            return None
        if self._staging is None:
            self._checks.make(lambda: self._checked(found, counters))
        return self.plan, self._views(now), self._planes

    def _checked(self, found: Sequence[Tensor], counters: Sequence[Tensor]) -> TreeCheck:
        check = self._locator.check(found)
        if self._bases.fits([*self._locator.bases(found), *counters]):  # still: a thread may have moved one meanwhile
            return check
        raise ValueError("a tensor has moved while the check was made")

    def _views(self, bases: Sequence[Tensor]) -> Views:
        kind = StagedViews if self._staging is not None and self._staging.is_on_host else Views
        return kind(self._locator, self._chosen, bases, self._bases)

    def _copies_fit(self) -> bool:
        return self.plan.copies is None or self.plan.copies.fit()

    def now(self) -> Sequence[Tensor] | None:
        """Return the tensors that the shares lie in now, then the planes, or None if the model has changed."""
        found = self._locator.find(root) if (root := self.root) is not None else None
        return None if found is None else [*self._locator.bases(found), *self._planes]

    def places(self) -> Sequence[Sequence[Tensor]]:
        """Return, for each base and then for each plane, all tensors that have its names in the model now."""
        return [*self._locator.places(), *([plane] for plane in self._planes)]

    def lent(self) -> Sequence[tuple[str, Tensor]]:
        """Return nothing: there is no averaged module that would share params."""
        return ()

    def _bases_of(self, found: Sequence[Tensor]) -> list[Tensor]:
        bases, staging = self._locator.bases(found), self._staging
        if staging is None:
            return bases
        staging.take_by_torch(self._locator.by_torch() or {})
        if staging.is_on_host:
            parts = ((share, share.of(self._locator.local(bases, index).detach())) for index, share in self._chosen)
            return staging.take_parts(list(parts))
        for index, share in enumerate(self._locator.shares):
            if share.holding.is_buffer:
                bases[index] = staging.take(share.name, bases[index])
        return bases


def bind_shards(
    bindings: Bindings,
    model: Module,
    sides: Sequence[ShardSide],
    staging: Staging | None = None,
    *,
    for_use: bool = False,
) -> Bound:
    """Return the plan for ``model`` with its params and planes. Make a new one if no kept plan fits.

    Args:
        for_use: bind what a forward pass reads, where an update reads the masters of ZeRO-3.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: names, shapes, placements or memory do not fit the averages. The message names the param.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{hints.of_value('model', model)}")
    counters = [side.n_averaged for side in sides]
    config = (vars(sides[0])["backend"], staging, for_use, *map(_moves_of, sides))
    current = bindings.current(model, config, counters)
    if current is None:
        # After a forward pass without a backward, FSDP's root is gathered and its modules hold other tensors.
        reshard(model)
        current = bindings.current(model, config, counters)
    if current is None:
        for counter in counters:
            checks.check_counter(counter)
        held = sides[0]._find_held(model)
        for side in sides:
            side._follow(model, held)
        bindings.use(ShardBinding(model, sides, held, staging, for_use, config))
        current = bindings.current(model, config, counters)
        if current is None:
            raise RuntimeError("model and averages must stay as they are in a call, but a thread has replaced a tensor")
    return current  # type: ignore[return-value]  # the bindings of this floor have views for params
