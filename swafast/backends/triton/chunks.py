"""Chunks in the ``triton`` backend: updated, copied, exchanged, or searched for what is not finite.

No function takes a tuple: Triton before 3.3 passes none.
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
    decode,
    encode,
    lerp,
    lerp_precisely,
    value_of,
)
from .memory import (
    COMPENSATED_TILE,
    NARROW_TILE,
    TILE,
    high_of,
    pointer_to,
    store_halves,
    tile_indices,
    tile_of,
    word,
)
from .random import bits_of_draw, draw_of

# Params stay in the caches, where the next forward pass looks for them; averages leave them first.


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
    param, first, second, numel = word(chunk, 0), word(chunk, 1), word(chunk, 2), word(chunk, 3)
    params, firsts = pointer_to(param, PARAM_BYTES), pointer_to(first, FIRST_BYTES)
    seconds = pointer_to(second, SECOND_BYTES)
    low, high, turn, first_index, index_step = 0, 0, 0, 0, 0
    if CUT_BITS != 0:
        low, high, turn = draw_of(word(chunk, 5), num_averaged, word(chunk, 4))
        first_index, index_step = word(chunk, 4).to(tl.uint32), high_of(word(chunk, 6)).to(tl.uint32)
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
def update_as(chunk, factor, near, copy, weight, num_averaged, fmt, DTYPE: tl.constexpr):
    if fmt == FLOAT32:
        update_chunk(chunk, factor, near, copy, weight, num_averaged, DTYPE, FLOAT32, 4, 0, 0)
    elif fmt == EXACT:
        update_chunk(chunk, factor, near, copy, weight, num_averaged, DTYPE, EXACT, 2, 2, 0)
    elif fmt == MIRRORED:
        update_chunk(chunk, factor, near, copy, weight, num_averaged, DTYPE, MIRRORED, 2, 4, 0)
    elif fmt == COMPACT:
        update_chunk(chunk, factor, near, copy, weight, num_averaged, DTYPE, COMPACT, 2, 1, 8)
    elif fmt == COMPENSATED:
        update_chunk(chunk, factor, near, copy, weight, num_averaged, DTYPE, COMPENSATED, 4, 4, 0)
    else:
        update_chunk(chunk, factor, near, copy, weight, num_averaged, DTYPE, HALF, 2, 0, 16)


@triton.jit
def move_tile(param, average, start, numel, indices, EXCHANGE: tl.constexpr, WIDE: tl.constexpr):
    params, averages = tile_of(param, start, indices, WIDE), tile_of(average, start, indices, WIDE)
    mask = None if WIDE else start + indices < numel
    newest = tl.load(params, mask=mask)
    if EXCHANGE:
        old = tl.load(averages, mask=mask, eviction_policy="evict_first")
        tl.store(params, old, mask=mask)
    tl.store(averages, newest, mask=mask, cache_modifier=".cs")


@triton.jit
def move_chunk(chunk, BYTES: tl.constexpr, EXCHANGE: tl.constexpr):
    """Copy the bytes of a chunk's param to its average, or exchange the two, whatever the bytes mean."""
    param, average, numel = word(chunk, 0), word(chunk, 1), word(chunk, 3)
    num_words = tl.where(((param | average) & 15) == 0, numel * BYTES // (4 * TILE) * TILE, 0)
    indices = tile_indices(4, TILE // 4)
    start = num_words * 0
    while start < num_words:
        move_tile(pointer_to(param, 4), pointer_to(average, 4), start, num_words, indices, EXCHANGE, True)
        start += TILE
    start = num_words * 4 // BYTES
    indices = tile_indices(1, NARROW_TILE)
    while start < numel:
        move_tile(pointer_to(param, BYTES), pointer_to(average, BYTES), start, numel, indices, EXCHANGE, False)
        start += NARROW_TILE


@triton.jit
def has_all(bits, EXPONENT: tl.constexpr):
    return ((bits & EXPONENT) == EXPONENT).to(tl.int32)


@triton.jit
def holds_nonfinite(chunk, EXPONENT: tl.constexpr, BYTES: tl.constexpr):
    """Return 1 if a chunk of a param holds a NaN or an infinity, which have an exponent of all ones; else 0."""
    param, numel = word(chunk, 0), word(chunk, 3)
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
