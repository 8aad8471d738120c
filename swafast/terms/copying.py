"""Copies of tensors of every kind, also of those that no kernel takes: sparse, quantised, expanded, subclassed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..torch_private.core import has_own_dispatch
from .layout import extent


def is_plain(tensor: Tensor) -> bool:
    """Return whether a kernel can read and write a tensor, as one that it only copies."""
    return _has_strides(tensor) and not tensor.is_quantized and not overlaps_itself(tensor)


def overlaps_itself(tensor: Tensor) -> bool:
    """Return whether elements of a tensor share memory, as in an expanded one."""
    return _has_strides(tensor) and tensor.numel() > extent(tensor.shape, tensor.stride())


def _has_strides(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested and not has_own_dispatch(tensor)


def describe(tensor: Tensor) -> str:
    """Describe what must be alike in two tensors for one to be copied into the other."""
    if tensor.is_nested:
        return "a nested tensor"
    kind = f"{type(tensor).__name__} of " if has_own_dispatch(tensor) else ""
    layout = "" if tensor.layout == torch.strided else f" in {tensor.layout}"
    return f"{kind}{tensor.dtype} {tuple(tensor.shape)}{layout}"


def are_alike(first: object, second: object) -> bool:
    """Return whether both are tensors of one kind and shape, so that one can be copied into the other."""
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return False
    if _kind_of(first) != _kind_of(second) or first.is_quantized != second.is_quantized:
        return False
    if not first.is_nested and first.shape != second.shape:
        return False
    return first.dtype == second.dtype or (first.is_floating_point() and second.is_floating_point())


def _kind_of(tensor: Tensor) -> tuple[object, ...]:
    return tensor.layout, tensor.is_nested, type(tensor) if has_own_dispatch(tensor) else None, tensor.is_complex()


def duplicate(tensor: Tensor) -> Tensor:
    """Return a copy with memory of its own."""
    try:
        return tensor.detach().clone()
    except RuntimeError:  # quantised by channels with float zero points
        return copy.deepcopy(tensor.detach())


@torch.no_grad()
def write(tensor: Tensor, value: Tensor, *, non_blocking: bool = False) -> None:
    """Write a value into a tensor like it. Not through ``detach()``, which has indices and scales of its own."""
    once, value_once = without_expansion(tensor, tensor, value)
    try:
        once.copy_(value_once, non_blocking=non_blocking)
    except RuntimeError:  # copy_ wants as many elements in both, or one scheme of quantisation
        if once is not tensor:
            raise
        floating = tensor.is_floating_point()
        tensor.data = duplicate(value).to(tensor.device, tensor.dtype if floating else value.dtype)


def without_expansion(tensor: Tensor, *views: Tensor) -> list[Tensor]:
    """Return ``views`` of as many elements as ``tensor`` has in memory: its expanded dimensions have size 1 there."""
    found = list(views)
    if _has_strides(tensor):
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[dim] > 1:
                found = [view.narrow(dim, 0, 1) for view in found]
    return found
