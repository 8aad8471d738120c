"""Random bits for the formats that round at random.

The bits depend only on the seed, the param's name, the update, and the element's row-major index in the whole param. So
every backend draws the same bits, however a param is spread over ranks. ``csrc/random.h`` has the same functions for
the kernels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .boxes import Box

_MASK_64 = 2**64 - 1
_MASK_32 = 2**32 - 1


@dataclass(frozen=True)
class Draws:
    """All that the random bits of one average depend on, besides the update and the element."""

    random_key: int  # 64 bits, from the seed and the param's name
    shape: tuple[int, ...]  # of the whole param
    boxes: tuple[Box, ...] | None = None  # the boxes that a 1-D run is made of; None: the tensor is the whole param


def make_random_key(seed: int, name: str) -> int:
    """Return 64 bits that stand for ``seed`` and ``name`` in the draws."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")


def _mix(start: int, word: int) -> int:
    x = (start + word) & _MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)


def random_bits(key: int, num_averaged: int, index: Tensor) -> Tensor:
    """Return 32 random bits, as int64, for each element of ``index``: int64 row-major indices in the whole param.

    Use only the upper 16 bits. In 16 updates in a row they fall once into each sixteenth of their range, so most
    rounding errors cancel. With independent bits the error of an average is 1.4 times as large
    (``pytest tests/test_accuracy.py -k stratified``).
    """
    update = _mix(key, (((num_averaged >> 4) + 1) * 0x9E3779B97F4A7C15) & _MASK_64)
    turn = int(f"{num_averaged & 15:04b}"[::-1], 2) << 28
    bits = torch.empty_like(index)
    upper = index >> 32
    for half in upper.unique().tolist() if index.numel() else []:
        draw = _mix(update, half)
        x = (index & _MASK_32) ^ (draw & _MASK_32)
        # The product may overflow int64; its lower 32 bits are right all the same.
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK_32
        x = x ^ (draw >> 32)
        x = ((x ^ (x >> 15)) * 0x846CA68B + turn) & _MASK_32
        bits = torch.where(upper == half, x, bits)
    return bits


def box_views(draws: Draws, tensors: Sequence[Tensor]) -> Iterator[tuple[tuple[Tensor, ...], list[Tensor]]]:
    """Yield, for each box, the tensors' views of it and one addend of the index for each dimension.

    The index is the sum of the addends. They are expanded int64 tensors of the views' shape, which take little memory
    and can be cut like the views.
    """
    first = tensors[0]
    if draws.boxes is None or first.dim() != 1 or not draws.boxes:
        offsets = draws.boxes[0].offsets if draws.boxes else (0,) * first.dim()
        yield tuple(tensors), _index_addends(draws.shape, offsets, first.shape, first.device)
        return
    for box in draws.boxes:
        views = tuple(box.of_run(tensor) for tensor in tensors)
        yield views, _index_addends(draws.shape, box.offsets, box.sizes, first.device)


def _index_addends(
    shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], device: torch.device
) -> list[Tensor]:
    addends = [torch.zeros((), dtype=torch.int64, device=device).expand(tuple(sizes))]
    for dim, (offset, size, stride) in enumerate(zip(offsets, sizes, _row_major(shape), strict=True)):
        along = (torch.arange(size, device=device) + offset) * stride
        addends.append(along.view([size if d == dim else 1 for d in range(len(sizes))]).expand(tuple(sizes)))
    return addends


def runs_of(draws: Draws, stride: Sequence[int]) -> Tensor:
    """Return the runs of memory in which the index has one stride: (num_runs, 4) int64, on the CPU.

    A row is (offset in memory, numel, first index, index stride).

    Args:
        stride: the stride of the whole tensor, dense, in any order; used only if ``draws`` has no boxes.
    """
    if draws.boxes is None:
        order = tuple(sorted(range(len(draws.shape)), key=lambda dim: (-stride[dim], dim)))
        boxes: Sequence[Box] = (Box((0,) * len(draws.shape), draws.shape, 0, order),)
    else:
        boxes = draws.boxes
    rows = [_runs_of_box(box, _row_major(draws.shape)) for box in boxes]
    return torch.cat(rows) if rows else torch.empty(0, 4, dtype=torch.int64, device="cpu")


def _runs_of_box(box: Box, index_stride: Sequence[int]) -> Tensor:
    dims = [dim for dim in box.order if box.sizes[dim] != 1]
    numel, along = 1, 1
    # Join dimensions from the fastest one on, while the index goes on with the same stride.
    while dims and (numel == 1 or index_stride[dims[-1]] == numel * along):
        dim = dims.pop()
        if numel == 1:
            along = index_stride[dim]
        numel *= box.sizes[dim]
    first = torch.tensor(sum(o * s for o, s in zip(box.offsets, index_stride, strict=True)), device="cpu")
    for dim in dims:
        first = first.unsqueeze(-1) + torch.arange(box.sizes[dim], device="cpu") * index_stride[dim]
    first = first.reshape(-1)
    offset = box.start + torch.arange(len(first), device="cpu") * numel
    rest = torch.tensor([numel, along], device="cpu").expand(len(first), 2)
    runs = torch.cat((offset[:, None], rest[:, :1], first[:, None], rest[:, 1:]), dim=1)
    return runs if numel else runs[:0]


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
