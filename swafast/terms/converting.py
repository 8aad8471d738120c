"""Planes are written: a few at once, and averages from one format into another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .copying import copy_into
from .formats import FLOAT32, OWN, Format
from .layout import windows

#: The average at full precision is plane 0 itself.
_PLAIN = (None, FLOAT32, OWN)


def write_all(writes: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy into the first tensor of each pair the second one. An interrupt is raised after the last."""
    try:
        _write(writes)
    except BaseException:
        _write(writes)
        raise


def _write(writes: Sequence[tuple[Tensor, Tensor]]) -> None:
    # Not under no_grad: an interrupt on leaving it would leave it on.
    for tensor, source in writes:
        if tensor.layout != torch.strided or tensor.is_quantized:
            copy_into(tensor, source)
        else:
            tensor.detach().copy_(source.detach())


@torch.no_grad()
def convert(planes: Sequence[Tensor], fmt: Format | None, to: Sequence[Tensor | None], after: Format | None) -> None:
    """Write the average of ``planes`` into the planes ``to``, on any device, window by window to save memory.

    The spread is copied, if ``fmt`` has it too, and begins at 0 otherwise.

    Args:
        fmt: the format of ``planes``; None: the average is ``planes[0]``.
        to: the planes to write. Those that are None keep what they have.
        after: the format of ``to``; None: write ``to[0]`` alone, rounded once to its dtype.
    """
    if fmt in _PLAIN and after in _PLAIN and to[0] is not None and planes[0].device == to[0].device:
        to[0].detach().copy_(planes[0])  # torch casts without a temporary
        return
    if (after is not None and after.spread is not None) or (fmt is not None and fmt.spread is not None):
        _convert_with_spread(planes, fmt, to, after)
        return
    written = [index for index, plane in enumerate(to) if plane is not None]
    targets = [plane.detach() for plane in to if plane is not None]
    if planes[0].is_meta or targets[0].is_meta:
        return
    for window in windows((*(plane.detach() for plane in planes), *targets)):
        sources, parts = window[: len(planes)], window[len(planes) :]
        value = fmt.decode(sources) if fmt is not None else sources[0]
        if after is not None:
            value = value.to(after.value_dtype or value.dtype)
        fresh = after.encode(value) if after is not None else (value,)
        write_all([(part, fresh[index]) for index, part in zip(written, parts, strict=True)])


def _convert_with_spread(
    planes: Sequence[Tensor], fmt: Format | None, to: Sequence[Tensor | None], after: Format | None
) -> None:
    if after is not None:
        known = {} if fmt is None else dict(zip(fmt.further, planes[1:], strict=False))
        named = {name: plane for (name, _), plane in known.items()}
        for (name, _), plane in zip(after.spread_planes, to[after.num_planes :], strict=False):
            if plane is not None and not plane.is_meta:
                plane.detach().copy_(named[name].detach()) if name in named else plane.detach().zero_()
        to, after = to[: after.num_planes], after.mean
    if fmt is not None:
        planes, fmt = planes[: fmt.num_planes], fmt.mean
    if any(plane is not None for plane in to):
        convert(planes, fmt, to, after)


def full_precision(planes: Sequence[Tensor], fmt: Format | None) -> Tensor:
    """Return the average at full precision: plane 0 itself where it holds it, else a new tensor."""
    average = planes[0]
    if fmt is None or (fmt.num_planes == 1 and fmt.value_dtype in (None, average.dtype)):
        return average.detach()
    value = torch.empty_like(average.detach(), dtype=fmt.value_dtype)
    convert(planes, fmt, (value,), None)
    return value
