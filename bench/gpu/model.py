"""A model of one update on an H200, block by block: what the kernel loop should take, before a GPU has run it.

Blocks share one memory that serves so many bytes a second. A block waits for each descriptor, then loads and stores its
chunk tile by tile. The latencies are published or measured ones of Hopper GPUs; no figure here comes from these
kernels. ``predictions.py`` holds what follows from it, and a report prints both beside what it measures.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.internals import gpu_chunk_numel
from bench.workloads import GPU_WORKLOADS


@dataclass(frozen=True)
class Gpu:
    """An H200. A copy from device to device reaches 4.3 TB/s, both directions counted."""

    bytes_per_s: float = 4.35e12
    memory_s: float = 0.80e-6  # from a load to its value, under traffic
    descriptor_s: float = 0.75e-6  # the same for a cold word of a table, or an atomic
    begin_s: float = 3.7e-6  # launch, counts, weight
    jitter_s: float = 0.3e-6  # from the first block to the last
    tile_s: float = 0.12e-6  # arithmetic of a tile
    chunk_s: float = 0.1e-6  # barriers and branches of a chunk
    num_blocks: int = 528


@dataclass(frozen=True)
class Loop:
    """A kernel loop."""

    hops: int  # loads one after the other until a block knows its chunk
    prefetches: bool  # those of the next chunk run while the block moves this one
    claims: bool  # chunks are claimed one by one, not dealt out beforehand


#: What the kernels did before, what Triton's do, and what CUDA's do.
DEALT = Loop(hops=2, prefetches=False, claims=False)
TRITON = Loop(hops=1, prefetches=False, claims=False)
CUDA = Loop(hops=1, prefetches=True, claims=True)
#: Elements of a float32 tile.
TILE_NUMEL = 4096


def chunks_of(workload: str, num_blocks: int = Gpu.num_blocks) -> list[int]:
    """Return the sizes of a workload's chunks, as the package cuts them."""
    described = GPU_WORKLOADS[workload]
    numels = [math.prod(shape) for _, shape in described.params(described.full_depth)]
    size = gpu_chunk_numel(sum(numels), num_blocks)
    return [min(size, numel - start) for numel in numels for start in range(0, numel, size)]


def simulate(
    chunks: Sequence[int], read: int, written: int, loop: Loop = CUDA, gpu: Gpu = Gpu(), taken: float = 0.0
) -> float:
    """Return the seconds of an update.

    Args:
        chunks: elements of each.
        read: bytes of an element that are read; ``written`` alike.
        taken: share of the blocks for which another kernel leaves no room. Each begins when another block has ended.
    """
    draw, count = random.Random(1), len(chunks)
    num_blocks = min(gpu.num_blocks, count)
    late = deque(range(num_blocks - int(taken * num_blocks), num_blocks))
    # (when, block, chunk, elements of it that are left), in the order of time
    events: list[tuple[float, int, int, int]] = []
    claimed = iter(range(num_blocks, count))
    dealt = [iter(range(block + num_blocks, count, num_blocks)) for block in range(num_blocks)]

    def begin(block: int, at: float) -> None:
        ready = at + draw.random() * gpu.jitter_s + loop.hops * gpu.descriptor_s
        heapq.heappush(events, (ready, block, block, chunks[block]))
        ahead[block] = next(upcoming(block), None)

    def upcoming(block: int) -> Iterator[int]:
        return claimed if loop.claims else dealt[block]

    ahead: dict[int, int | None] = {}
    for block in range(num_blocks - len(late)):
        begin(block, gpu.begin_s)
    busy = end = 0.0
    while events:
        now, block, chunk, left = heapq.heappop(events)
        numel = min(TILE_NUMEL, left)
        loaded = max(busy, now) + numel * read / gpu.bytes_per_s
        done = loaded + gpu.memory_s
        busy = loaded + numel * written / gpu.bytes_per_s
        done += gpu.tile_s
        end = max(end, done, busy)
        following = ahead[block]
        if left > numel:
            heapq.heappush(events, (done, block, chunk, left - numel))
        elif following is not None:
            ahead[block] = next(upcoming(block), None)
            waits = 0.0 if loop.prefetches else loop.hops * gpu.descriptor_s
            heapq.heappush(events, (done + waits + gpu.chunk_s, block, following, chunks[following]))
        elif late:
            begin(late.popleft(), done + gpu.begin_s)
    return end
