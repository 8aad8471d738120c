"""The copy of a model that becomes the averaged module, with averages in buckets and frozen params that are lent."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy

from ..op.buckets import PlaneLike, new_in_buckets
from ..terms.converting import convert
from ..terms.copying import duplicate, is_plain, overlaps_itself
from ..terms.formats import Format
from ..torch_private.core import has_own_dispatch
from ..torch_private.modules import named_tensors
from .accepting import find_uncopied
from .lending import lend
from .planes import put_planes


class ModelCopy:
    """Stands for a model where torch's class copies it deeply.

    Averages are copied into buckets, in the dtype in which they are stored: to cast and move them afterwards would take
    more memory. Params that are frozen and left out are lent by the model, if they keep their dtype and device.

    Args:
        params: the model's params by name.
        stored: the dtype of each in the averaged module, by name.
        left_out: the names of params that are not averaged.
        device: of the averaged module; None: the model's.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        model: Module,
        params: Mapping[str, Tensor],
        stored: Mapping[str, torch.dtype],
        left_out: Collection[str],
        device: int | str | torch.device | None,
    ) -> None:
        self._model = model
        self._copies: dict[int, Tensor] = {}  # by the id of the param
        self._averaged: dict[str, Tensor] = {}  # params whose averages are made here
        where = torch.empty(0, device=device).device if device is not None else None
        distinct: dict[int, tuple[str, Tensor]] = {}  # each under its first name
        for name, param in params.items():
            distinct.setdefault(id(param), (name, param))
        for name, param in distinct.values():
            if name in left_out:
                stays = stored[name] == param.dtype and where in (None, param.device)
                if stays and (lent := lend(param)) is not None:
                    self._copies[id(param)] = lent
            elif type(param) is Parameter and is_plain(param) and _has_fractions(param):
                self._averaged[name] = param
        likes = [_like(param, stored[name], where or param.device) for name, param in self._averaged.items()]
        averaged = list(self._averaged.values())
        for made in new_in_buckets(likes):
            for index, plane in made:
                param = averaged[index]
                self._copies[id(param)] = Parameter(plane.copy_(param), param.requires_grad)

    def __deepcopy__(self, memo: object) -> Module:
        copies: dict[int, Any] = {**_exotic_copies(self._model), **self._copies}
        try:
            made: Module = copy.deepcopy(self._model, copies)
        except Exception as error:
            found = find_uncopied(self._model)
            if found is None:
                raise
            raise ValueError(
                f"model must be one that copy.deepcopy can copy, got {found} ({error}): remove it while the average is "
                "made, or use swafast.ShardedAveragedModel(model), which copies no module and needs no process group"
            ) from error
        for _, param in named_tensors(made):
            if not param.is_leaf:  # those of a scripted module, which would keep the model's alive
                param.detach_().requires_grad_()
        return made

    @torch.inference_mode(False)
    @torch.no_grad()
    def make_further_planes(self, owner: Module, averages: Iterable[tuple[str, Tensor, Format | None]]) -> None:
        """Make the further planes of the averages of ``owner``, from the model's params at full precision."""
        extended = [
            (name, average, fmt) for name, average, fmt in averages if fmt is not None and name in self._averaged
        ]
        likes = [_like(average, dtype, average.device) for _, average, fmt in extended for _, dtype in fmt.further]
        planes = dict(made for bucket in new_in_buckets(likes) for made in bucket)
        index = 0
        for name, average, fmt in extended:
            extra = [planes[index + further] for further in range(len(fmt.further))]
            index += len(extra)
            param = self._averaged[name]
            if extra or average.dtype != param.dtype:
                convert((param,), None, (average if average.dtype != param.dtype else None, *extra), fmt)
                put_planes(owner, name, fmt, extra)


def _exotic_copies(model: Module) -> dict[int, Tensor]:
    """Return copies, by id, of the tensors of which a copy needs memory of its own, or which torch cannot all copy."""
    copies: dict[int, Tensor] = {}
    for _, tensor in (*named_tensors(model), *named_tensors(model, buffers=True)):
        if not (is_lazy(tensor) or has_own_dispatch(tensor)) and (not is_plain(tensor) or overlaps_itself(tensor)):
            copied = duplicate(tensor)
            is_param = isinstance(tensor, Parameter)
            copies[id(tensor)] = Parameter(copied, tensor.requires_grad) if is_param else copied
    return copies


def _has_fractions(param: Tensor) -> bool:
    return param.is_floating_point() or param.is_complex()


def _like(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> PlaneLike:
    stride = torch.empty_like(tensor.detach(), device="meta").stride()  # the tensor's own, without gaps
    return PlaneLike(tensor.shape, stride, dtype, device)
