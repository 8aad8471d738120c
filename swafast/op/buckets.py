"""Buckets: flat allocations that hold planes of averages. Each plane has a storage of its own over its slot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import cpu
from ..backends.contract import Pair
from ..terms.layout import Slot, is_dense, lay_out, same_order
from ..torch_private.core import is_held_elsewhere

#: Two large pages: a plane of this size contains one.
_LARGE_NBYTES = 4 * 2**20


@torch.no_grad()
def home_averages(pairs: Sequence[Pair], homes: frozenset[int]) -> frozenset[int]:
    """Move planes of averages into new buckets, in their param's order, unless they are at home.

    One bucket is filled and the old memory freed before the next is allocated, so the peak is at most one bucket more:
    256 MiB of float32, or one plane if it is larger. A bucket of pinned memory may be as large as all planes.

    Args:
        homes: addresses of the planes that are at home. One that has another order than its param moves all the same,
            unless other tensors stand on its memory, such as those of a state: they stay live.

    Returns:
        the addresses of all planes of averages now. Planes in memory shared with other processes have not moved.
    """
    planes: list[Tensor] = []
    strides: list[tuple[int, ...]] = []
    taken: set[int] = set()  # two averages may share memory after a load by assignment: one of them keeps it
    for pair in pairs:
        if pair.format is None or pair.average.numel() == 0:
            continue
        order = _order(pair)
        for plane in pair.planes:
            # Other processes would not see a plane that has moved out of the memory they share.
            shared = plane.device.type == "cpu" and plane.is_shared()
            address = plane.data_ptr()
            homed = address in homes and address not in taken and not (plane.is_conj() or plane.is_neg())
            homed = homed and (same_order(plane.shape, plane.stride(), order) or is_held_elsewhere(plane))
            taken.add(address)
            if not shared and not homed:
                planes.append(plane)
                strides.append(order)
    likes = [
        PlaneLike(plane.shape, order, plane.dtype, plane.device, plane.is_pinned())
        for plane, order in zip(planes, strides, strict=True)
    ]
    _move(planes, likes)
    averaged = (pair.planes for pair in pairs if pair.format is not None)
    return frozenset(plane.data_ptr() for pair_planes in averaged for plane in pair_planes)


@torch.no_grad()
def pin(planes: Sequence[Tensor]) -> None:
    """Move planes of averages from wherever they are into new buckets of the host's pinned memory, bucket by bucket.

    A bucket may be as large as all planes: see :func:`~swafast.terms.layout.lay_out`. So planes that are in the host's
    pageable memory may be there twice at the peak. Of planes on a GPU, the host has the buckets alone.
    """
    host = torch.device("cpu")
    _move(planes, [PlaneLike(each.shape, each.stride(), each.dtype, host, pinned=True) for each in planes])


def _move(planes: Sequence[Tensor], likes: Sequence[PlaneLike]) -> None:
    for made in new_in_buckets(likes):
        with torch.inference_mode(False), torch.no_grad():
            for index, tensor in made:
                planes[index].data = tensor.copy_(planes[index])


def stay(planes: Iterable[Tensor], before: frozenset[int] = frozenset()) -> frozenset[int]:
    """Return the addresses of planes that are at home where they lie: then no plan moves them.

    Args:
        planes: planes whose memory was made for them, so that nobody else writes it.
        before: the addresses of an earlier call.
    """
    found = {plane.data_ptr(): plane for plane in planes}
    for address, plane in found.items():
        if plane.nbytes >= _LARGE_NBYTES and address not in before:
            cpu.want_large_pages(plane.untyped_storage())
    return frozenset(found)


@dataclass(frozen=True)
class PlaneLike:
    """The shape, strides, dtype and device of a plane to be made."""

    shape: Sequence[int]
    stride: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    pinned: bool = False


def new_in_buckets(likes: Sequence[PlaneLike]) -> Iterator[list[tuple[int, Tensor]]]:
    """Make planes in buckets, without values. Yield (index, plane) of all planes in one bucket, bucket by bucket."""
    numels = [math.prod(like.shape) for like in likes]
    kinds = [(like.device, like.dtype, like.pinned) for like in likes]
    for bucket in lay_out(numels, kinds, pinned={kind for kind in kinds if kind[-1]}):
        first = likes[bucket.slots[0].index]
        # A tensor made under inference_mode cannot be written in place outside of it.
        with torch.inference_mode(False), torch.no_grad():
            if first.device.type == "meta":  # nothing to share
                made = [(slot.index, _empty(likes[slot.index])) for slot in bucket.slots]
            else:
                like = {"dtype": first.dtype, "device": first.device, "pin_memory": first.pinned}
                storage = torch.empty(bucket.numel, **like).untyped_storage()  # type: ignore[call-overload]
                cpu.want_large_pages(storage)
                made = [(slot.index, stand_on_own_storage(storage, likes[slot.index], slot)) for slot in bucket.slots]
        yield made


def _empty(like: PlaneLike) -> Tensor:
    return torch.empty_strided(tuple(like.shape), tuple(like.stride), dtype=like.dtype, device=like.device)


def stand_on_own_storage(bucket: torch.UntypedStorage, like: PlaneLike, slot: Slot) -> Tensor:
    """Return a plane in its slot, on a storage of its own over the bucket's memory.

    pickle and torch.save write a tensor's whole storage. For a view of the bucket, they would write the whole bucket.
    """
    itemsize = like.dtype.itemsize
    own = bucket[slot.offset * itemsize : (slot.offset + slot.numel) * itemsize]
    return torch.empty(0, dtype=like.dtype, device=like.device).set_(own, 0, like.shape, like.stride)


def _order(pair: Pair) -> tuple[int, ...]:
    """Return an average's strides: its param's if these are dense, so that a kernel reads each as one run of memory."""
    for tensor in (pair.param, pair.average):
        if is_dense(tensor.shape, tensor.stride()):
            return tensor.stride()
    return torch.empty(pair.param.shape, device="meta").stride()
