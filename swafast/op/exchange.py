"""The exchange of a model's params with their averages, there and back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from ..backends.contract import ExchangeLaunch
from ..loop.swaps import INTO_AVERAGES, INTO_BOTH, INTO_MODEL, REMOVED, REPLACED
from ..terms.converting import convert
from ..terms.copying import are_alike, make_room, write_once
from ..terms.names import renormed_params
from ..torch_private.core import versions
from .copies import Replaced
from .plan import Plan, bump_versions


class Located(Protocol):
    """What an exchange needs of the binding that its plan is of."""

    @property
    def root(self) -> Module | None: ...
    def now(self) -> Sequence[Tensor] | None: ...
    def places(self) -> Sequence[Sequence[Tensor]]: ...
    def lent(self) -> Sequence[tuple[str, Tensor]]: ...


class Exchange:
    """Exchanges params and averages. It holds their memory, so it can go back whatever happens to the modules.

    A param changes places with its average in place if plane 0 has the param's dtype and a kernel serves the pair.
    Every other param is copied aside, and its average is cast to its dtype and written into it. An exception or an
    interrupt may come at any point: :meth:`back` still restores everything.

    Args:
        params, planes: the current ones, which the plan fits.
        binding: knows the tensors that the modules have now, params (or bases) before planes.
        ignore_buffers: do not count writes into averaged buffers.

    Attributes:
        is_back: whether everything is back where it was, or cannot be put back.
    """

    #: What a step of the optimizer writes besides the params, so that a swap knows the model by it.
    beside: Sequence[Tensor] = ()
    #: Tells of writes that are in no version, as :meth:`written` does.
    written_elsewhere: Callable[[], dict[str, str]] | None = None
    _in_place = True  # False: all params are copied aside, and the averages stay as they are
    # What becomes of a write into a param and into a plane, and whether one into an averaged buffer counts.
    _end_of_params, _end_of_planes, _watches_buffers = INTO_MODEL, INTO_AVERAGES, True

    def __init__(
        self,
        plan: Plan,
        params: Sequence[Tensor],
        planes: Sequence[Tensor],
        binding: Located,
        *,
        ignore_buffers: bool = False,
    ) -> None:
        self._plan, self._params, self._binding = plan, params, binding
        every: tuple[Sequence[ExchangeLaunch], list[int]] = ((), list(range(len(plan.names))))
        self._launches, self._aside = plan.exchange(params, planes) if self._in_place else every
        self._replaced: Replaced | None = None  # what torch copies
        self._num_planes = len(planes)
        #: What is written: params, or the tensors that they are views of, before planes.
        self.tensors: tuple[Tensor, ...] = (*self._bases(), *planes)
        self._addresses = list(map(Tensor.data_ptr, self.tensors))
        self._storages = list(map(Tensor.untyped_storage, self.tensors))  # keeps them: a launch has only addresses
        self._origins = list(map(torch.UntypedStorage.data_ptr, self._storages))
        pairs = plan.pairs(params, planes) if self._aside else []
        self._stashed = [pairs[index] for index in self._aside]
        self._stash: list[Tensor] = []
        self._watched: list[Tensor] = []
        self._watched_names: list[str] = []
        for name, tensor, is_buffer in self._averaged():
            if not is_buffer or (self._watches_buffers and not ignore_buffers):
                self._watched_names.append(name)
                self._watched.append(tensor)
        num_averaged = len(self._watched)
        for name, tensor in binding.lent():
            self._watched_names.append(name)
            self._watched.append(tensor)
        num_lent = len(self._watched) - num_averaged
        self._ends = [self._end_of_params] * num_averaged + [INTO_BOTH] * num_lent + [self._end_of_planes] * len(planes)
        self._watched += planes
        self._places = self._addresses_of(self._watched)
        self._versions: list[int] | None = None
        self._moved: _Moved | None = None
        self._is_there = self.is_back = False

    # What differs where params are views of other tensors

    def _bases(self) -> Sequence[Tensor]:
        """Return the tensors in whose memory the params lie."""
        return self._params

    def _averaged(self) -> Iterable[tuple[str, Tensor, bool]]:
        """Return params and averaged buffers by which a user writes: name, tensor, and whether it is a buffer."""
        plan = self._plan
        each = zip(plan.names, self._params, plan.are_buffers, strict=True)
        kinds = zip(plan.formats, plan.are_buffers, strict=True)
        return compress(each, [fmt is not None or not is_buffer for fmt, is_buffer in kinds])

    def _addresses_of(self, watched: Sequence[Tensor]) -> list[int]:
        return list(map(Tensor.data_ptr, watched))

    def _is_copied_buffer(self, base: int) -> bool:
        """Return whether a base is a buffer that is copied: the body may make it anew, of any shape."""
        return self._plan.formats[base] is None and self._plan.are_buffers[base]

    def _params_in(self, bases: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the params that lie in these bases."""
        return bases

    def _views(self) -> Sequence[tuple[Any, ...]]:
        """Return dtype, device, shape and strides of each of the tensors, as they were on the way there."""
        return [*self._plan.param_views, *self._plan.plane_views]

    def _name(self, base: int) -> str:
        return repr(self._plan.names[base])

    def _names(self) -> list[str]:
        """Return what to call each of the tensors."""
        plane_names = (
            f"the average of {name!r}"
            for name, fmt in zip(self._plan.names, self._plan.formats, strict=True)
            for _ in range(1 + len(fmt.further) if fmt is not None else 1)
        )
        return [*map(self._name, range(len(self.tensors) - self._num_planes)), *plane_names]

    def _fill_in(self) -> None:
        """Get what other ranks hold back, once this rank's own part is back."""

    # There and back

    @torch.no_grad()
    def there(self) -> None:
        """Put the averages into the model."""
        self._stash = [pair.param.detach().clone() for pair in self._stashed]
        self._replaced = Replaced(self._plan.copies) if self._plan.copies is not None else None
        try:
            for launch in self._launches:
                launch.exchange(True)
            self._is_there = True
            if self._stashed:
                self._put()
            if self._replaced is not None:
                self._replaced.there()
        finally:
            bump_versions(self.tensors)

    def _put(self) -> None:
        """Write into the params that were copied aside."""
        # Write the first average last: it stays where the model ties params that the averaged module does not tie.
        for pair in reversed(self._stashed):
            if pair.format is None or pair.average.dtype == pair.param.dtype:
                write_once(pair.param, pair.average)
            else:
                convert(pair.planes, pair.format, (pair.param.detach(),), None)

    @torch.no_grad()
    def back(self) -> None:
        """Put params and averages back where they were. If it is interrupted, call it again.

        Raises:
            RuntimeError: memory was freed meanwhile, or a param has another shape: what was lost is named.
        """
        if self.is_back:
            return
        self._versions = None  # writes from now on are our own
        if self._is_there and (self._moved or not self._has_stayed()):
            # Memory has moved, also within its storage, or a module has another tensor.
            self._plan.is_retired = True  # its launches hold that they have exchanged
            self._moved = self._moved or _Moved(self, self._binding.places())
            self._moved.back()
        else:
            try:
                with contextlib.ExitStack() as all_of_them:  # if one raises, run the others too
                    for launch in self._launches:
                        all_of_them.callback(launch.exchange, False)  # does nothing unless it has exchanged
            finally:
                for pair, value in zip(self._stashed, self._stash, strict=False):  # none if nothing was written
                    write_once(pair.param, value)
        if self._replaced is not None:
            self._replaced.back()
        bump_versions(self.tensors)
        self._fill_in()
        lost: list[str] = []
        if self._moved is not None:
            self._moved.give(self._binding.places())
            lost = [*self._moved.lost]
        self.is_back = True
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise RuntimeError(
                f"model and averages must keep their memory and shapes while swapped, got another of {lost[0]}{more}: "
                "that could not be put back, everything else is back"
            )

    def _has_stayed(self) -> bool:
        """Return whether all tensors are where they were, in the modules too."""
        now, addresses = self._binding.now(), list(map(Tensor.data_ptr, self.tensors))
        return now is not None and addresses == self._addresses and all(map(is_, now, self.tensors))

    # Writes by others

    def watch(self) -> None:
        """Take what was written until now for our own."""
        self._versions = versions(self._watched)

    def written(self) -> dict[str, str]:
        """Return what others have written since :meth:`watch`, by name, with what becomes of it.

        That is averaged params, planes and, once it is back, params in whose place others stood.
        """
        found = dict(self._moved.replaced) if self._moved is not None else {}
        after = versions(self._watched)
        if self._versions is not None and after != self._versions:
            names = [*map(repr, self._watched_names), *self._names()[len(self.tensors) - self._num_planes :]]
            places = zip(self._places, self._addresses_of(self._watched), strict=True)
            states = zip(names, self._ends, places, self._versions, after, strict=True)
            for name, end, (place, place_now), *pair in states:
                # A tensor that has other memory now may have its version from there.
                if len(set(pair)) > 1 and place_now == place:
                    found[name] = end
        if found and self._binding.root is not None:  # a forward pass may write these
            for name in map(repr, renormed_params(self._binding.root)):
                if found.get(name) == self._end_of_params:
                    del found[name]
        return found if self.written_elsewhere is None else found | self.written_elsewhere()


