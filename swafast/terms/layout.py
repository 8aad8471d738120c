"""How averages are laid out in buckets and how work is cut into chunks and windows; no tensor data is touched."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: 256 MiB of float32, 512 of float64: the most extra memory that a first update takes.
MAX_BUCKET_NUMEL = 64 * 2**20

#: Slots start at multiples of this. Even int8 planes get 64 bytes, so no two threads write to one cache line.
SLOT_ALIGNMENT = 64

#: 128 KiB of float32. torch's own CPU kernels use the same grain size.
CPU_CHUNK_NUMEL = 32 * 2**10

#: A GPU block gets about this many chunks, so that all blocks finish at about the same time. The bounds of a chunk are
#: one tile of a float32 block, and a size at which the table takes less than a thousandth of the averages' memory.
GPU_CHUNKS_PER_BLOCK = 16
GPU_CHUNK_NUMELS = (4 * 2**10, 64 * 2**10)

#: Elements that are converted at a time: `exact` makes 32 bytes of temporaries an element. On a CPU, these stay in the
#: cache and torch in one thread: 5 to 12 ns an element on two busy cores, and 20 to 60 without windows. On a GPU, a
#: launch must be worth its 5 us.
CPU_WINDOW_NUMEL = 32 * 2**10
GPU_WINDOW_NUMEL = 4 * 2**20


@dataclass(frozen=True)
class Slot:
    """The place of one plane in its bucket."""

    index: int  # of the plane in the list passed to lay_out
    offset: int  # elements from the start of the bucket
    numel: int


@dataclass
class Bucket:
    """One allocation and the slots in it."""

    key: Hashable  # (device, dtype) of its planes
    numel: int = 0
    slots: list[Slot] = field(default_factory=list)


def lay_out(
    numels: Sequence[int],
    keys: Sequence[Hashable],
    *,
    pinned: Collection[Hashable] = (),
    max_numel: int = MAX_BUCKET_NUMEL,
    alignment: int = SLOT_ALIGNMENT,
) -> list[Bucket]:
    """Put planes with equal keys into buckets, in order. A plane larger than ``max_numel`` gets its own bucket.

    Buckets with one of the keys ``pinned`` are in pinned memory: see :func:`_lay_out_pinned`.
    """
    buckets: list[Bucket] = []
    last: dict[Hashable, Bucket] = {}
    for index, (numel, key) in enumerate(zip(numels, keys, strict=True)):
        if key in pinned:
            continue
        bucket = last.get(key)
        offset = -(-bucket.numel // alignment) * alignment if bucket is not None else 0
        if bucket is None or offset + numel > max_numel:
            offset, bucket = 0, Bucket(key)
            last[key] = bucket
            buckets.append(bucket)
        bucket.slots.append(Slot(index, offset, numel))
        bucket.numel = offset + numel
    for key in dict.fromkeys(key for key in keys if key in pinned):
        buckets += _lay_out_pinned({i: numels[i] for i, its_key in enumerate(keys) if its_key == key}, key, alignment)
    return buckets


def _lay_out_pinned(numels: Mapping[int, int], key: Hashable, alignment: int) -> list[Bucket]:
    """Put planes, numels by index, into buckets with powers of two of elements.

    torch rounds each allocation of pinned memory up to a power of two: one plane, or all, to up to twice the size. So
    take a bucket that the planes left over can fill, put in the largest first, and go on with those that do not fit.
    """
    aligned = {index: -(-numel // alignment) * alignment for index, numel in numels.items()}
    waiting = sorted(numels, key=lambda index: -numels[index])
    buckets: list[Bucket] = []
    while waiting:
        filled = 1 << max(1, sum(aligned[index] for index in waiting)).bit_length() - 1
        bucket = Bucket(key, max(filled, 1 << max(0, numels[waiting[0]] - 1).bit_length()))
        offset, later = 0, []
        for index in waiting:
            if offset + numels[index] <= bucket.numel:
                bucket.slots.append(Slot(index, offset, numels[index]))
                offset += aligned[index]
            else:
                later.append(index)
        buckets.append(bucket)
        waiting = later
    return buckets


def cut_chunks(runs: Tensor, chunk_numel: int) -> Tensor:
    """Cut runs into chunks: both are (count, 5) int64 rows of (tensor, offset, numel, first index, index stride).

    An empty run gives no chunk. Within a chunk, all indices have the same upper 32 bits. torch does the arithmetic, as
    Llama-3-8B has 245,000 chunks.
    """
    # Name the CPU everywhere: the user's default device may be another one.
    runs = _cut_by_upper_half(runs)
    sizes, starts, strides = runs[:, 2], runs[:, 3], runs[:, 4]
    counts = (sizes + (chunk_numel - 1)).div(chunk_numel, rounding_mode="floor")
    run = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), counts)
    first = torch.cumsum(counts, 0) - counts
    done = (torch.arange(len(run), device="cpu") - first[run]) * chunk_numel
    numel = torch.clamp(sizes[run] - done, max=chunk_numel)
    index = starts[run] + done * strides[run]
    return torch.stack((runs[run, 0], runs[run, 1] + done, numel, index, strides[run]), dim=1).contiguous()


def whole_runs(numels: Sequence[int]) -> Tensor:
    """Return one run for each whole tensor, (count, 5) int64 rows for :func:`cut_chunks`."""
    sizes = torch.tensor(list(numels), dtype=torch.int64, device="cpu")
    zeros = torch.zeros_like(sizes)
    return torch.stack((torch.arange(len(sizes), device="cpu"), zeros, sizes, zeros, zeros + 1), dim=1)


def _cut_by_upper_half(runs: Tensor) -> Tensor:
    """Cut runs where the upper 32 bits of the index change, since kernels count in the lower 32."""
    last = runs[:, 3] + (runs[:, 2].clamp(min=1) - 1) * runs[:, 4]
    crossing = (last >> 32) != (runs[:, 3] >> 32)
    if not bool(crossing.any()):
        return runs
    rows = []
    for tensor, offset, numel, index, stride in runs.tolist():
        while numel:
            until_next = -(-(((index >> 32) + 1 << 32) - index) // stride)
            count = min(numel, until_next)
            rows.append((tensor, offset, count, index, stride))
            offset, numel, index = offset + count, numel - count, index + count * stride
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def windows(tensors: tuple[Tensor, ...], cpu_numel: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape alike, along their longest dimension, into windows.

    Args:
        cpu_numel: the most elements of a window on a CPU; default: ``CPU_WINDOW_NUMEL``.
    """
    first = tensors[0]
    window = (cpu_numel or CPU_WINDOW_NUMEL) if first.device.type == "cpu" else GPU_WINDOW_NUMEL
    if first.numel() <= window:
        yield tensors
        return
    dim = max(range(first.dim()), key=first.size)
    size = max(1, first.size(dim) // -(-first.numel() // window))
    for start in range(0, first.size(dim), size):
        length = min(size, first.size(dim) - start)
        yield from windows(tuple(tensor.narrow(dim, start, length) for tensor in tensors), cpu_numel)


def gpu_chunk_numel(num_elements: int, num_blocks: int) -> int:
    """Return the chunk size, a power of two, for a launch over ``num_elements`` elements in ``num_blocks`` blocks."""
    least, most = GPU_CHUNK_NUMELS
    wanted = num_elements // (num_blocks * GPU_CHUNKS_PER_BLOCK)
    return min(max(least, 1 << max(wanted, 1).bit_length() - 1), most)


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Return whether the elements fill one run of memory, each once, in any order of dimensions."""
    expected = 1
    for along, size in sorted((along, size) for along, size in zip(stride, shape, strict=True) if size != 1):
        if size == 0:
            return True
        if along != expected:
            return False
        expected *= size
    return True


def same_order(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Return whether strides ``a`` and ``b`` are equal, ignoring dimensions of size 1 or 0."""
    return all(x == y for size, x, y in zip(shape, a, b, strict=True) if size > 1)


def extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return the number of elements in memory from the first to the last that a tensor touches, both included."""
    if any(size == 0 for size in shape):
        return 0
    return 1 + sum((size - 1) * along for size, along in zip(shape, stride, strict=True))
