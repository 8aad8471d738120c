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
from functools import cache
from typing import NamedTuple

from bench import names
from bench.cases import DTYPES
from bench.internals import GPU_CHUNK_NUMELS, cut_chunks, gpu_chunk_numel, planes_nbytes, whole_runs
from bench.providers import VARIANCE_BYTES, moved_bytes
from bench.workloads import GPU_WORKLOADS, buffer_dtype

#: Bytes a second of a copy from device to device on an H200, read and written.
COPY_BYTES_PER_S = 4.3e12


@dataclass(frozen=True)
class Gpu:
    """An H200. Its memory serves somewhat more than a copy reaches, because a copy also begins and ends."""

    bytes_per_s: float = 4.35e12
    memory_s: float = 0.80e-6  # from a load to its value, under traffic
    descriptor_s: float = 0.75e-6  # the same for a cold word of a table, or an atomic
    begin_s: float = 3.7e-6  # launch, counts, weight
    jitter_s: float = 0.3e-6  # from the first block to the last
    tile_s: float = 0.12e-6  # arithmetic of a tile
    chunk_s: float = 0.1e-6  # barriers and branches of a chunk
    multiprocessors: int = 132
    blocks_each: int = 4  # of 256 threads with 64 registers

    @property
    def num_blocks(self) -> int:
        return self.multiprocessors * self.blocks_each


@dataclass(frozen=True)
class Loop:
    """A kernel loop."""

    hops: int  # loads one after the other until a block knows its chunk
    prefetches: bool  # those of the next chunk run while the block moves this one
    claims: bool  # chunks are claimed one by one, not dealt out beforehand


#: What the first CUDA kernels did, what Triton's do, and what CUDA's do.
DEALT = Loop(hops=2, prefetches=False, claims=False)
TRITON = Loop(hops=1, prefetches=False, claims=False)
CUDA = Loop(hops=1, prefetches=True, claims=True)
#: Elements of a float32 tile.
TILE_NUMEL = 4096


class Chunk(NamedTuple):
    numel: int
    read: int  # bytes of an element
    written: int  # bytes of an element


def bytes_of(dtype: str, format: str, work: str = "") -> tuple[int, int]:
    """Return the bytes of a param and its average that an update reads, and those that it writes.

    With ``work``, those of an average with a spread, or those of a draw.
    """
    kind = DTYPES[dtype]
    written = {
        "": planes_nbytes(format),
        names.COLLECT: planes_nbytes(format) + VARIANCE_BYTES + kind.itemsize,
        names.DRAW: kind.itemsize,
    }[work]
    return moved_bytes(kind, format, work=work) - written, written


@cache
def chunks_of(
    workload: str, dtype: str = "float32", format: str = "float32", gpu: Gpu = Gpu(), work: str = ""
) -> tuple[Chunk, ...]:
    """Return a workload's chunks, as the package cuts them: params, then buffers, which are copied byte by byte."""
    described, kind = GPU_WORKLOADS[workload], DTYPES[dtype]
    params = [math.prod(shape) for _, shape in described.params(described.full_depth)]
    buffers = [math.prod(shape) * buffer_dtype(name, kind).itemsize for name, shape in described.buffers()]
    numels = [*params, *buffers]
    # Rows that share a param are cut small, for the caches.
    size = GPU_CHUNK_NUMELS[0] if work else gpu_chunk_numel(sum(numels), gpu.num_blocks)
    each = [bytes_of(dtype, format, work)] * len(params) + [(1, 1)] * len(buffers)
    return tuple(Chunk(numel, *each[row]) for row, _, numel, *_ in cut_chunks(whole_runs(numels), size).tolist())


def simulate(chunks: Sequence[Chunk], loop: Loop = CUDA, gpu: Gpu = Gpu(), taken: float = 0.0) -> float:
    """Return the seconds of an update.

    Args:
        chunks: in the order in which blocks take them.
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
        heapq.heappush(events, (ready, block, block, chunks[block].numel))
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
        _, read, written = chunks[chunk]
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
            heapq.heappush(events, (done + waits + gpu.chunk_s, block, following, chunks[following].numel))
        elif late:
            begin(late.popleft(), done + gpu.begin_s)
    return end
