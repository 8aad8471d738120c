"""A plan: pairs of params and averages, the buckets in which the averages lie, and the launches of an update.

It is made before the first update and kept while it fits. Before each update, the host compares the tensors of both
sides with those that the plan was made for, without waiting for a device.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version

from ..backends.contract import Backend, ExchangeLaunch, Pair, ReduceFlag, Update
from ..terms.capturing import refuse_capture
from ..terms.converting import convert
from ..terms.copying import write_once
from ..terms.rules import Rule, checked_weight, terms_of
from ..terms.weight import KernelTerms
from ..torch_private.core import make_metadata_check
from . import launches
from .buckets import home_averages
from .checks import check_writable
from .copies import Copies
from .tree_check import tell

_warned: set[str] = set()


def bump_versions(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that ``tensors`` are written. Otherwise a gradient may be wrong without an error."""
    if tell(tensors):  # a quarter of what the public call takes: `python -m bench host`
        return
    try:
        increment_version(tensors)
    except RuntimeError:  # a tensor made under inference_mode: it has no version, and autograd never saves it
        for tensor in tensors:
            with contextlib.suppress(RuntimeError):
                increment_version(tensor)


class Fingerprint:
    """Addresses, dtypes, devices, shapes and strides of tensors, to see later whether a plan still fits."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.addresses = list(map(Tensor.data_ptr, tensors))
        #: dtype, device, shape, strides, and whether it is a negative and a conjugate view, of each tensor.
        self.views = _views_of(tensors)
        self._quick: Callable[..., bool] | None = make_metadata_check(tensors)

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these tensors have the same memory and the same view of it.

        They may be other objects, since freed addresses are used again. That is safe: a launch depends on addresses,
        dtypes, shapes and strides only.
        """
        try:
            if list(map(Tensor.data_ptr, tensors)) != self.addresses:
                return False
        except (TypeError, RuntimeError, ValueError):
            return False  # None, or a tensor without memory of its own: a new plan raises an error that names it
        if self._quick is not None and self._quick(*tensors):
            return True
        if _views_of(tensors) != self.views:
            return False
        self._quick = make_metadata_check(tensors)  # it also compares what does not matter here, such as requires_grad
        return True


def _views_of(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(t.dtype, t.device, t.shape, t.stride(), t.is_neg(), t.is_conj()) for t in tensors]


