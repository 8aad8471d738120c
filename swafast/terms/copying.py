"""Copies of tensors of every kind, also of those that no kernel takes: sparse, quantised, expanded, subclassed."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ..torch_private.core import has_own_dispatch
from .layout import extent


def is_plain(tensor: Tensor) -> bool:
    """Return whether a kernel can read a tensor, to copy it."""
    return _has_strides(tensor) and not tensor.is_quantized


def overlaps_itself(tensor: Tensor) -> bool:
    """Return whether elements of a tensor share memory, as in an expanded one."""
    return _has_strides(tensor) and tensor.numel() > extent(tensor.shape, tensor.stride())


def _has_strides(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested and not has_own_dispatch(tensor)


def describe_kind(tensor: Tensor) -> str:
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
    if _shape_of(first) != _shape_of(second):
        return False
    return first.dtype == second.dtype or (first.is_floating_point() and second.is_floating_point())


def _shape_of(tensor: Tensor) -> object:
    if tensor.is_nested and tensor.layout == torch.strided:
        return [each.shape for each in tensor.unbind()]
    return tensor.shape


def _kind_of(tensor: Tensor) -> tuple[object, ...]:
    return tensor.layout, tensor.is_nested, type(tensor) if has_own_dispatch(tensor) else None, tensor.is_complex()


_SPARSE_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values")),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values")),
}


def bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor: of a sparse one, of its values and their indices."""
    parts = [getattr(tensor.detach(), part)() for part in _SPARSE_PARTS.get(tensor.layout, ())]
    return sum(part.nbytes for part in parts) if parts else tensor.nbytes


def duplicate(tensor: Tensor) -> Tensor:
    """Return a copy with memory of its own."""
    try:
        return tensor.detach().clone()
    except RuntimeError:  # quantised by channels with float zero points
        return copy.deepcopy(tensor.detach())


@torch.no_grad()
def copy_into(tensor: Tensor, value: Tensor, *, non_blocking: bool = False) -> None:
    """Write a value into a tensor like it. Not through ``detach()``, which has indices and scales of its own."""
    try:
        tensor.copy_(value, non_blocking=non_blocking)
    except RuntimeError:  # copy_ wants one scheme of quantisation, or as many elements in both
        if tensor.is_quantized:
            tensor.data = duplicate(value).to(tensor.device)
        elif tensor.layout != torch.strided and not has_own_dispatch(tensor):
            tensor.resize_as_sparse_(value.to(tensor.device))
            tensor.copy_(value)
        else:
            raise


def write_once(tensor: Tensor, value: Tensor) -> None:
    """Write a value into a tensor with strides. Each element of an expanded one is written once."""
    once, value_once = without_expansion(tensor.detach(), tensor.detach(), value)
    once.copy_(value_once)


def without_expansion(tensor: Tensor, *views: Tensor) -> list[Tensor]:
    """Return ``views`` of as many elements as ``tensor`` has in memory: its expanded dimensions have size 1 there."""
    found = list(views)
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            found = [view.narrow(dim, 0, 1) for view in found]
    return found


def make_room(
    storage: torch.UntypedStorage, start: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
) -> bool:
    """Make a storage that was freed large enough for a tensor from byte ``start`` on. Return whether it was freed."""
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    needed = start + (last + 1) * dtype.itemsize if 0 not in shape else 0
    if storage.nbytes() >= needed:
        return False
    storage.resize_(needed)
    return True
