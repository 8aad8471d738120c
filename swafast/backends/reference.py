"""The definition of right, in plain torch: any device, dtype and layout, one tensor at a time.

It reads ``num_averaged`` on the host, so on a GPU each update waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..rules import Rule, checked_weight
from . import Pair

name = "reference"

#: Elements worked on at a time where a dtype has to be converted. On a CPU, so that an update allocates under 1 MB:
#: `exact` makes 64 bytes of temporaries an element. A launch on a GPU must be worth its 5 us.
_CPU_WINDOW_NUMEL = 8 * 2**10
_GPU_WINDOW_NUMEL = 4 * 2**20


def unavailable() -> str | None:
    return None


def serves(pair: Pair) -> bool:
    return True


def prepare(pairs: Sequence[Pair]) -> ReferenceLaunch:
    return ReferenceLaunch(pairs)


class ReferenceLaunch:
    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._planes = [tuple(plane.detach() for plane in pair.planes) for pair in pairs]
        self._formats = [pair.format for pair in pairs]

    @torch.no_grad()
    def update(self, params: Sequence[Tensor], rule: Rule, num_averaged: Tensor, advance: int) -> None:
        n = int(num_averaged)
        if n < 0:
            raise ValueError(f"n_averaged must be >= 0, got {n}")
        weight = checked_weight(rule, n)
        for param, planes, fmt in zip(params, self._planes, self._formats, strict=True):
            if fmt is None:
                planes[0].copy_(param.detach())
                continue
            if not fmt.extra and planes[0].dtype == param.dtype and planes[0].device == param.device:
                _move_(planes[0], param.detach(), weight)
                continue
            for piece, *plane_pieces in windows((param.detach(), *planes)):
                value = fmt.decode(tuple(plane_pieces))
                newest = piece.to(device=value.device, dtype=value.dtype)
                moved = _move_(value.clone(), newest, weight)
                for plane, new in zip(plane_pieces, fmt.encode(moved), strict=True):
                    plane.copy_(new)
        num_averaged.add_(advance)

    @torch.no_grad()
    def first_nonfinite(self, params: Sequence[Tensor]) -> int | None:
        for index, (param, fmt) in enumerate(zip(params, self._formats, strict=True)):
            if fmt is not None and not bool(torch.isfinite(param.detach()).all()):
                return index
        return None


def _move_(average: Tensor, param: Tensor, weight: float) -> Tensor:
    """``average += weight * (param - average)`` in place, as torch.lerp rounds it; at weight 1 an exact copy."""
    if average.dtype not in (torch.float64, torch.complex128):
        weight = torch.tensor(weight, dtype=torch.float32).item()
    return average.copy_(param) if weight == 1.0 else average.lerp_(param, weight)


def windows(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape alike, along their longest dimension, until a piece is at most a window."""
    first = tensors[0]
    window = _CPU_WINDOW_NUMEL if first.device.type == "cpu" else _GPU_WINDOW_NUMEL
    if first.numel() <= window:
        yield tensors
        return
    dim = max(range(first.dim()), key=first.size)
    size = max(1, first.size(dim) // -(-first.numel() // window))
    for start in range(0, first.size(dim), size):
        length = min(size, first.size(dim) - start)
        yield from windows(tuple(tensor.narrow(dim, start, length) for tensor in tensors))
