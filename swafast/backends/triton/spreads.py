"""Spreads in the ``triton`` backend: the variance and the deviations of a chunk moved, and samples drawn of it."""

import triton
import triton.language as tl

from .arithmetic import COMPENSATED, EXACT, FLOAT32, fused_multiply_add, lerp, lerp_precisely, value_of
from .memory import NARROW_TILE, high_of, kind_of, low_of, pointer_to, tile_indices, word
from .normal import normal_from, word_of_lane, words_of
from .tiles import (
    KNOWN_TILE,
    SLIM_TILE,
    is_aligned,
    load_bits,
    read_averages,
    read_planes,
    read_values,
    store_bits,
    wide_indices,
    write_values,
)


@triton.jit
def distances_of(newest, first, second, start, indices, mask, factor, near, copy, weight, fmt, EACH: tl.constexpr):
    """Return how far a tile of params is from its averages, before and after these move."""
    if fmt == COMPENSATED:
        precise = read_planes(first, second, start, indices, mask, COMPENSATED, 4, 4, "", EACH)
        distance = (newest.to(tl.float64) - precise).to(tl.float32)
        deviation = (newest.to(tl.float64) - lerp_precisely(precise, newest, weight)).to(tl.float32)
    else:
        average = read_averages(first, second, start, indices, mask, fmt, "", EACH)
        distance = newest - average
        deviation = newest - lerp(average, newest, factor, near, copy)
    return distance, deviation


@triton.jit
def spread_tile(
    spread,
    mean,
    column,
    start,
    numel,
    factor,
    near,
    copy,
    weight,
    indices,
    dtype,
    fmt,
    column_dtype,
    EACH: tl.constexpr,
):
    """Move the variance of a tile, and store its deviations. Param and planes are read again at once, from caches.

    The chunk's addresses are read for each tile: held from one to the next, they would go to memory for want of
    registers.
    """
    mask = None if EACH else start + indices < numel
    newest = read_values(word(spread, 0), start, indices, mask, dtype, "", EACH)
    old = load_bits(word(spread, 1), 4, start, indices, mask, "evict_first", EACH).to(tl.float32, bitcast=True)
    distance, deviation = distances_of(
        newest, word(mean, 1), word(mean, 2), start, indices, mask, factor, near, copy, weight, fmt, EACH
    )
    moved = tl.where(copy, 0.0, lerp(old, distance * deviation, factor, near, copy))
    store_bits(word(spread, 1), 4, start, indices, mask, moved.to(tl.int32, bitcast=True), ".cs", EACH)
    if column != 0:
        deviation = tl.where(copy, 0.0, deviation)
        write_values(column, start, indices, mask, deviation, column_dtype, ".cs", EACH)


