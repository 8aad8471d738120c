"""A plan: which average belongs to which param, where the averages lie, and the launches made ready for them.

Made at the first update and kept while it fits. Whether it still fits is looked at before each update, tensor by tensor
on both sides, without reading a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ..backends import cpu
from ..backends.contract import Backend, Pair, ReduceFlag
from ..terms.layout import Slot, is_dense, lay_out, same_order
from ..terms.rules import Rule
from ..torch_private.core import make_metadata_check
from . import launches
from . import torch_op as torch_op  # registers the op with the first average
from .checks import refuse_capture
from .launches import bump_versions


class Fingerprint:
    """What a list of tensors was when a plan was made: addresses, dtypes, devices, shapes, strides."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._views = _views_of(tensors)
        self._quick: Callable[..., bool] | None = make_metadata_check(tensors)

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Say whether these tensors have the same memory and the same view of it.

        An address is no identity, since freed ones are handed out again: with the dtype, shape and strides alike it
        needs none, as these are all that a launch goes by.
        """
        try:
            if list(map(Tensor.data_ptr, tensors)) != self._addresses:
                return False
        except (TypeError, RuntimeError, ValueError):
            return False  # None, or a tensor without memory of its own: planning anew names it
        if self._quick is not None and self._quick(*tensors):
            return True
        if _views_of(tensors) != self._views:
            return False
        self._quick = make_metadata_check(tensors)  # what it rejected was of no account: requires_grad, say
        return True


def _views_of(tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
    return [(t.dtype, t.device, t.shape, t.stride(), t.is_neg(), t.is_conj()) for t in tensors]


class Plan:
    """Pairs, their averages in buckets, and the work made ready for the backends."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        backends: Sequence[Backend],
        counters: Sequence[Tensor],
        homes: frozenset[int] = frozenset(),
    ) -> None:
        self.homes = home_averages(pairs, homes)
        self.names = [pair.name for pair in pairs]
        self.formats = [pair.format for pair in pairs]
        self._counters = list(counters)
        #: Addresses that an update writes, as far as they are ours.
        self.writes = self.homes | {counter.data_ptr() for counter in counters}
        self._params = Fingerprint([pair.param for pair in pairs])
        self._written = Fingerprint([*(plane for pair in pairs for plane in pair.planes), *counters])
        self._work = launches.prepare(pairs, backends)
        self._kept: tuple[Tensor, ...] = ()

    @property
    def backends(self) -> list[str]:
        """Names of the backends at work, the one with the last word last."""
        return [work.backend.name for work in self._work]

    def fits(self, params: Sequence[Tensor], planes: Sequence[Tensor], counters: Sequence[Tensor]) -> bool:
        return self._params.fits(params) and self._written.fits((*planes, *counters))

    def pairs(self, params: Sequence[Tensor], planes: Sequence[Tensor]) -> list[Pair]:
        """Put the tensors that :meth:`fits` has just seen together again."""
        rest = iter(planes)
        counts = [1 + len(fmt.extra) if fmt is not None else 1 for fmt in self.formats]
        return [
            Pair(name, param, tuple(islice(rest, count)), fmt)
            for name, param, count, fmt in zip(self.names, params, counts, self.formats, strict=True)
        ]

    def first_nonfinite(self, params: Sequence[Tensor]) -> str | None:
        """Give the name of a param that holds a NaN or an infinity, else None."""
        refuse_capture(self._counters[0].device, "nonfinite='raise', which waits for the device,")
        index = launches.first_nonfinite(self._work, params)
        return None if index is None else self.names[index]

    def refuse_nonfinite(self, params: Sequence[Tensor]) -> None:
        """Raise ValueError naming a param that holds a NaN or an infinity."""
        name = self.first_nonfinite(params)
        if name is not None:
            raise ValueError(f"{name!r} must be finite, got a NaN or an infinity; the average is as it was")

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph holds an update of this plan, which must then live as long as the averages."""
        return any(work.launch.captured for work in self._work)

    def update(
        self,
        params: Sequence[Tensor],
        planes: Sequence[Tensor],
        rules: Sequence[Rule],
        *,
        skip_nonfinite: bool = False,
        reduce_flag: ReduceFlag | None = None,
    ) -> None:
        """Run one update; ``params`` and ``planes`` are those that :meth:`fits` has just seen.

        ``rules``, one for each counter, are those of the averaged models.
        """
        # Before the launch: after it, a large update has driven the tensors' own records out of the caches (0.3 ms for
        # 2000 of 64x64); and whatever an interrupted launch has written is then known to autograd already.
        bump_versions((*planes, *self._counters))
        launches.update(
            self._work, params, rules, self._counters, skip_nonfinite=skip_nonfinite, reduce_flag=reduce_flag
        )
        if self.captured and not self._kept:
            # The graph goes on reading and writing this memory, whatever stands in the modules by then.
            self._kept = tuple(tensor.detach() for tensor in (*params, *planes, *self._counters))


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
