"""The kernels of the ``triton`` backend: ``csrc/cuda/kernels.cuh`` said in Triton, with the same bits in every plane.

A persistent grid of programs takes chunks in turn; one launch serves tensors of every dtype and format. Tensors come as
addresses in a table (``gpu.Table``). All arguments of the kernels are int64, and none is specialised on: no value
makes the compiler work anew. ``memory.py`` says how tiles are moved, ``arithmetic.py`` and
``random.py`` what becomes of an element, ``paces.py`` by which weight.

The loops are written with ``while``, since ``range`` over a scalar fails in the interpreter of Triton 3.6 with a recent
numpy; the machine code is the same. Functions are called with no tuples, which Triton takes from 3.3 on.
"""

import triton
import triton.language as tl

from .arithmetic import (
    COMPACT,
    COMPENSATED,
    EXACT,
    FLOAT32,
    HALF,
    MIRRORED,
    blend_of,
    decode,
    encode,
    lerp,
    lerp_precisely,
    value_of,
)
from .arithmetic import interpreted as interpreted
from .memory import (
    COMPENSATED_TILE,
    NARROW_TILE,
    TILE,
    chunk_of,
    launched,
    low_of,
    move_chunk,
    pointer_to,
    row_of,
    store_halves,
    tile_indices,
    tile_of,
    word,
)
from .paces import any_bad, counters_of, pace_at, weights_of
from .paces import pace_kernel as pace_kernel
from .random import bits_of_draw, draw_of

VERSION = triton.__version__


# One chunk. Params stay in the caches, where the next forward pass looks for them; averages leave them first.