@triton.jit
def spread_chunk(
    spread, mean, column, factor, near, copy, weight, dtype, fmt, column_dtype, EACH: tl.constexpr, NUMEL: tl.constexpr
):
    numel = word(spread, 3)
    aligned = is_aligned(word(spread, 0) | column, word(spread, 1), word(mean, 1), word(mean, 2), fmt)
    middle = tl.where(aligned, numel // NUMEL * NUMEL, 0)
    indices = wide_indices(EACH, NUMEL)
    start = middle * 0
    while start < middle:
        spread_tile(
            spread, mean, column, start, middle, factor, near, copy, weight, indices, dtype, fmt, column_dtype, EACH
        )
        start += NUMEL
    indices = tile_indices(1, SLIM_TILE)
    while start < numel:
        spread_tile(
            spread, mean, column, start, numel, factor, near, copy, weight, indices, dtype, fmt, column_dtype, 0
        )
        start += SLIM_TILE


@triton.jit
def remainder(count, divisor):
    """Return ``count % divisor`` in 32 bits, of a divisor below 2^16; -1 if that is 0.

    In 64 bits the compiler would call a function, and move registers to memory for it.
    """
    by = tl.where(divisor == 0, 1, divisor).to(tl.uint32)
    rest = (count >> 32).to(tl.uint32) % by
    rest = ((rest << 16) | ((count >> 16) & 0xFFFF).to(tl.uint32)) % by
    rest = ((rest << 16) | (count & 0xFFFF).to(tl.uint32)) % by
    return tl.where(divisor == 0, -1, rest.to(tl.int64))


@triton.jit
def column_of(ring, index, offset):
    """Return the address of a column's element ``offset``; 0 if the ring has no columns."""
    head = word(ring, 0)
    bytes_each = tl.where(high_of(head) == 0, 4, 2)
    return tl.where(low_of(head) == 0, 0, word(ring, index + 1) + offset * bytes_each)


@triton.jit
def update_spread(spread, mean, num_averaged, factor, near, copy, weight):
    """Update the spread of a chunk, whose average has not moved yet."""
    dtype, fmt, ring = kind_of(word(spread, 7), 0), kind_of(word(mean, 7), 1), word(spread, 2)
    num_columns, column_dtype = low_of(word(ring, 0)), high_of(word(ring, 0))
    column = column_of(ring, remainder(num_averaged, num_columns), word(spread, 4))
    alike = (num_columns == 0) | (column_dtype == dtype)
    # These have no branch at an access; all others share one body, which the compiler would else make 52 times.
    if alike & (dtype == 0) & (fmt == FLOAT32):
        spread_chunk(spread, mean, column, factor, near, copy, weight, 0, FLOAT32, 0, 4, KNOWN_TILE)
    elif alike & (dtype == 1) & (fmt == EXACT):
        spread_chunk(spread, mean, column, factor, near, copy, weight, 1, EXACT, 1, 8, KNOWN_TILE)
    else:
        spread_chunk(spread, mean, column, factor, near, copy, weight, dtype, fmt, column_dtype, 4, NARROW_TILE)


# Draws


@triton.jit
def add_columns(
    values, ring, coefficients, num_columns, offset, start, indices, mask, DTYPE: tl.constexpr, EACH: tl.constexpr
):
    """Add multiples of columns in their order, each by one fma. Several are under way: 64 bytes a thread."""
    BYTES: tl.constexpr = 4 if DTYPE == 0 else 2
    AT_ONCE: tl.constexpr = 16 // BYTES
    k = num_columns * 0
    while k + AT_ONCE <= num_columns:
        for j in tl.static_range(AT_ONCE):
            bits = load_bits(column_of(ring, k + j, offset), BYTES, start, indices, mask, "evict_first", EACH)
            values = fused_multiply_add(value_of(bits, DTYPE), coefficient_of(coefficients, k + j), values)
        k += AT_ONCE
    while k < num_columns:
        bits = load_bits(column_of(ring, k, offset), BYTES, start, indices, mask, "evict_first", EACH)
        values = fused_multiply_add(value_of(bits, DTYPE), coefficient_of(coefficients, k), values)
        k += 1
    return values


@triton.jit
def coefficient_of(coefficients, index):
    return tl.load(pointer_to(coefficients, 4) + index).to(tl.float32, bitcast=True)


@triton.jit
def with_columns(values, ring, coefficients, num_columns, offset, start, indices, mask, dtype, EACH: tl.constexpr):
    if dtype == 0:
        values = add_columns(values, ring, coefficients, num_columns, offset, start, indices, mask, 0, EACH)
    elif dtype == 1:
        values = add_columns(values, ring, coefficients, num_columns, offset, start, indices, mask, 1, EACH)
    else:
        values = add_columns(values, ring, coefficients, num_columns, offset, start, indices, mask, 2, EACH)
    return values


@triton.jit
def words_in(mean, sample, start, indices, EACH: tl.constexpr):
    """Return 32 random bits for each element of a tile. Four elements share a call of Philox."""
    first_index, key = word(mean, 4), word(mean, 5)
    upper, first = (first_index >> 32).to(tl.uint32), first_index.to(tl.uint32)
    if EACH != 0:
        fours = first + start.to(tl.uint32) + tl.arange(0, NARROW_TILE // 4).to(tl.uint32) * 4
        w0, w1, w2, w3 = words_of(key, sample, upper, fours)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), indices.shape)
    else:
        step = high_of(word(mean, 6)).to(tl.uint32)
        lower = first + (start.to(tl.uint32) + indices.to(tl.uint32)) * step
        w0, w1, w2, w3 = words_of(key, sample, upper, lower)
        words = word_of_lane(w0, w1, w2, w3, lower)
    return words


@triton.jit
def draw_tile(
    spread,
    mean,
    coefficients,
    num_columns,
    sample,
    noise,
    start,
    numel,
    indices,
    dtype,
    fmt,
    column_dtype,
    EACH: tl.constexpr,
):
    mask = None if EACH else start + indices < numel
    first, second = word(mean, 1), word(mean, 2)
    values = read_averages(first, second, start, indices, mask, fmt, "evict_first", EACH)
    ring, offset = word(spread, 2), word(spread, 4)
    values = with_columns(values, ring, coefficients, num_columns, offset, start, indices, mask, column_dtype, EACH)
    if noise != 0.0:
        variance = load_bits(word(spread, 1), 4, start, indices, mask, "evict_first", EACH)
        root = tl.sqrt_rn(variance.to(tl.float32, bitcast=True))
        values = fused_multiply_add(root * noise, normal_from(words_in(mean, sample, start, indices, EACH)), values)
    write_values(word(spread, 0), start, indices, mask, values, dtype, "", EACH)


@triton.jit
def draw_chunk(spread, mean, coefficients, num_columns, sample, noise):
    """Write a sample into a chunk's param. One body serves all dtypes and formats: it branches once for all columns."""
    numel, dtype, fmt = word(spread, 3), kind_of(word(spread, 7), 0), kind_of(word(mean, 7), 1)
    column_dtype = high_of(word(word(spread, 2), 0))
    addresses = word(spread, 0)
    k = num_columns * 0
    while k < num_columns:
        addresses |= column_of(word(spread, 2), k, word(spread, 4))
        k += 1
    aligned = is_aligned(addresses, word(spread, 1), word(mean, 1), word(mean, 2), fmt)
    # Four elements in a row share a call of Philox if the index of the first is a multiple of 4.
    in_fours = ((word(mean, 4) & 3) == 0) & (high_of(word(mean, 6)) == 1)
    middle = tl.where(aligned & (in_fours | (noise == 0.0)), numel // NARROW_TILE * NARROW_TILE, 0)
    indices = wide_indices(4, NARROW_TILE)
    start = middle * 0
    while start < middle:
        draw_tile(
            spread, mean, coefficients, num_columns, sample, noise, start, middle, indices, dtype, fmt, column_dtype, 4
        )
        start += NARROW_TILE
    indices = tile_indices(1, SLIM_TILE)
    while start < numel:
        draw_tile(
            spread, mean, coefficients, num_columns, sample, noise, start, numel, indices, dtype, fmt, column_dtype, 0
        )
        start += SLIM_TILE
