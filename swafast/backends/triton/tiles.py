"""Tiles of any dtype and format, read and written as float32: what spreads and draws do to them is the same for all.

A dtype or format that the compiler knows costs no branch; of any other, each access has one.
"""

import triton
import triton.language as tl

from .arithmetic import COMPACT, EXACT, FLOAT32, HALF, MIRRORED, decode, quiet_bits, value_of
from .memory import pointer_to, store_halves, tile_indices

# Elements in a tile of which the compiler knows dtype and format: 8 for each of 256 threads. A tile of any other has
# NARROW_TILE, since its branches take registers.
KNOWN_TILE = tl.constexpr(2048)
# Elements in a tile of a path whose arrays are not aligned, and of the end of a chunk: 2 a thread, each with a pointer.
SLIM_TILE = tl.constexpr(512)


@triton.jit
def wide_indices(EACH: tl.constexpr, NUMEL: tl.constexpr):
    """Return the indices of a tile's elements, of which a thread has ``EACH`` in a row: 4 or 8."""
    ROW: tl.constexpr = 128 * EACH if EACH == 4 else NUMEL
    return tile_indices(NUMEL // ROW, ROW)


@triton.jit
def pointers_in(address, BYTES: tl.constexpr, start, indices, EACH: tl.constexpr):
    """Return pointers to a tile's elements. The compiler moves ``EACH`` of them at once, 16 bytes at most."""
    pointer = pointer_to(address, BYTES) + start
    if EACH != 0:
        NBYTES: tl.constexpr = EACH * BYTES if EACH * BYTES < 16 else 16
        pointer = tl.multiple_of(pointer, NBYTES)
    return pointer + indices


@triton.jit
def load_bits(address, BYTES: tl.constexpr, start, indices, mask, EVICTION: tl.constexpr, EACH: tl.constexpr):
    return tl.load(pointers_in(address, BYTES, start, indices, EACH), mask=mask, eviction_policy=EVICTION)


@triton.jit
def read_values(address, start, indices, mask, dtype, EVICTION: tl.constexpr, EACH: tl.constexpr):
    """Return float32 values of a tile of a param, or of a column."""
    if dtype == 0:
        values = value_of(load_bits(address, 4, start, indices, mask, EVICTION, EACH), 0)
    elif dtype == 1:
        values = value_of(load_bits(address, 2, start, indices, mask, EVICTION, EACH), 1)
    else:
        values = value_of(load_bits(address, 2, start, indices, mask, EVICTION, EACH), 2)
    return values


@triton.jit
def read_planes(
    first,
    second,
    start,
    indices,
    mask,
    FORMAT: tl.constexpr,
    FIRST_BYTES: tl.constexpr,
    SECOND_BYTES: tl.constexpr,
    EVICTION: tl.constexpr,
    EACH: tl.constexpr,
):
    """Return averages that the planes of a tile hold, as they are."""
    of_first = load_bits(first, FIRST_BYTES, start, indices, mask, EVICTION, EACH)
    of_second = of_first
    if SECOND_BYTES != 0:
        of_second = load_bits(second, SECOND_BYTES, start, indices, mask, EVICTION, EACH)
    return decode(of_first, of_second, FORMAT)


@triton.jit
def read_averages(first, second, start, indices, mask, fmt, EVICTION: tl.constexpr, EACH: tl.constexpr):
    """Return averages of a tile, rounded to float32: of ``compensated`` that is plane 0, whatever the other holds."""
    if fmt == EXACT:
        values = read_planes(first, second, start, indices, mask, EXACT, 2, 2, EVICTION, EACH)
    elif fmt == MIRRORED:
        values = read_planes(first, second, start, indices, mask, MIRRORED, 2, 4, EVICTION, EACH)
    elif fmt == COMPACT:
        values = read_planes(first, second, start, indices, mask, COMPACT, 2, 1, EVICTION, EACH)
    elif fmt == HALF:
        values = read_planes(first, second, start, indices, mask, HALF, 2, 0, EVICTION, EACH)
    else:
        values = read_planes(first, second, start, indices, mask, FLOAT32, 4, 0, EVICTION, EACH)
    return values


@triton.jit
def nearest_bfloat16(values):
    """Return the bits of the nearest bfloat16, ties to even. The interpreter's own cast would cut bits off."""
    bits = quiet_bits(values)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
def store_bits(
    address,
    BYTES: tl.constexpr,
    start,
    indices,
    mask,
    bits,
    CACHE: tl.constexpr,
    EACH: tl.constexpr,
):
    if EACH * BYTES > 16:
        store_halves(pointer_to(address, BYTES), start, bits, KNOWN_TILE)
    else:
        tl.store(pointers_in(address, BYTES, start, indices, EACH), bits, mask=mask, cache_modifier=CACHE)


@triton.jit
def write_values(address, start, indices, mask, values, dtype, CACHE: tl.constexpr, EACH: tl.constexpr):
    """Write float32 values to a tile of a param or of a column, each rounded to nearest."""
    if dtype == 0:
        store_bits(address, 4, start, indices, mask, values.to(tl.int32, bitcast=True), CACHE, EACH)
    elif dtype == 1:
        store_bits(address, 2, start, indices, mask, nearest_bfloat16(values), CACHE, EACH)
    else:
        bits = values.to(tl.float16).to(tl.int16, bitcast=True)
        store_bits(address, 2, start, indices, mask, bits, CACHE, EACH)


@triton.jit
def is_aligned(param, variance, first, second, fmt):
    """Return whether a chunk's arrays allow tiles that begin where they do. A plane of bytes needs 4, all others 16."""
    plane = tl.where(fmt == COMPACT, second * 4, second)
    return ((param | variance | first | plane) & 15) == 0
