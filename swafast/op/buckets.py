"""Buckets: flat allocations in which averages lie, each on a storage of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import cpu
from ..backends.contract import Pair
from ..terms.layout import Slot, is_dense, lay_out, same_order


@torch.no_grad()
def home_averages(pairs: Sequence[Pair], homes: frozenset[int]) -> frozenset[int]:
    """Move averages that do not lie in a bucket, dense and in their param's order, into new ones.

    One bucket is filled and the old memory given back before the next is made, so this takes at most one bucket more.

    Args:
        homes: addresses of the planes that an earlier plan put into buckets.

    Returns:
        the addresses of all planes that are in buckets now.
    """
    planes: list[Tensor] = []
    strides: list[tuple[int, ...]] = []
    for pair in pairs:
        if pair.format is None or pair.average.numel() == 0:
            continue
        order = _order(pair)
        for plane in pair.planes:
            # Memory shared with other processes would be lost to them if it moved.
            shared = plane.device.type == "cpu" and plane.is_shared()
            if not shared and not (plane.data_ptr() in homes and same_order(plane.shape, plane.stride(), order)):
                planes.append(plane)
                strides.append(order)
    likes = [
        PlaneLike(plane.shape, order, plane.dtype, plane.device, plane.is_pinned())
        for plane, order in zip(planes, strides, strict=True)
    ]
    for made in new_in_buckets(likes):
        with torch.inference_mode(False), torch.no_grad():
            for index, tensor in made:
                planes[index].data = tensor.copy_(planes[index])
    averaged = (pair.planes for pair in pairs if pair.format is not None)
    return frozenset(plane.data_ptr() for pair_planes in averaged for plane in pair_planes)


@dataclass(frozen=True)
class PlaneLike:
    """What a plane is to be."""

    shape: Sequence[int]
    stride: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    pinned: bool = False


def new_in_buckets(likes: Sequence[PlaneLike]) -> Iterator[list[tuple[int, Tensor]]]:
    """Make planes in buckets, without values: for each bucket, once it is asked for, (index, plane) of all in it."""
    numels = [math.prod(like.shape) for like in likes]
    for bucket in lay_out(numels, [(like.device, like.dtype, like.pinned) for like in likes]):
        first = likes[bucket.slots[0].index]
        # Under inference_mode the averages would become inference tensors, and never see autograd again.
        with torch.inference_mode(False), torch.no_grad():
            like = {"dtype": first.dtype, "device": first.device, "pin_memory": first.pinned}
            storage = torch.empty(bucket.numel, **like).untyped_storage()  # type: ignore[call-overload]
            cpu.want_large_pages(storage)
            made = [(slot.index, stand_on_own_storage(storage, likes[slot.index], slot)) for slot in bucket.slots]
        yield made


def stand_on_own_storage(bucket: torch.UntypedStorage, like: PlaneLike, slot: Slot) -> Tensor:
    """Give a plane in its slot, on a storage of its own over the bucket's memory.

    pickle and torch.save write a tensor's whole storage: as views of one bucket, each plane would be written with it.
    """
    itemsize = like.dtype.itemsize
    own = bucket[slot.offset * itemsize : (slot.offset + slot.numel) * itemsize]
    return torch.empty(0, dtype=like.dtype, device=like.device).set_(own, 0, like.shape, like.stride)


def _order(pair: Pair) -> tuple[int, ...]:
    """Give the strides an average should have: its param's, so that one run of memory is read beside another."""
    for tensor in (pair.param, pair.average):
        if is_dense(tensor.shape, tensor.stride()):
            return tensor.stride()
    return torch.empty(pair.param.shape, device="meta").stride()
