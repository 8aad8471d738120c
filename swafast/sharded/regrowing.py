"""`adapt_to` for averages of shards, whose parts on each rank change with the model."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..average.growing import OldName, before_of, made_like, require_stayed
from ..loop import swaps
from ..loop.guard import finished
from ..terms.boxes import Box
from ..terms.converting import convert, full_precision
from .checkpoint import Entry, part_of
from .full_states import summed
from .hosting import moved_to_host, put_on_host
from .parts.ranks import Ranks
from .parts.shares import Share
from .updating import AttachableShards


class AdaptableShards(AttachableShards):
    """Base class of one averaged model of shards that can take over a model that has grown."""

    def adapt_to(self, model: Module, *, old_name: OldName | None = None) -> list[str]:
        """Take over a model that has changed, as :meth:`swafast.FusedAveragedModel.adapt_to`. Collective.

        The model may be sharded in another way than before. Each average that stays is gathered, one by one.

        Raises:
            TypeError, ValueError, RuntimeError: as there, and as the construction does; nothing has changed on any
                rank.
        """
        return adapt_shards(self, [self], model, old_name, self._ranks)


def adapt_shards(
    root: AttachableShards, averages: Sequence[Any], model: Module, old_name: OldName | None, ranks: Ranks
) -> list[str]:
    """Have ``averages``, those in ``root``, take over ``model`` together. Collective."""
    with root._guard.hold("adapt_to", ranks):
        with ranks.settled("adapt_to"):
            if isinstance(model, Module) and swaps.in_force:
                swaps.refuse_model("adapt_to", model)
        made: list[Any] = []
        begun: list[str] = []
        for averaged in averages:
            new, begun = _adapted(averaged, model, old_name or (lambda name: name), ranks)
            if averaged._any_device:  # by an attachment with offload
                with ranks.settled("adapt_to"):
                    on_host = moved_to_host([new])
                put_on_host(on_host)
            made.append(new)
        finished(partial(_take_over, root, averages, made, model))
        return begun


def _adapted(averaged: Any, model: Module, old_name: OldName, ranks: Ranks) -> tuple[Any, list[str]]:
    """Return a new average of ``model``, which has taken the averages of an old one, and the names that begin."""
    kept = {name: share for share in averaged._shares for name in share.holding.names}

    def includes(name: str, param: Tensor) -> bool:
        old = before_of(old_name, name)
        if old in kept or old in averaged._left_alone:
            return old in kept
        return averaged.include is None or bool(averaged.include(name, param))

    asks = averaged.include is not None or bool(averaged._left_alone)
    given = {"include": includes if asks else None, "process_group": ranks}
    made = made_like(averaged, AdaptableShards, model, given)
    pairs: list[tuple[Share, Share]] = []  # each new share that stays, and the old one
    begun: list[str] = []
    with ranks.settled("adapt_to"):
        for share in made._shares:
            olds = (before_of(old_name, name) for name in share.holding.names)
            old = next((old for old in olds if old in kept), None)
            if old is not None:
                pairs.append((share, kept[old]))
            covers = old is not None and _covers(kept[old], share)
            if share.format is not None and not covers:
                begun.append(share.name)
        require_stayed(len(pairs), kept, [share.name for share in made._shares])
    ranks.agree("old_name", {share.name: before.name for share, before in pairs})
    with ranks.in_lockstep():
        for share, before in pairs:
            averages = share.format is not None and before.format is not None
            if averages and len(share.holding.shape) == len(before.holding.shape):
                _keep(share, made._planes[share.name], before, averaged._planes[before.name], ranks)
    return made, begun


def _covers(old: Share, new: Share) -> bool:
    """Return whether an old average has all elements of the new one."""
    sizes, before = new.holding.shape, old.holding.shape
    return old.format is not None and len(sizes) == len(before) and all(map(operator.le, sizes, before))


@torch.no_grad()
def _keep(share: Share, planes: Sequence[Tensor], old: Share, old_planes: Sequence[Tensor], ranks: Ranks) -> None:
    """Gather an old average and write this rank's part of it over a new one, at the indices that both have."""
    alike = share.format is old.format
    assert share.format is not None
    count = share.format.num_planes
    if alike:
        sources, targets = list(old_planes), list(planes)
    else:
        assert old.format is not None
        sources = [full_precision(old_planes, old.format), *old_planes[old.format.num_planes :]]
        targets = [full_precision(planes, share.format).clone(), *planes[count:]]
    whole_box = Box((0,) * len(old.holding.shape), old.holding.shape, 0, tuple(range(len(old.holding.shape))))
    for source, target in zip(sources, targets, strict=True):
        entry, run = Entry(old.holding.names, old, source), target.detach().reshape(-1)
        # Each rank averages its own buffers.
        own = old.holding.is_buffer and old.holding.sharding.kind == "replicated"
        whole = part_of(entry) if own else summed(entry, ranks, to_first=False)
        for box in share.boxes:
            if (both := box.overlap(whole_box)) is not None:
                box.of_run(run)[both[0]].copy_(whole[both[1]])
    if not alike:
        convert(targets[:1], None, planes[:count], share.format.mean)


def _take_over(root: AttachableShards, averages: Sequence[Any], made: Sequence[Any], model: Module) -> None:
    """Put new averages into the place of the old ones."""
    for averaged, new in zip(averages, made, strict=True):
        for attribute in ("_meshes", "_left_alone", "_shares", "_planes", "_all_gathers", "_copied", "_anew"):
            averaged.__dict__[attribute] = new.__dict__[attribute]
        averaged._moves += 1
        averaged._disregard_drift()
        averaged._made_of = weakref.ref(model)
        averaged._bindings = new._bindings.after(averaged._bindings)
    root._made_of = weakref.ref(model)
    if all(root is not averaged for averaged in averages):
        root._bindings.forget()
    if root._guard.attachment is not None:
        root._guard.attachment.retarget(model)
