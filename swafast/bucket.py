"""Layout of averages in buckets and of work in chunks: ints in, ints and dataclasses out, no tensor data touched.

Note [Words]
~~~~~~~~~~~~
param        the model's live tensor
average      the running average that we own
rule         how the weight follows from the number of updates
weight       interpolation weight of the newest param, as in ``torch.lerp``; an EMA's decay is ``1 - weight``
num_averaged models already in the average; the state-dict key is ``n_averaged``, as in torch
update       one ``update_parameters``; a step is the optimizer's, never ours
bucket       one flat 1-D allocation of planes of one (device, dtype); each averaged param stands on its own slice of it
buffer       only an ``nn.Module`` buffer
chunk        a run of elements that one CPU task, CUDA block or Triton program handles
shard        this rank's part of a param
format       how an average is stored
plane        one of a format's arrays; plane 0 is the averaged module's own parameter
plan         buckets and chunk table for one list of params
backend      ``reference``, ``cpu``, ``cuda``, ``triton``

``numel`` counts elements, ``nbytes`` bytes, ``*_offset`` elements; all of them 64-bit.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: A bucket is the most extra memory that a first update takes: 256 MiB of float32.
MAX_BUCKET_NUMEL = 64 * 2**20

#: Slots start on multiples of this: 64 bytes for the narrowest plane, so two threads never write one cache line.
SLOT_ALIGNMENT = 32

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


@dataclass(frozen=True)
class Bucket:
    """One allocation and what stands in it."""

    key: Hashable  # what its planes have in common: (device, dtype)
    numel: int
    slots: tuple[Slot, ...]


def lay_out(
    numels: Sequence[int],
    keys: Sequence[Hashable],
    *,
    max_numel: int = MAX_BUCKET_NUMEL,
    alignment: int = SLOT_ALIGNMENT,
) -> list[Bucket]:
    """Put planes into buckets, in their order; one larger than ``max_numel`` has a bucket of its own."""
    open_slots: dict[Hashable, list[Slot]] = {}
    ends: dict[Hashable, int] = {}
    buckets: list[Bucket] = []

    def close(key: Hashable) -> None:
        if open_slots.get(key):
            buckets.append(Bucket(key, ends[key], tuple(open_slots[key])))
        open_slots[key], ends[key] = [], 0

    for index, (numel, key) in enumerate(zip(numels, keys, strict=True)):
        offset = -(-ends.get(key, 0) // alignment) * alignment
        if offset + numel > max_numel:
            close(key)
            offset = 0
        open_slots.setdefault(key, []).append(Slot(index, offset, numel))
        ends[key] = offset + numel
    for key in list(open_slots):
        close(key)
    return buckets


def cut_chunks(numels: Sequence[int], chunk_numel: int) -> Tensor:
    """Cut tensors of these sizes into chunks: (num_chunks, 3) int64 rows of (tensor, offset, numel).

    An empty tensor has no chunk. Worked out by torch, since Llama-3-8B has 245,000 of them.
    """
    # The device is named throughout: the user's default device may be another, and the table is the host's.
    sizes = torch.tensor(list(numels), dtype=torch.int64, device="cpu")
    counts = (sizes + (chunk_numel - 1)).div(chunk_numel, rounding_mode="floor")
    tensor = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), counts)
    first = torch.cumsum(counts, 0) - counts
    offset = (torch.arange(len(tensor), device="cpu") - first[tensor]) * chunk_numel
    numel = torch.clamp(sizes[tensor] - offset, max=chunk_numel)
    return torch.stack((tensor, offset, numel), dim=1).contiguous()


def gpu_chunk_numel(num_elements: int, num_blocks: int) -> int:
    """Give the chunk size, a power of two, for this much work on a GPU that runs ``num_blocks`` blocks at once."""
    least, most = GPU_CHUNK_NUMELS
    wanted = num_elements // (num_blocks * GPU_CHUNKS_PER_BLOCK)
    return min(max(least, 1 << max(wanted, 1).bit_length() - 1), most)


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Say whether the elements fill one run of memory, in whatever order of dimensions, each once."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if size == 0:
            return True
        if step != expected:
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
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
