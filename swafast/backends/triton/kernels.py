"""The kernels of the ``triton`` backend: ``csrc/cuda/kernels.cuh`` said in Triton, with the same bits in every plane.

A persistent grid of programs takes chunks in turn; one launch serves tensors of every dtype and format. Tensors come as
addresses in a table (``gpu.Table``). All arguments of the kernels are int64, and none is specialised on: no value
makes the compiler work anew. ``chunks.py`` says what becomes of a chunk, ``memory.py`` how tiles are moved,
``arithmetic.py`` and ``random.py`` what becomes of an element, ``paces.py`` by which weight.

The loops are written with ``while``, since ``range`` over a scalar fails in the interpreter of Triton 3.6 with a recent
numpy; the machine code is the same.
"""

import triton
import triton.language as tl

from .arithmetic import blend_of
from .arithmetic import interpreted as interpreted
from .chunks import holds_nonfinite, move_chunk, update_as
from .memory import descriptor_of, high_of, kind_of, launched, low_of, pointer_to, word
from .paces import any_bad, counters_of, pace_at, weights_of
from .paces import pace_kernel as pace_kernel
from .spreads import draw_chunk, update_spread

VERSION = triton.__version__

SPREAD = tl.constexpr(7)  # the format of a spread, in csrc/swafast.h


# Launches. A program takes every so many-th chunk and reads its descriptor when it comes to it: to claim one would stop
# all its threads, and to hold the next one took registers of which there are none left.


@triton.jit
def is_last_to_begin(state):
    """Count this program; return whether all programs have now read the words that the launch changes.

    All programs of a launch add up to 2^32, as in ``csrc/cuda/kernels.cuh``.
    """
    tl.debug_barrier()  # every thread of the program has read
    others = tl.num_programs(0).to(tl.int64) - 1
    share = tl.where(tl.program_id(0) == 0, 0x100000000 - others, 1)
    return low_of(tl.atomic_add(pointer_to(state, 8), share, sem="acq_rel", scope="gpu") + share) == 0


@triton.jit
def update_average(chunk, counts, weights):
    """Update a chunk of one average."""
    kinds = word(chunk, 7)
    dtype, fmt = kind_of(kinds, 0), kind_of(kinds, 1)
    num_averaged, weight = pace_at(counts, weights, kind_of(kinds, 2))
    factor, near, copy = blend_of(weight)
    if dtype == 0:
        update_as(chunk, factor, near, copy, weight, num_averaged, fmt, 0)
    elif dtype == 1:
        update_as(chunk, factor, near, copy, weight, num_averaged, fmt, 1)
    elif dtype == 2:
        update_as(chunk, factor, near, copy, weight, num_averaged, fmt, 2)
    else:
        move_chunk(chunk, 1, False)


@triton.jit
def update_average_or_spread(chunk, descriptors, counts, weights):
    """Update a chunk of one average, or of one spread, which comes before the average that it belongs to."""
    if kind_of(word(chunk, 7), 1) == SPREAD:
        num_averaged, weight = pace_at(counts, weights, kind_of(word(chunk, 7), 2))
        factor, near, copy = blend_of(weight)
        mean = descriptor_of(descriptors, high_of(word(chunk, 7)))
        update_spread(chunk, mean, num_averaged, factor, near, copy, weight)
        tl.debug_barrier()  # every thread has read the average, which others move
    else:
        update_average(chunk, counts, weights)


@triton.jit
def update_table(descriptors, num_chunks, state, paces, num_paces, advance, skip_nonfinite, HAS_SPREADS: tl.constexpr):
    """Move every average of a table, and its spread if there are any, by its pace's weight, and count."""
    counters, used = counters_of(paces, num_paces)
    counts = tl.load(counters, mask=used, other=0)
    stop = any_bad(counts) | ((skip_nonfinite != 0) & (word(state, 2) != 0))
    if is_last_to_begin(state) and not stop:
        tl.store(counters, counts + advance, mask=used)
    weights = weights_of(paces, num_paces, counts)
    end = tl.where(stop, 0, num_chunks)
    i = tl.program_id(0).to(tl.int64)
    while i < end:
        # The averages of one param come one after the other: by the second one, its chunk is in the caches.
        chunk = descriptor_of(descriptors, i)
        while chunk != 0:
            if HAS_SPREADS:
                update_average_or_spread(chunk, descriptors, counts, weights)
            else:
                update_average(chunk, counts, weights)
            follower = high_of(word(chunk, 7))
            chunk = tl.where(follower == 0, 0, descriptor_of(descriptors, follower))
        i += tl.num_programs(0)


