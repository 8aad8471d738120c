"""Copied buffers that follow the model's: to another shape, to a tensor where there was none, and back to None."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from ..terms.copying import are_alike, duplicate, overlaps_itself
from ..terms.formats import Format
from ..terms.names import canonical, unwrap
from ..torch_private.modules import named_modules, own_buffers, passing_buffers, put_tensor

#: Takes an average's name, its tensor and whether it is a buffer. Returns its format, or None if it is copied.
FormatOf = Callable[[str, Tensor, bool], Format | None]


def _modules(module: Module) -> dict[str, Module]:
    return {canonical(name): each for name, each in named_modules(unwrap(module))}


def _buffers(module: Module) -> dict[str, Tensor | None]:
    """Return a model's buffers by name, also those that are None."""
    each = (
        (f"{prefix}.{name}".lstrip("."), buffer)
        for prefix, module in _modules(module).items()
        for name, buffer in own_buffers(module).items()
    )
    return dict(each)


def made_anew(
    averaged: Module, model: Module, format_of: FormatOf, device: torch.device | None
) -> dict[str, Tensor | None]:
    """Return, by name, the copied buffers of an averaged module that must be made anew, since the model's have been.

    They are copies of the model's with memory of their own for each element, or None where the model has none now.

    Args:
        device: of those that replace none; None: that of the model's.
    """
    own, modules = _buffers(averaged), _modules(averaged)
    anew: dict[str, Tensor | None] = {}
    copies: dict[int, Tensor] = {}  # by the id of the model's, since tied buffers stay tied
    for name, theirs in _buffers(model).items():
        before = own.get(name)
        example = before if before is not None else theirs
        if example is None or is_lazy(example) or format_of(name, example, True) is not None:
            continue
        if theirs is None:
            anew[name] = None
        elif not _can_stay(before, theirs) and name.rpartition(".")[0] in modules:
            if id(theirs) not in copies:
                copies[id(theirs)] = _copy_for(before, theirs, device)
            anew[name] = copies[id(theirs)]
    return anew


def _can_stay(before: Tensor | None, theirs: Tensor) -> bool:
    """Return whether the model's buffer can be copied into the one that there is, or has no values."""
    if before is None or is_lazy(theirs) or theirs.is_meta:
        return before is not None
    return are_alike(before, theirs) and not overlaps_itself(before)


def _copy_for(before: Tensor | None, theirs: Tensor, device: torch.device | None) -> Tensor:
    copied = duplicate(theirs)
    if before is None:
        return copied if device is None else copied.to(device)
    both_floating = before.is_floating_point() and copied.is_floating_point()
    return copied.to(before.device, before.dtype if both_floating else copied.dtype)


def put_buffers(averaged: Module, model: Module, anew: Mapping[str, Tensor | None]) -> None:
    """Put buffers into an averaged module. One that the model has registered since is registered there too."""
    if not anew:
        return
    own, theirs = _modules(averaged), _modules(model)
    for name, tensor in anew.items():
        prefix, _, leaf = name.rpartition(".")
        put_tensor(own[prefix], own_buffers(own[prefix]), leaf, tensor)
        passing = leaf in passing_buffers(theirs[prefix])
        (passing_buffers(own[prefix]).add if passing else passing_buffers(own[prefix]).discard)(leaf)
