"""Layout of averages in buckets and of work in chunks: ints in, ints and dataclasses out, no tensor data touched.

``swafast/terms/__init__.py`` says what the words mean.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: A bucket is the most extra memory that a first update takes: 256 MiB of float32.
MAX_BUCKET_NUMEL = 64 * 2**20

#: Slots start on multiples of this: 64 bytes for the narrowest plane, so two threads never write one cache line.
SLOT_ALIGNMENT = 64

#: 128 KiB of float32; torch's own CPU kernels take 32768 elements for a grain of work as well.
CPU_CHUNK_NUMEL = 32 * 2**10

#: On a GPU a chunk is as long as still gives every block about this many, so that none has much left when the others
#: are done; within bounds: one tile of a float32 block, and what makes the table a thousandth of the averages.
GPU_CHUNKS_PER_BLOCK = 16
GPU_CHUNK_NUMELS = (4 * 2**10, 64 * 2**10)


@dataclass(frozen=True)
class Slot:
    """Where one plane stands."""

    index: int  # of the plane, in the list that was laid out
    offset: int  # elements from the start of the bucket
    numel: int


@dataclass
class Bucket:
    """One allocation and what stands in it."""

    key: Hashable  # what its planes have in common: (device, dtype)
    numel: int = 0
    slots: list[Slot] = field(default_factory=list)


def lay_out(
    numels: Sequence[int],
    keys: Sequence[Hashable],
    *,
    max_numel: int = MAX_BUCKET_NUMEL,
    alignment: int = SLOT_ALIGNMENT,
) -> list[Bucket]:
    """Put planes into buckets, in their order; one larger than ``max_numel`` has a bucket of its own."""
    buckets: list[Bucket] = []
    last: dict[Hashable, Bucket] = {}
    for index, (numel, key) in enumerate(zip(numels, keys, strict=True)):
        bucket = last.get(key)
        offset = -(-bucket.numel // alignment) * alignment if bucket is not None else 0
        if bucket is None or offset + numel > max_numel:
            offset, bucket = 0, Bucket(key)
            last[key] = bucket
            buckets.append(bucket)
        bucket.slots.append(Slot(index, offset, numel))
        bucket.numel = offset + numel
    return buckets


def cut_chunks(runs: Tensor, chunk_numel: int) -> Tensor:
    """Cut runs into chunks: both (count, 5) int64 rows of (tensor, offset, numel, first index, stride of the index).

    An empty run has no chunk, and no chunk has indices with different upper halves. Worked out by torch, since
    Llama-3-8B has 245,000 chunks.
    """
    # The device is named throughout: the user's default device may be another, and the table is the host's.
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
    """Give a run for each tensor of these sizes, all of it, as :func:`cut_chunks` takes them."""
    sizes = torch.tensor(list(numels), dtype=torch.int64, device="cpu")
    zeros = torch.zeros_like(sizes)
    return torch.stack((torch.arange(len(sizes), device="cpu"), zeros, sizes, zeros, zeros + 1), dim=1)


def _cut_by_upper_half(runs: Tensor) -> Tensor:
    """Cut runs where the upper 32 bits of the index change: kernels count with the lower ones."""
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


def gpu_chunk_numel(num_elements: int, num_blocks: int) -> int:
    """Give the chunk size, a power of two, for this much work on a GPU that runs ``num_blocks`` blocks at once."""
    least, most = GPU_CHUNK_NUMELS
    wanted = num_elements // (num_blocks * GPU_CHUNKS_PER_BLOCK)
    return min(max(least, 1 << max(wanted, 1).bit_length() - 1), most)


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Say whether the elements fill one run of memory, in whatever order of dimensions, each once."""
    expected = 1
    for along, size in sorted((along, size) for along, size in zip(stride, shape, strict=True) if size != 1):
        if size == 0:
            return True
        if along != expected:
            return False
        expected *= size
    return True


def same_order(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Say whether two strides order the elements of ``shape`` alike; a dimension of size 1 has no say."""
    return all(x == y for size, x, y in zip(shape, a, b, strict=True) if size > 1)


def extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Give the number of elements from the first to the last one touched, both included."""
    if any(size == 0 for size in shape):
        return 0
    return 1 + sum((size - 1) * along for size, along in zip(shape, stride, strict=True))