class Launches:
    """The work of an update: pairs prepared for their backends."""

    #: What torch copies besides, if there is any.
    copies: Copies | None = None

    def __init__(self, pairs: Sequence[Pair], backends: Sequence[Backend], counters: Sequence[Tensor]) -> None:
        self._counters = tuple(counters)
        self.chosen = backends
        self._work = launches.prepare(pairs, backends)
        used = (*(tensor for pair in pairs for tensor in (pair.param, *pair.planes)), *counters)
        self._devices = frozenset(tensor.device for tensor in used)
        is_on_gpu = any(device.type == "cuda" for device in self._devices)
        self._waits_for_gpu = is_on_gpu and any(work.is_on_host for work in self._work)
        #: What the last update was asked for, and the updates of the work for it. An interrupt cannot part the two.
        self._described: tuple[object, list[Update]] = (None, [])
        self._kept: tuple[Tensor, ...] = ()

    @property
    def backends(self) -> list[str]:
        """The names of the backends that work in an update, in the order of their launches."""
        return [work.backend.name for work in self._work if work.backend is not None]

    @property
    def indices_by_backend(self) -> dict[str, tuple[int, ...]]:
        """The indices of the pairs that each backend updates, in the order of its launches."""
        return {work.backend.name: work.indices for work in self._work if work.backend is not None}

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph holds an update of these launches: they must then live as long as the averages."""
        return any(work.launch.captured for work in self._work)

    @property
    def goes_by_address(self) -> bool:
        """Whether all launches use addresses, and none keeps a tensor."""
        return not any(work.takes_tensors for work in self._work)

    def memory(self, params: Sequence[Tensor], planes: Sequence[Tensor]) -> list[object]:
        """Return all that an update of these tensors uses, since a launch has only addresses: hold it until it ends."""
        return [self, *map(Tensor.untyped_storage, (*params, *planes, *self._counters))]

    def update(
        self,
        params: Sequence[Tensor],
        planes: Sequence[Tensor],
        rules: Sequence[Rule],
        *,
        skip_nonfinite: bool = False,
        reduce_flag: ReduceFlag | None = None,
    ) -> None:
        """Run one update and count it. ``rules`` has the rule of each counter.

        With ``skip_nonfinite``, neither happens if a param that is averaged holds a NaN or an infinity. With
        ``reduce_flag``, which sets a flag on all ranks if it is set on one, all ranks skip together.
        """
        terms = []
        for rule, counter in zip(rules, self._counters, strict=True):
            known = terms_of(rule)
            terms.append(known if known is not None else _work_out(rule, counter))
        if self._waits_for_gpu:
            self._refuse_capture("an update of which a part runs on the host")
        asked, updates = self._described
        if (terms, skip_nonfinite, reduce_flag) != asked:
            updates = self._describe(tuple(terms), skip_nonfinite, reduce_flag)
            self._described = (terms, skip_nonfinite, reduce_flag), updates
        counted: list[int] | None = None
        if self.copies is not None:
            self._refuse_capture("an update of a model with tensors that torch copies,")
            counted = self._counts() if skip_nonfinite else None  # the only way to learn of a skip: this may wait
        several = len(self._work) > 1  # if one backend finds a NaN, all must skip
        if skip_nonfinite and several:
            self._refuse_capture("nonfinite='skip' with several backends, which waits for the device,")
            if updates[-1].is_skipped(self._first_nonfinite(params) is not None):
                return
        if self.copies is not None and counted is None:
            self.copies.update()  # before the launch, since it may raise
        # Bump before the launch. After a large update, the tensors' metadata is no longer in the caches (0.3 ms for
        # 2000 of 64x64). Autograd must also know of the writes of a launch that is interrupted.
        bump_versions(planes)
        bump_versions(self._counters)
        captured = False
        for work, update in zip(self._work, updates, strict=True):
            work.launch.update(self._pick(work, params) if work.takes_tensors else (), update)
            captured |= work.launch.captured
        if self.copies is not None and counted is not None and counted != self._counts():
            self.copies.update()
        if captured and not self._kept:
            # Each replay of the graph reads and writes this memory, even if the modules have other tensors by then.
            self._kept = tuple(tensor.detach() for tensor in (*params, *planes, *self._counters))

    def _refuse_capture(self, action: str) -> None:
        for device in self._devices:
            refuse_capture(device, action)

    def _counts(self) -> list[int]:
        return list(map(int, self._counters))

    def _describe(self, terms: tuple[KernelTerms, ...], skip: bool, reduce_flag: ReduceFlag | None) -> list[Update]:
        """Return the update of each work. The last one counts. Only a work without others looks for NaNs itself."""
        return [
            Update(terms, self._counters, int(work is self._work[-1]), skip and len(self._work) == 1, reduce_flag)
            for work in self._work
        ]

    def _first_nonfinite(self, params: Sequence[Tensor]) -> int | None:
        """Read the params once, and return the index of one that holds a NaN or an infinity, else None."""
        for work in self._work:
            index = work.launch.first_nonfinite(self._pick(work, params))
            if index is not None:
                return work.indices[index]
        return None

    def _pick(self, work: launches.Work, params: Sequence[Tensor]) -> Sequence[Tensor]:
        return [params[i] for i in work.indices] if work.takes_tensors else ()


def _work_out(rule: Rule, num_averaged: Tensor) -> KernelTerms:
    """Compute the weight of a rule without kernel terms, once and before anything is written, since it may raise."""
    if num_averaged.device.type == "cuda":
        refuse_capture(num_averaged.device, f"{type(rule).__name__}, which computes its weight in Python,")
        what = f"{type(rule).__name__} has no kernel_terms"
        if what not in _warned:
            _warned.add(what)
            why = "so each update waits for the GPU to read n_averaged"
            warnings.warn(f"swafast computes the weight in Python: {what}, {why}", RuntimeWarning, stacklevel=2)
    return KernelTerms.constant(checked_weight(rule, int(num_averaged)))


class Plan(Launches):
    """Pairs with their averages in buckets, and their launches. Valid while the tensors of both sides stay the same."""

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
        self.are_buffers = [pair.is_buffer for pair in pairs]
        #: Addresses of all that an update writes: averages, copied tensors and counters.
        self.writes = frozenset(
            tensor.data_ptr() for tensor in (*(p for pair in pairs for p in pair.planes), *counters)
        )
        self._params = Fingerprint([pair.param for pair in pairs])
        self._written = Fingerprint([*(plane for pair in pairs for plane in pair.planes), *counters])
        self._exchange: tuple[list[ExchangeLaunch], list[int]] | None = None
        #: The seed of the last sample that was drawn, and its work.
        self.drawn: tuple[int, list[launches.Work]] | None = None
        #: Whether it fits no tensors any more: its launches were left in a state that only they know.
        self.is_retired = False
        super().__init__(pairs, backends, counters)

    def fits(self, params: Sequence[Tensor], planes: Sequence[Tensor], counters: Sequence[Tensor]) -> bool:
        return not self.is_retired and self._params.fits(params) and self._written.fits((*planes, *counters))

    @property
    def param_views(self) -> list[tuple[Any, ...]]:
        """The views of the params that it was made for, as in :class:`Fingerprint`."""
        return self._params.views

    @property
    def plane_views(self) -> list[tuple[Any, ...]]:
        return self._written.views[: len(self._written.views) - len(self._counters)]

    def pairs(self, params: Sequence[Tensor], planes: Sequence[Tensor]) -> list[Pair]:
        """Return the pairs of these tensors, which :meth:`fits` has just compared."""
        return [*self._each_pair(params, planes)]

    def _each_pair(self, params: Sequence[Tensor], planes: Sequence[Tensor]) -> Iterable[Pair]:
        """Return the same, one after the other: as many objects at once would have Python look for garbage."""
        rest = iter(planes)
        counts = [1 + len(fmt.further) if fmt is not None else 1 for fmt in self.formats]
        each = zip(self.names, params, counts, self.formats, self.are_buffers, strict=True)
        return (
            Pair(name, param, tuple(islice(rest, count)), fmt, is_buffer=is_buffer)
            for name, param, count, fmt, is_buffer in each
        )

    def writable_pairs(self, params: Sequence[Tensor], planes: Sequence[Tensor]) -> list[Pair]:
        """Return the pairs of these tensors if all params can be written.

        Raises:
            ValueError: elements of a param share memory, so it cannot take an average; the message names it.
        """
        pairs = self.pairs(params, planes)
        check_writable(pairs)
        return pairs

    def copy_to(self, pairs: Sequence[Pair]) -> None:
        """Write all averages into their params, each rounded once, and all that is copied."""
        for pair in pairs:
            if pair.format is None:
                write_once(pair.param, pair.average)
            else:
                convert(pair.planes, pair.format, (pair.param,), None)
        if self.copies is not None:
            self.copies.copy_to()

    def exchange(self, params: Sequence[Tensor], planes: Sequence[Tensor]) -> tuple[list[ExchangeLaunch], list[int]]:
        """Return the launches that exchange params and averages, and the indices of the pairs that none exchanges.

        They are prepared on the first call and kept, since the plan fits only tensors at the same addresses.

        Raises:
            ValueError: elements of a param share memory, so it cannot take an average; the message names it.
            RuntimeError: a CUDA graph is being captured.
        """
        self._refuse_capture("swapped_into")
        if self._exchange is None:
            each_pair = partial(self._each_pair, params, planes)
            may_expand = not all(map(Tensor.is_contiguous, params))
            if may_expand:
                check_writable(each_pair())
            spread = any(fmt is not None and fmt.spread is not None for fmt in self.formats)
            self._exchange = launches.prepare_exchange(
                each_pair, self.chosen, self._work, may_expand=may_expand, has_spread=spread
            )
        return self._exchange

    def first_nonfinite(self, params: Sequence[Tensor]) -> str | None:
        """Return the name of a param that holds a NaN or an infinity, else None."""
        self._refuse_capture("nonfinite='raise', which waits for the device,")
        index = self._first_nonfinite(params)
        return None if index is None else self.names[index]

    def refuse_nonfinite(self, params: Sequence[Tensor]) -> None:
        """Raise ValueError if a param holds a NaN or an infinity; the message names it."""
        name = self.first_nonfinite(params)
        if name is not None:
            raise ValueError(f"{name!r} must be finite, got a NaN or an infinity; the average has not changed")
