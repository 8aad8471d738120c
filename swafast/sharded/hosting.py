"""Averages of shards in the host's memory, for models on GPUs: the move there, and copies of this rank's params.

Whatever uses the averages reads them there. An exchange copies the params of a pair on two devices aside, and a sample
is drawn by the reference backend, whose writes go to any device. All-gathers send params. Collectives of averages and
counts go to a GPU and back where the group takes tensors of GPUs alone: see ``Ranks.device_for``. States are where the
averages are, and loads write from any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..loop.guard import finished
from ..loop.stand_in import on_side, pinned_like
from ..op.buckets import PlaneLike, new_in_buckets
from ..terms.copying import duplicate
from .parts.shares import Share
from .shard_side import ShardSide
from .staging import Staging

_HOST = torch.device("cpu")


def refuse_all_reduce(nonfinite: str, argument: str, wanted: object, got: object) -> None:
    """Raise ValueError for an update beside the next forward that ranks would decide about together."""
    if nonfinite != "propagate":
        raise ValueError(
            f"{argument} must be {wanted!r} with nonfinite={nonfinite!r}, got {got!r}: the update's all-reduce would "
            "mix with the collectives of the next forward"
        )


class HostStaging(Staging):
    """Copies on the host of all that an update reads: of this rank's part of the params, and of the buffers.

    They keep their memory, which is pinned if there is a GPU. Buffers are copied on the current streams, since the next
    forward writes them. Params are copied on side streams: nothing writes this rank's part of them before the
    optimizer's next step, which waits for the copies. A forward of FSDP gathers into other memory.

    Args:
        streams: the side streams, one for each GPU.
    """

    is_on_host = True

    def __init__(self, streams: Sequence[torch.cuda.Stream]) -> None:
        super().__init__()
        self._streams = streams
        self._layouts: dict[object, object] = {}
        self._parts: dict[object, Tensor] = {}

    @torch.no_grad()
    def take_parts(self, parts: Sequence[tuple[Share, Tensor]]) -> list[Tensor]:
        """Copy this rank's parts to the host, each once for all averages of it, and return the copies."""
        keys = [(share.name, share.start, share.stop) for share, _ in parts]
        distinct = dict(zip(keys, parts, strict=True))
        self._make_room({key: part for key, (_, part) in distinct.items()})
        # The host's memory has been read when the copy returns.
        self.read = [part.untyped_storage() for _, part in distinct.values() if part.device != _HOST]
        for key, (share, part) in distinct.items():
            if share.holding.is_buffer:
                self._copy(key, part)
        with on_side(self._streams):
            for key, (share, part) in distinct.items():
                if not share.holding.is_buffer:
                    self._copy(key, part)
        return [self._parts[key] for key in keys]

    def _copy(self, key: object, part: Tensor) -> None:
        # Only CUDA's streams and events tell when a copy has ended, so a copy from another device is waited for.
        self._parts[key].copy_(part, non_blocking=part.device.type == "cuda")

    def _make_room(self, parts: dict[object, Tensor]) -> None:
        """Make memory for copies of these parts, unless the last copies had the same shapes."""
        layouts: dict[object, object] = {key: (part.dtype, part.shape, part.stride()) for key, part in parts.items()}
        if layouts == self._layouts:
            return
        self._parts = {}  # frees the last copies before
        if torch.cuda.is_available():
            made = dict(pinned_like(list(parts.values())))
            self._parts = {key: made[index] for index, key in enumerate(parts)}
        else:
            self._parts = {key: torch.empty_like(part, device=_HOST) for key, part in parts.items()}
        self._layouts = layouts

    def take_by_torch(self, buffers: Any) -> None:
        copied = {names: duplicate(each).to(_HOST) if each is not None else None for names, each in buffers.items()}
        self.by_torch = copied


@dataclass(frozen=True)
class _HostSide:
    """One averaged model, and what it will have on the host."""

    side: ShardSide
    planes: dict[str, tuple[Tensor, ...]]
    copied: dict[tuple[str, ...], Tensor]
    counter: Tensor


def move_to_host(averaged: Any, sides: Sequence[ShardSide]) -> None:
    """Move averages to the host, into pinned memory if there is a GPU. On the first call collective.

    Only copies of all planes take their place, so the host has room for all of them, or nothing changes on any rank.

    Raises:
        ValueError: an update would need other ranks.
        RuntimeError: the host of another rank has no room.
    """
    # Later, in a step after which the model is on another GPU, no rank knows whether the others are there too.
    is_first = not averaged._guard.is_attached
    with averaged._guard.hold("attach"):
        with averaged._on_all_ranks("attach") if is_first else nullcontext():
            refuse_all_reduce(averaged.nonfinite, "offload", None, "cpu")
            moved = moved_to_host(sides)
        put_on_host(moved, averaged)


def is_at_home(plane: Tensor, pinned: bool) -> bool:
    """Return whether a plane is in memory of the host already, with ``pinned`` in pinned memory."""
    return plane.device == _HOST and (not pinned or plane.is_pinned())


@torch.no_grad()
def moved_to_host(sides: Sequence[ShardSide]) -> list[_HostSide]:
    """Return copies on the host of all that the averages have, and leave the averages as they are."""
    pinned = torch.cuda.is_available()
    found = []
    for side in sides:
        side._holds()
        every = [plane for planes in side._planes.values() for plane in planes]
        moving = [each for each in every if not is_at_home(each, pinned)]
        likes = [PlaneLike(each.shape, each.stride(), each.dtype, _HOST, pinned) for each in moving]
        made = {id(moving[index]): new for bucket in new_in_buckets(likes) for index, new in bucket}
        with torch.inference_mode(False):
            for plane in moving:
                made[id(plane)].copy_(plane)
        planes = {name: tuple(made.get(id(each), each) for each in own) for name, own in side._planes.items()}
        copied = {names: tensor.to(_HOST) for names, tensor in side._copied.items()}
        found.append(_HostSide(side, planes, copied, side.n_averaged.to(_HOST)))
    return found


def put_on_host(moved: Sequence[_HostSide], averaged: Any = None) -> None:
    """Put the copies into the place of the averages, also if an interrupt comes meanwhile.

    Args:
        averaged: what updates them together, whose plans no longer fit.
    """
    finished(partial(_put, moved, averaged))


def _put(moved: Sequence[_HostSide], averaged: Any) -> None:
    for each in moved:
        side: Any = each.side
        side._moves += 1
        side._any_device = True
        side._planes, side._copied = each.planes, each.copied
        side.n_averaged = each.counter
        side._bindings.forget()
        side._note_own_writes()
    if averaged is not None:
        averaged._bindings.forget()