@triton.jit
def update_tile(
    param,
    first,
    second,
    start,
    numel,
    factor,
    near,
    copy,
    weight,
    low,
    high,
    turn,
    first_index,
    index_step,
    indices,
    DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    FIRST_BYTES: tl.constexpr,
    SECOND_BYTES: tl.constexpr,
    CUT_BITS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Update a tile; a wide one is of ``WIDE`` elements. A thread has 8 in a row unless all arrays are of 4 bytes."""
    params = tile_of(param, start, indices, WIDE)
    firsts = tile_of(first, start, indices, WIDE)
    seconds = tile_of(second, start, indices, WIDE)
    mask = None if WIDE else start + indices < numel
    newest = tl.load(params, mask=mask)
    old_first = tl.load(firsts, mask=mask, eviction_policy="evict_first")
    old_second = tl.load(seconds, mask=mask, eviction_policy="evict_first") if SECOND_BYTES != 0 else old_first
    average, value = decode(old_first, old_second, FORMAT), value_of(newest, DTYPE)
    if FORMAT == COMPENSATED:
        moved = lerp_precisely(average, value, weight)
    else:
        moved = lerp(average, value, factor, near, copy)
    random = 0
    if CUT_BITS != 0:
        index = first_index + (start.to(tl.uint32) + indices.to(tl.uint32)) * index_step
        random = bits_of_draw(low, high, turn, index) >> (32 - CUT_BITS)
    new_first, new_second = encode(moved, random, FORMAT)
    EIGHTS: tl.constexpr = WIDE != 0 and (DTYPE != 0 or FIRST_BYTES == 2)
    if EIGHTS and FIRST_BYTES == 4:
        store_halves(first, start, new_first, WIDE)
    else:
        tl.store(firsts, new_first, mask=mask, cache_modifier=".cs")
    if EIGHTS and SECOND_BYTES == 4:
        store_halves(second, start, new_second, WIDE)
    elif SECOND_BYTES != 0:
        tl.store(seconds, new_second, mask=mask, cache_modifier=".cs")


@triton.jit
def update_chunk(
    row,
    chunk,
    factor,
    near,
    copy,
    weight,
    num_averaged,
    DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    FIRST_BYTES: tl.constexpr,
    SECOND_BYTES: tl.constexpr,
    CUT_BITS: tl.constexpr,
):
    """Update a chunk: whole tiles 16 bytes at a time where all arrays are aligned, the rest element by element.

    A format has elements of so many bytes in each plane, and rounds so many bits off at random.
    """
    PARAM_BYTES: tl.constexpr = 4 if DTYPE == 0 else 2
    offset, numel, first_index = word(chunk, 1), word(chunk, 2), word(chunk, 3)
    param = word(row, 0) + offset * PARAM_BYTES
    first = word(row, 1) + offset * FIRST_BYTES
    second = word(row, 2) + offset * SECOND_BYTES
    params, firsts = pointer_to(param, PARAM_BYTES), pointer_to(first, FIRST_BYTES)
    seconds = pointer_to(second, SECOND_BYTES)
    low, high, turn, index_step = 0, 0, 0, 0
    if CUT_BITS != 0:
        low, high, turn = draw_of(word(row, 5), num_averaged, first_index)
        first_index, index_step = first_index.to(tl.uint32), word(chunk, 4).to(tl.uint32)
    NUMEL: tl.constexpr = COMPENSATED_TILE if FORMAT == COMPENSATED else TILE
    ROWS: tl.constexpr = 4 if PARAM_BYTES == 4 and FIRST_BYTES == 4 else 2
    alignment = param | first | (second * 2 if SECOND_BYTES == 1 else second)
    middle = tl.where((alignment & 15) == 0, numel // NUMEL * NUMEL, 0)
    indices = tile_indices(ROWS, NUMEL // ROWS)
    start = middle * 0
    while start < middle:
        update_tile(
            params,
            firsts,
            seconds,
            start,
            middle,
            factor,
            near,
            copy,
            weight,
            low,
            high,
            turn,
            first_index,
            index_step,
            indices,
            DTYPE,
            FORMAT,
            FIRST_BYTES,
            SECOND_BYTES,
            CUT_BITS,
            NUMEL,
        )
        start += NUMEL
    indices = tile_indices(1, NARROW_TILE)
    while start < numel:
        update_tile(
            params,
            firsts,
            seconds,
            start,
            numel,
            factor,
            near,
            copy,
            weight,
            low,
            high,
            turn,
            first_index,
            index_step,
            indices,
            DTYPE,
            FORMAT,
            FIRST_BYTES,
            SECOND_BYTES,
            CUT_BITS,
            0,
        )
        start += NARROW_TILE


@triton.jit
def update_as(row, chunk, factor, near, copy, weight, num_averaged, fmt, DTYPE: tl.constexpr):
    if fmt == FLOAT32:
        update_chunk(row, chunk, factor, near, copy, weight, num_averaged, DTYPE, FLOAT32, 4, 0, 0)
    elif fmt == EXACT:
        update_chunk(row, chunk, factor, near, copy, weight, num_averaged, DTYPE, EXACT, 2, 2, 0)
    elif fmt == MIRRORED:
        update_chunk(row, chunk, factor, near, copy, weight, num_averaged, DTYPE, MIRRORED, 2, 4, 0)
    elif fmt == COMPACT:
        update_chunk(row, chunk, factor, near, copy, weight, num_averaged, DTYPE, COMPACT, 2, 1, 8)
    elif fmt == COMPENSATED:
        update_chunk(row, chunk, factor, near, copy, weight, num_averaged, DTYPE, COMPENSATED, 4, 4, 0)
    else:
        update_chunk(row, chunk, factor, near, copy, weight, num_averaged, DTYPE, HALF, 2, 0, 16)


@triton.jit
def has_all(bits, EXPONENT: tl.constexpr):
    return ((bits & EXPONENT) == EXPONENT).to(tl.int32)


@triton.jit
def holds_nonfinite(row, chunk, EXPONENT: tl.constexpr, BYTES: tl.constexpr):
    """Return 1 if a chunk of a param holds a NaN or an infinity, which have an exponent of all ones; else 0."""
    numel = word(chunk, 2)
    param = word(row, 0) + word(chunk, 1) * BYTES
    num_words = tl.where((param & 15) == 0, numel * BYTES // (4 * TILE) * TILE, 0)
    indices = tile_indices(4, TILE // 4)
    bad = indices * 0
    start = num_words * 0
    while start < num_words:
        bits = tl.load(tile_of(pointer_to(param, 4), start, indices, True))
        bad |= has_all(bits, EXPONENT)
        if BYTES == 2:
            bad |= has_all(bits, EXPONENT << 16)
        start += TILE
    start = num_words * 4 // BYTES
    indices = tile_indices(1, NARROW_TILE)
    bad_end = indices * 0
    while start < numel:
        bits = tl.load(tile_of(pointer_to(param, BYTES), start, indices, False), mask=start + indices < numel, other=0)
        bad_end |= has_all(bits.to(tl.int32), EXPONENT)
        start += NARROW_TILE
    return tl.max(bad) | tl.max(bad_end)


# Launches. The tables' words are those of csrc/swafast.h: 7 for a tensor, 5 for a chunk, 6 for a pace, 3 for the state.


@triton.jit
def is_last_to_begin(state):
    """Count this program; return whether all programs have now read the words that the launch changes.

    The count goes on from launch to launch, each of as many programs, as in ``csrc/cuda/kernels.cuh``.
    """
    tl.debug_barrier()  # every thread of the program has read
    begun = tl.atomic_add(pointer_to(state, 8), 1, sem="acq_rel", scope="gpu") + 1
    return begun % tl.num_programs(0) == 0


@triton.jit
def update_row(row, chunk, counts, weights):
    """Update a chunk of one average."""
    kinds = word(row, 4)
    dtype, fmt = low_of(kinds), kinds >> 32
    num_averaged, weight = pace_at(counts, weights, low_of(word(row, 6)))
    factor, near, copy = blend_of(weight)
    if dtype == 0:
        update_as(row, chunk, factor, near, copy, weight, num_averaged, fmt, 0)
    elif dtype == 1:
        update_as(row, chunk, factor, near, copy, weight, num_averaged, fmt, 1)
    elif dtype == 2:
        update_as(row, chunk, factor, near, copy, weight, num_averaged, fmt, 2)
    else:
        move_chunk(row, chunk, 1, False)


@launched
def update_kernel(
    tensors: tl.int64,
    chunks: tl.int64,
    num_chunks: tl.int64,
    state: tl.int64,
    paces: tl.int64,
    num_paces: tl.int64,
    advance: tl.int64,
    skip_nonfinite: tl.int64,
):
    """Move every average towards its param by its pace's weight, and count, as ``swafast_cuda_update`` does."""
    counters, used = counters_of(paces, num_paces)
    counts = tl.load(counters, mask=used, other=0)
    stop = any_bad(counts) | ((skip_nonfinite != 0) & (word(state, 2) != 0))
    if is_last_to_begin(state) and not stop:
        tl.store(counters, counts + advance, mask=used)
    weights = weights_of(paces, num_paces, counts)
    end = tl.where(stop, 0, num_chunks)
    i = tl.program_id(0).to(tl.int64)
    while i < end:
        chunk = chunk_of(chunks, i)
        row = row_of(tensors, word(chunk, 0))
        # The averages of one param come one after the other: by the second one, its chunk is in the caches.
        last = row_of(row, word(row, 6) >> 32)
        while row <= last:
            update_row(row, chunk, counts, weights)
            row = row_of(row, 1)
        i += tl.num_programs(0)


@launched
def exchange_kernel(tensors: tl.int64, chunks: tl.int64, num_chunks: tl.int64, state: tl.int64, wanted: tl.int64):
    """Have every param and plane 0 change places, unless they are as ``wanted`` already."""
    end = tl.where(word(state, 1) == wanted, 0, num_chunks)
    if is_last_to_begin(state):
        tl.store(pointer_to(state, 8) + 1, wanted)
    i = tl.program_id(0).to(tl.int64)
    while i < end:
        chunk = chunk_of(chunks, i)
        row = row_of(tensors, word(chunk, 0))
        dtype = low_of(word(row, 4))
        if dtype == 0:
            move_chunk(row, chunk, 4, True)
        elif dtype == 3:
            move_chunk(row, chunk, 1, True)
        else:
            move_chunk(row, chunk, 2, True)
        i += tl.num_programs(0)


@launched
def forget_nonfinite_kernel(state: tl.int64):
    tl.store(pointer_to(state, 8) + 2, 0)


@launched
def nonfinite_kernel(tensors: tl.int64, chunks: tl.int64, num_chunks: tl.int64, state: tl.int64, num_tensors: tl.int64):
    """Fill in the state's ``nonfinite``, which is 0 before. Copied tensors do not count."""
    i = tl.program_id(0).to(tl.int64)
    while i < num_chunks:
        chunk = chunk_of(chunks, i)
        tensor = word(chunk, 0)
        row = row_of(tensors, tensor)
        dtype = low_of(word(row, 4))
        bad = 0
        if dtype == 0:
            bad = holds_nonfinite(row, chunk, 0x7F800000, 4)
        elif dtype == 1:
            bad = holds_nonfinite(row, chunk, 0x7F80, 2)
        elif dtype == 2:
            bad = holds_nonfinite(row, chunk, 0x7C00, 2)
        if bad != 0:
            tl.atomic_max(pointer_to(state, 8) + 2, num_tensors - tensor)
        i += tl.num_programs(0)
