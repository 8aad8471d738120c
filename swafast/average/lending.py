"""Frozen params that the averaged module has from the model: they are held once, and nothing of them is copied.

Such a param is an object of its own on the model's memory, so that a move or cast of one module leaves the other as it
is. It is lent for as long as it stands there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from operator import attrgetter

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.weak import WeakTensorKeyDictionary

from ..op.plan import Fingerprint
from ..torch_private.core import has_own_dispatch
from ..torch_private.modules import loads_by_own_code, named_modules, named_tensors

#: The address at which each param was lent.
_lent = WeakTensorKeyDictionary()

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def lend(param: Tensor) -> Tensor | None:
    """Return a param on the memory of a frozen ``param``, of its class and with its attributes; None if it cannot."""
    if param.requires_grad or param.is_meta or param.is_inference() or has_own_dispatch(param):
        return None
    if param.layout != torch.strided or param.numel() == 0:
        return None
    with suppress(Exception), torch.inference_mode(False):  # the class may have code of its own for copies
        lent = copy.copy(param)
        if type(lent) is type(param) and _stands_on(lent, param):
            note(lent)
            return lent
    return None


def note(average: Tensor) -> None:
    """Take a param of the averaged module for lent, where it stands now."""
    _lent[average] = average.data_ptr()


def is_lent(average: Tensor) -> bool:
    """Return whether a param of the averaged module still stands on the model's memory."""
    address = _lent.get(average)
    return address is not None and address == average.data_ptr()


@torch.inference_mode(False)
@torch.no_grad()
def part(average: Tensor) -> None:
    """Move a lent param to memory of its own, with the same values."""
    average.data = average.data.clone()


def part_all(averages: Iterable[Tensor]) -> None:
    """Part those of these params that are lent."""
    for average in averages:
        if is_lent(average):
            part(average)


def may_stay(average: Tensor, param: Tensor) -> bool:
    """Return whether the averaged module may go on with this param of the model: it is frozen, on the same memory."""
    return not param.requires_grad and average is not param and _stands_on(average, param)


def _stands_on(average: Tensor, param: Tensor) -> bool:
    if has_own_dispatch(param) or has_own_dispatch(average) or param.layout != average.layout:
        return False
    views = [
        (tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()) for tensor in (average, param)
    ]
    return views[0] == views[1]


class Loan:
    """The lent params of one plan.

    Args:
        params, averages: the params of the model, and those of the averaged module that stand on them.
        find_params, find_averages: pick them from the tensors of a walk.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        averages: Sequence[Tensor],
        find_params: Callable[[Sequence[Tensor]], tuple[Tensor, ...]],
        find_averages: Callable[[Sequence[Tensor]], tuple[Tensor, ...]],
    ) -> None:
        self._params, self._averages = Fingerprint(params), Fingerprint(averages)
        self._find_params, self._find_averages = find_params, find_averages

    def stands(self, theirs: Sequence[Tensor], own: Sequence[Tensor]) -> bool:
        """Return whether all are still frozen and stand on one memory, going by the tensors of both walks."""
        params = self._find_params(theirs)
        if not self._params.fits(params) or not self._averages.fits(self._find_averages(own)):
            return False
        return not any(map(_requires_grad, params))


_requires_grad = attrgetter("requires_grad")


def part_before_load(module: Module, state: dict[str, object], prefix: str) -> None:
    """Part the params of an averaged ``module`` into which torch's loader may write other values than they have.

    Args:
        prefix: the prefix of its keys in ``state``.
    """
    if not _lent:
        return
    coded = [each for _, each in named_modules(module, distinct=True) if loads_by_own_code(each)]
    unsure = {id(tensor) for each in coded for _, tensor in named_tensors(each)}
    for name, average in named_tensors(module):
        if is_lent(average):
            source = state.get(f"{prefix}{name}", average)
            if id(average) in unsure or not (isinstance(source, Tensor) and has_bits_of(average, source)):
                part(average)


def without_lent(writes: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Leave those writes out that would write into lent params what is there. Part the params of the others."""
    if not _lent:
        return list(writes)
    kept = []
    for tensor, source in writes:
        if is_lent(tensor):
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
