"""Frozen params that the averaged module has from the model: they are held once, and nothing of them is copied.

Such a param is an object of its own on the model's memory, so that a move or cast of one module leaves the other as it
is. It is lent for as long as it stands there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ..op.plan import Fingerprint
from ..terms.copying import are_alike, is_plain, overlaps_itself
from ..torch_private.core import storage_id
from ..torch_private.modules import loads_by_own_code, named_modules, named_tensors

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def lend(param: Tensor) -> Tensor | None:
    """Return a param on the memory of a frozen ``param``, of its class and with its attributes; None if it cannot."""
    if param.requires_grad or param.is_inference() or not _has_plain_memory(param):
        return None
    with suppress(Exception), torch.inference_mode(False):  # the class may have code of its own for copies
        lent = copy.copy(param)
        if type(lent) is type(param) and may_stay(lent, param):
            note(lent)
            return lent
    return None


class Mark:
    """Marks a param as lent by the storage that it had then, wherever that moves.

    A pickle does not tell whether the model is in it too, so what comes out of one counts as lent.
    """

    def __init__(self, storage: int | None = None) -> None:
        self.storage = storage

    def __reduce__(self) -> Any:
        return Mark, ()


def note(average: Tensor) -> None:
    """Take a param of the averaged module for lent, on the storage that it has now."""
    # An attribute, as torch does not exchange tensors that have weak references. Copies of a param drop it.
    average._lent = Mark(storage_id(average))  # type: ignore[attr-defined]


def is_lent(average: Tensor) -> bool:
    """Return whether a param of the averaged module still stands on the model's memory, or may do so."""
    mark = getattr(average, "_lent", None)
    return mark is not None and mark.storage in (None, storage_id(average))


@torch.inference_mode(False)
@torch.no_grad()
def part(average: Tensor) -> None:
    """Move a param to memory of its own if it is lent. Its values stay the same."""
    if is_lent(average):
        average.data = average.data.clone()
        del average._lent  # type: ignore[attr-defined]


def may_stay(average: Tensor, param: Tensor) -> bool:
    """Return whether the averaged module may go on with this param of the model: it is frozen, on the same memory."""
    if average is param or param.requires_grad:
        return False
    if average.is_meta and param.is_meta:  # there is nothing to copy
        return are_alike(average, param)
    if not (_has_plain_memory(average) and _has_plain_memory(param)):
        return False
    one, other = ((t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for t in (average, param))
    return one == other


def _has_plain_memory(tensor: Tensor) -> bool:
    # A copy of an expanded param has memory of its own for each element. The address is 0 on meta, if empty or freed.
    return is_plain(tensor) and not overlaps_itself(tensor) and tensor.data_ptr() != 0


Pick = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


class Loan:
    """The lent params of one plan, and all others that it leaves out because they are frozen.

    Args:
        names, params, averages: the params that the model lends, and those of the averaged module that stand on them.
        find_params, find_averages, find_frozen: pick these, and the frozen params of the model, from a walk's tensors.
    """

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        averages: Sequence[Tensor],
        find_params: Pick,
        find_averages: Pick,
        find_frozen: Pick,
    ) -> None:
        for average in averages:  # also those that were pickled together with the model
            note(average)
        self._names = names
        self._params, self._averages = Fingerprint(params), Fingerprint(averages)
        self._find_params, self._find_averages, self._find_frozen = find_params, find_averages, find_frozen

    def lent(self, theirs: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """Return names and tensors of what the model lends, from a walk of it."""
        return list(zip(self._names, self._find_params(theirs), strict=True))

    def stands(self, theirs: Sequence[Tensor], own: Sequence[Tensor]) -> bool:
        """Return whether all are still frozen, and on the memory that they had, going by the tensors of both walks."""
        if not are_frozen(self._find_frozen(theirs)):
            return False
        return self._params.fits(self._find_params(theirs)) and self._averages.fits(self._find_averages(own))

    def tensors(self, theirs: Sequence[Tensor], own: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return what is frozen, and what must keep its memory, going by the tensors of both walks."""
        return self._find_frozen(theirs), (*self._find_params(theirs), *self._find_averages(own))


_requires_grad = attrgetter("requires_grad")


def are_frozen(params: Sequence[Tensor]) -> bool:
    return not any(map(_requires_grad, params))


def part_before_load(module: Module, state: dict[str, object], prefix: str) -> None:
    """Part the params of an averaged ``module`` into which torch's loader may write other values than they have.

    Args:
        prefix: the prefix of its keys in ``state``.
    """
    lent = [(name, average) for name, average in named_tensors(module) if hasattr(average, "_lent")]
    coded = [each for _, each in named_modules(module, distinct=True) if loads_by_own_code(each)] if lent else []
    unsure = {id(tensor) for each in coded for _, tensor in named_tensors(each)}
    for name, average in lent:
        source = state.get(f"{prefix}{name}", average)
        if id(average) in unsure or not (isinstance(source, Tensor) and has_bits_of(average, source)):
            part(average)


def lend_from_state(module: Module, frozen: Collection[int], state: dict[str, object], prefix: str) -> None:
    """Have a state that is to be assigned lend the frozen params of an averaged ``module``, given by id."""
    for name, average in named_tensors(module):
        source = state.get(f"{prefix}{name}")
        if id(average) in frozen and isinstance(source, Tensor) and _has_plain_memory(source) and source is not average:
            state[f"{prefix}{name}"] = lent = Parameter(source.detach(), requires_grad=False)
            note(lent)


def without_lent(writes: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Leave those writes out that would write into lent params what is there. Part the params of the others."""
    kept = []
    for tensor, source in writes:
        if hasattr(tensor, "_lent"):
            if has_bits_of(tensor, source):
                continue
            part(tensor)
        kept.append((tensor, source))
    return kept


def has_bits_of(average: Tensor, source: Tensor) -> bool:
    """Return whether a copy of ``source`` would change no bit of a lent param. This may wait for a GPU."""
    if source.data_ptr() == average.data_ptr() and source.dtype == average.dtype:
        return True
    integers = _INTEGERS.get(average.itemsize)
    if integers is None or source.is_meta or source.layout != torch.strided or source.shape != average.shape:
        return False
    cast = source.detach().to(average.device, average.dtype)
    return torch.equal(cast.view(integers), average.detach().view(integers))