class _Moved:
    """The way back of an exchange by tensors, pair by pair, where memory has moved or was freed.

    It writes into the memory that the exchange holds, and then into the tensors that the modules have now.

    Args:
        places: for each of the exchange's tensors, those that the modules have in its place.

    Attributes:
        lost: names of what could not be put back, in order.
        replaced: params in whose place the model has other values on other memory, or nothing: as in
            :meth:`Exchange.written`.
    """

    def __init__(self, exchange: Exchange, places: Sequence[Sequence[Tensor]]) -> None:
        self._exchange = exchange
        self._gone: set[int] = set()  # addresses of storages whose values were lost
        self._held = [self._tensor_on(index, view) for index, view in enumerate(exchange._views())]
        self._names = exchange._names()
        count = len(exchange.tensors) - exchange._num_planes
        #: Indices of buffers that the model has made anew: it keeps them.
        self._anew = {
            index
            for index, (held, now) in enumerate(zip(self._held[:count], places, strict=False))
            if exchange._is_copied_buffer(index) and not (now and all(are_alike(held, each) for each in now))
        }
        self.replaced: dict[str, str] = {}
        for index, (name, held, now) in enumerate(zip(self._names[:count], self._held, places, strict=False)):
            if exchange._is_copied_buffer(index):
                continue
            if not now:
                self.replaced[name] = REMOVED
            elif not self._is_gone(held) and not all(_is_cast_of(held, tensor) for tensor in now):
                self.replaced[name] = REPLACED
        self._pending: tuple[int, Tensor, Tensor] | None = None
        self._done = 0
        self.lost: dict[str, None] = {}

    def _tensor_on(self, index: int, view: tuple[Any, ...]) -> Tensor:
        """Return the tensor at this index as it was on the way there, on the memory that its storage has now."""
        exchange = self._exchange
        storage, (dtype, device, shape, strides, *_) = exchange._storages[index], view
        if 0 in shape:
            return torch.empty(shape, dtype=dtype, device=device)
        start = exchange._addresses[index] - exchange._origins[index]
        if make_room(storage, start, shape, strides, dtype):
            self._gone.add(storage.data_ptr())
        tensor = torch.empty(0, dtype=dtype, device=device)
        return tensor.set_(storage, start // dtype.itemsize, shape, strides)

    def back(self) -> None:
        """Put everything back into the memory that the exchange holds. If it is interrupted, call it again."""
        exchange = self._exchange
        count = len(exchange.tensors) - exchange._num_planes
        pairs = exchange._plan.pairs(exchange._params_in(self._held[:count]), self._held[count:])
        aside = set(exchange._aside)
        in_place = [pair for index, pair in enumerate(pairs) if index not in aside]
        for index in range(self._done, len(in_place)):
            pair = in_place[index]
            if self._pending is None or self._pending[0] != index:
                # Of what is gone, the other side's value takes the place: it is at least a model.
                own = (pair.param if self._is_gone(pair.average) else pair.average).clone()
                average = (pair.average if self._is_gone(pair.param) else pair.param).clone()
                self._pending = (index, own, average)
            pair.param.copy_(self._pending[1])
            pair.average.copy_(self._pending[2])
            self._done = index + 1
        for index, value in zip(exchange._aside, exchange._stash, strict=True):
            write_once(pairs[index].param, value)
        for index, pair in enumerate(pairs):
            in_danger = pair.planes if index in aside else (pair.param, *pair.planes[1:])
            if any(map(self._is_gone, in_danger)):
                self.lost[f"the average of {pair.name!r}"] = None
            if index not in aside and self._is_gone(pair.average):
                self.lost[repr(pair.name)] = None

    def give(self, places: Sequence[Sequence[Tensor]]) -> None:
        """Write the held values into the tensors that the exchange had and the modules have now, if on other memory."""
        listed = zip(self._names, self._held, self._exchange.tensors, places, strict=True)
        for index, (name, held, tensor_then, now) in enumerate(listed):
            if index in self._anew:
                now = []
            for tensor in {id(each): each for each in (tensor_then, *now)}.values():
                if tensor.is_meta or tensor.shape != held.shape:
                    self.lost[name] = None
                elif tensor.data_ptr() != held.data_ptr() or tensor.dtype != held.dtype:
                    start = int(tensor.storage_offset()) * tensor.itemsize
                    make_room(tensor.untyped_storage(), start, tensor.shape, tensor.stride(), tensor.dtype)
                    write_once(tensor, held)

    def _is_gone(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._gone


def _is_cast_of(held: Tensor, now: Tensor) -> bool:
    """Return whether a tensor is on the same memory or a copy, also one that was cast to a narrow dtype meanwhile."""
    if now.is_meta or now.shape != held.shape or now.data_ptr() == held.data_ptr():
        return True  # of another shape, it counts as lost
    value = now.detach().to(held.device)
    narrow = (torch.float32, torch.bfloat16, torch.float16) if held.is_floating_point() else ()
    casts = (held.to(dtype).to(now.dtype) for dtype in (held.dtype, *narrow))
    return any(torch.allclose(cast, value, rtol=0, atol=0, equal_nan=True) for cast in casts)