@launched
def update_kernel(
    descriptors: tl.int64,
    num_chunks: tl.int64,
    state: tl.int64,
    paces: tl.int64,
    num_paces: tl.int64,
    advance: tl.int64,
    skip_nonfinite: tl.int64,
):
    """Move every average towards its param by its pace's weight, and count, as ``swafast_cuda_update`` does."""
    update_table(descriptors, num_chunks, state, paces, num_paces, advance, skip_nonfinite, False)


@launched
def exchange_kernel(descriptors: tl.int64, num_chunks: tl.int64, state: tl.int64, wanted: tl.int64):
    """Have every param and plane 0 change places, unless they are as ``wanted`` already."""
    i = tl.program_id(0).to(tl.int64)
    end = tl.where(word(state, 1) == wanted, 0, num_chunks)
    if is_last_to_begin(state):
        tl.store(pointer_to(state, 8) + 1, wanted)
    while i < end:
        chunk = descriptor_of(descriptors, i)
        dtype = kind_of(word(chunk, 7), 0)
        if dtype == 0:
            move_chunk(chunk, 4, True)
        elif dtype == 3:
            move_chunk(chunk, 1, True)
        else:
            move_chunk(chunk, 2, True)
        i += tl.num_programs(0)


@launched
def forget_nonfinite_kernel(state: tl.int64):
    tl.store(pointer_to(state, 8) + 2, 0)


@launched
def nonfinite_kernel(descriptors: tl.int64, num_chunks: tl.int64, state: tl.int64, num_tensors: tl.int64):
    """Fill in the state's ``nonfinite``, which is 0 before. Copied tensors do not count."""
    i = tl.program_id(0).to(tl.int64)
    while i < num_chunks:
        chunk = descriptor_of(descriptors, i)
        dtype = kind_of(word(chunk, 7), 0)
        bad = 0
        if dtype == 0:
            bad = holds_nonfinite(chunk, 0x7F800000, 4)
        elif dtype == 1:
            bad = holds_nonfinite(chunk, 0x7F80, 2)
        elif dtype == 2:
            bad = holds_nonfinite(chunk, 0x7C00, 2)
        if bad != 0:
            tl.atomic_max(pointer_to(state, 8) + 2, num_tensors - low_of(word(chunk, 6)))
        i += tl.num_programs(0)


# Tables with spreads have kernels of their own: those of all other tables do not become longer.


@launched
def spread_kernel(
    descriptors: tl.int64,
    num_chunks: tl.int64,
    state: tl.int64,
    paces: tl.int64,
    num_paces: tl.int64,
    advance: tl.int64,
    skip_nonfinite: tl.int64,
):
    """Do what ``update_kernel`` does, and move each spread before its average."""
    update_table(descriptors, num_chunks, state, paces, num_paces, advance, skip_nonfinite, True)


@launched
def draw_kernel(
    descriptors: tl.int64,
    num_chunks: tl.int64,
    coefficients: tl.int64,
    num_columns: tl.int64,
    sample: tl.int64,
    noise: tl.int64,
):
    """Write a sample into every param, as ``swafast_cuda_draw`` does. ``noise`` has the bits of a float32."""
    i = tl.program_id(0).to(tl.int64)
    while i < num_chunks:
        spread = descriptor_of(descriptors, i)
        mean = descriptor_of(descriptors, high_of(word(spread, 7)))
        of_noise = noise.to(tl.int32).to(tl.float32, bitcast=True)
        draw_chunk(spread, mean, coefficients, num_columns, sample.to(tl.uint32), of_noise)
        i += tl.num_programs(0)
